"""The critic: which values it gives, what it learns, when it trains alone, and how it is resumed."""

import copy
import dataclasses
import math

import pytest
import tokcredit as tc
import torch
from resuming import check_resumed
from tokcredit.train import CriticSettings, ObjectiveSettings, OptimizerSettings, collectors, run, tiny
from tokcredit.train.clock import Clock
from tokcredit.train.critic import Critic, explained_variance
from tokcredit.train.experiment import resolved
from tokcredit.train.record import read_metrics
from tokcredit.train.scoring import left_padded
from tokcredit.train.side_optimizer import SideOptimizer
from tokcredit.train.trainer import Trainer

WORDS = tiny.tokenizer()
PROMPTS, RESPONSES = ["1+2=", "1+2=", "40+7="], ["12", "17 a", "8"]
OTHER = "tiny(steps=0, seed=1)"


def packed():
    rows = [WORDS(text).input_ids for text in RESPONSES]
    mask = torch.ones(sum(map(len, rows)), dtype=torch.bool)
    mask[3] = False
    return tc.Rollouts(
        torch.tensor([t for row in rows for t in row]),
        torch.tensor([0, *map(len, rows)]).cumsum(0),
        torch.tensor([0, 0, 1]),
        torch.tensor([1.0, 0.0, 0.5]),
        mask,
        extras={"prompt_tokens": left_padded([WORDS(p).input_ids for p in PROMPTS], -1, torch.device("cpu"))[0]},
    )


def drawn(critic, seed=0):
    """The critic with a head that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    for p in critic.head.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return critic


def alone(model, head, batch):
    """The value before each token, one row at a time."""
    found = torch.zeros(batch.num_tokens, dtype=torch.float64)
    for row, prompt in enumerate(PROMPTS):
        ids, first, last = WORDS(prompt).input_ids, int(batch.begin[row]), int(batch.end[row])
        text = torch.tensor([ids + batch.tokens[first:last].tolist()])
        hidden = model(text, output_hidden_states=True).hidden_states[-1][0]
        found[first:last] = head(hidden[len(ids) - 1 : -1])[:, 0]
    return found


@pytest.mark.parametrize("own", [False, True])
def test_values_are_those_of_each_row_alone(own, monkeypatch):
    policy, model = tiny.model(WORDS).double().eval(), tiny.model(WORDS, 1).double().eval() if own else None
    critic, batch, passes = drawn(Critic(96, model).double()), packed(), []

    def counted(*arguments, **settings):
        passes.append(arguments[0])
        return predict(*arguments, **settings)

    predict = collectors.predict
    monkeypatch.setattr("tokcredit.train.collectors.predict", counted)
    forward = collectors.ForwardPass({"values", "old_log_probs"}, batch, policy, critic=critic)
    values, log_probs = forward.read("values"), forward.read("old_log_probs")
    assert passes == ([model, policy] if own else [policy]), "one forward pass for both where the model is shared"
    expected = alone(model or policy, critic.head, batch)
    torch.testing.assert_close(values, torch.where(batch.response_mask, expected, 0), rtol=1e-9, atol=1e-9)
    plain = collectors.ForwardPass({"old_log_probs"}, batch, policy).read("old_log_probs")
    assert torch.equal(log_probs, plain)
    found = collectors.collect({"values"}, batch, 2, policy, critic=critic).input("values")
    torch.testing.assert_close(found, values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("adapter", "chosen"),
    [("lora(r=4, alpha=64.0)", "head"), ("lora(r=4, alpha=64.0)", OTHER), ("prompt(tokens=3)", "initial")],
)
def test_values_of_models_with_adapters(settings, uniform, adapter, chosen):
    pytest.importorskip("peft")
    trainer = Trainer(resolved(settings("ppo", adapter=adapter, critic=CriticSettings(chosen), steps=2)))
    critic = drawn(trainer.learner._further["critic"])
    trainer.step(1)
    batch, names = trainer.rollout_collector.collect(2).batch, {"values", "hidden_states"}
    found = collectors.collect(names, batch, 3, critic.model or trainer.model, critic=critic)
    expected = critic.head(found.input("hidden_states"))[:, 0].detach()
    torch.testing.assert_close(found.input("values"), expected, rtol=1e-4, atol=1e-5)
    trained = {name for name, p in critic.named_parameters() if p.requires_grad} - {"head.weight", "head.bias"}
    assert bool(trained) == (chosen != "head") and all("lora_" in x or "prompt" in x for x in trained)


def batch_with_targets(trainer, number=1):
    collection = trainer.rollout_collector.collect(number)
    return trainer._with_inputs(collection, number)


def test_the_targets_are_those_of_the_credit(settings, uniform):
    trainer = Trainer(resolved(settings("vc_ppo", critic=CriticSettings("head"))))
    drawn(trainer.learner._further["critic"])
    batch = batch_with_targets(trainer)
    values, total = batch.input("values"), 0.0
    assert values.abs().min() > 0
    # A lambda of 1 makes the target the reward, whatever the values are.
    for begin, end, reward in zip(batch.begin, batch.end, batch.rewards, strict=True):
        torch.testing.assert_close(batch.input("value_targets")[begin:end], reward.expand(int(end - begin)))
        total += float(reward)
    assert total > 0
    first = batch.select([0])
    a, v = 0.0, first.input("values").double().tolist()
    expected = []
    for t in reversed(range(len(v))):
        after = v[t + 1] if t + 1 < len(v) else 0.0
        a = (float(first.rewards[0]) if t + 1 == len(v) else 0.0) + after - v[t] + 0.95 * a
        expected.insert(0, a)
    found = trainer.objective.credit.of(first)
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("critic", ["head", "initial"])
def test_the_gradient_of_a_step_is_that_of_the_formula(settings, uniform, critic):
    """Policy loss and value loss of whole rows in one graph, in float64."""
    s = settings("ppo", critic=CriticSettings(critic, critic_lr=1e-3))
    trainer, found = Trainer(resolved(s)), {}
    own = drawn(trainer.learner._further["critic"])
    batch = batch_with_targets(trainer)
    batch = batch.with_inputs(values=batch.input("values") + 0.1 * torch.sin(torch.arange(batch.num_tokens)))
    policy, twin = copy.deepcopy((trainer.model, own))
    policy, twin = policy.double(), twin.double()

    def keep(module, norm):
        found[norm] = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        return 1.0

    trainer.accelerator.clip_grad_norm_ = lambda *_: keep(trainer.model, "policy")
    trainer.learner._critic.clip = lambda: keep(own, "critic")
    trainer.learner.update(batch, 1, Clock())
    policy.requires_grad_(True)
    forward = collectors.ForwardPass(("log_probs", "values"), batch, policy, critic=twin)
    log_probs, values = forward.log_probs, forward.values
    advantages = trainer.objective.prepare(batch).advantages.double()
    old, target = batch.input("values").double(), batch.input("value_targets").double()
    held = torch.maximum((values - target) ** 2, (values.clamp(old - 0.2, old + 0.2) - target) ** 2) / 2
    ratio = (log_probs - log_probs.detach()).exp()
    (held - ratio * advantages).mean().backward()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(found["policy"][name].double(), p.grad, rtol=1e-2, atol=1e-4, msg=name)
    for name, p in twin.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found["critic"][name].double(), p.grad, rtol=1e-2, atol=1e-4, msg=name)
    assert twin.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("critic", ["head", "initial"])
def test_the_loss_falls_on_a_fixed_target(settings, uniform, critic):
    """Small steps along the gradient, while the policy stays."""
    s = settings("ppo", critic=CriticSettings(critic, critic_lr=1e-4, critic_warmup=20), steps=21)
    trainer = Trainer(resolved(s))
    batch = batch_with_targets(trainer)
    batch = batch.with_inputs(value_targets=batch.input("value_targets").sign())
    losses = [trainer.learner.update(batch, 1, Clock()).metrics["value_loss"] for _ in range(8)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1] > 0


@pytest.mark.parametrize("critic", ["head", "initial"])
def test_in_the_warm_up_the_policy_stays(settings, uniform, critic):
    optimizer = OptimizerSettings(lr=1e-3, micro_batch=3, precision="no", schedule="linear", warmup=2)
    s = settings("ppo", critic=CriticSettings(critic, critic_lr=1e-2, critic_warmup=2), optimizer=optimizer)
    trainer = Trainer(resolved(s))
    policy, own = trainer.model, trainer.learner._further["critic"]
    start = [copy.deepcopy(x.state_dict()) for x in (policy, own)]
    lines = [trainer.step(number).metrics for number in (1, 2)]
    assert all(torch.equal(x, start[0][name]) for name, x in policy.state_dict().items())
    assert all(not torch.equal(x, start[1][f"head.{name}"]) for name, x in own.head.state_dict().items())
    assert all(p.requires_grad for p in policy.parameters())
    assert [line["lr"] for line in lines] == [0, 0] and all(line["grad_norm"] == 0 for line in lines)
    assert all(line["critic_grad_norm"] > 0 for line in lines)
    lines = [trainer.step(number).metrics for number in (3, 4, 5)]
    assert [line["lr"] for line in lines] == [5e-4, 1e-3, 1e-3], "the schedule begins after the warm-up"
    assert all(line["grad_norm"] > 0 for line in lines)
    assert any(not torch.equal(x, start[0][name]) for name, x in policy.state_dict().items())


def test_a_run_records_the_critic(settings, uniform):
    s = settings("ppo", critic=CriticSettings("head", critic_warmup=1), steps=2)
    run(s)
    lines = read_metrics(s.output)[1:]
    assert all({"value_loss", "explained_variance", "critic_grad_norm"} <= line.keys() for line in lines)
    assert lines[0]["explained_variance"] == 0, "first all values are 0"


@pytest.mark.parametrize(("critic", "adapter"), [("head", None), ("initial", None), (OTHER, "lora(r=4)")])
def test_resumed_training_gives_the_numbers_of_an_uninterrupted_one(settings, uniform, tmp_path, critic, adapter):
    if adapter:
        pytest.importorskip("peft")
    s = resolved(settings("vapo", critic=CriticSettings(critic), adapter=adapter))

    _, first = check_resumed(s, tmp_path)
    if adapter:
        frozen = {name for name, p in first.learner._further["critic"].named_parameters() if not p.requires_grad}
        assert not frozen & first.learner._critic.state_dict()["weights"].keys()


def test_the_policy_is_that_of_a_run_without_critic_where_the_models_are_apart(settings, uniform):
    """Values of 0 make advantages of returns, and a model of its own gives the policy no gradient."""
    own = Trainer(resolved(settings("ppo", critic=CriticSettings("initial"))))
    plain = Trainer(resolved(settings(objective=ObjectiveSettings("ppo", credit="whitened(returns(0.95))"))))
    found, expected = own.step(1), plain.step(1)
    torch.testing.assert_close(found.update.prepared.advantages, expected.update.prepared.advantages)
    assert found.metrics["grad_norm"] == pytest.approx(expected.metrics["grad_norm"], rel=1e-4)
    shared = Trainer(resolved(settings("ppo", critic=CriticSettings("head"))))
    drawn(shared.learner._further["critic"])
    assert shared.step(1).metrics["grad_norm"] != pytest.approx(expected.metrics["grad_norm"], rel=1e-2)


def test_a_value_that_is_not_finite_changes_nothing(settings, uniform):
    optimizer = OptimizerSettings(lr=1e-3, micro_batch=3, precision="no", on_nonfinite="skip")
    trainer = Trainer(resolved(settings("ppo", critic=CriticSettings("initial"), optimizer=optimizer)))
    own = trainer.learner._further["critic"]
    batch = batch_with_targets(trainer)
    targets = batch.input("value_targets").clone()
    targets[int(batch.begin[2]) + 1] = math.nan
    before = copy.deepcopy((trainer.model.state_dict(), own.state_dict()))
    done = trainer.learner.update(batch.with_inputs(value_targets=targets), 1, Clock())
    assert len(done.skipped) == 1 and "of the critic in row 2 at token 1" in done.skipped[0]
    for now, then in zip((trainer.model, own), before, strict=True):
        assert all(torch.equal(x, then[name]) for name, x in now.state_dict().items())
    assert all(p.grad is None for x in (trainer.model, own) for p in x.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_of_a_value_model_is_left_out(settings, tied, monkeypatch):
    """It stays as it is, unless it is the input layer too."""
    other = tiny.model(WORDS, 1)
    if not tied:
        other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    monkeypatch.setattr("tokcredit.train.models.beside", lambda *_: other)
    trainer = Trainer(resolved(settings("ppo", critic=CriticSettings(OTHER))))
    trained = trainer.learner._critic.state_dict()["weights"]
    assert other.get_input_embeddings().weight.requires_grad and ("model.lm_head.weight" in trained) is False
    assert other.lm_head.weight.requires_grad == tied


def test_the_state_of_the_optimizer_is_kept(settings, uniform):
    s = resolved(settings("ppo", critic=CriticSettings("head", critic_lr=0.1)))
    trainer = Trainer(s)
    critic = drawn(Critic(3))
    twin = drawn(Critic(3), seed=1)
    x = torch.tensor([[1.0, 2, 3], [0, 1, 0]])

    def steps(critic, optimizer, count):
        for _ in range(count):
            critic(x).square().sum().backward()
            optimizer.clip()
            optimizer.step()
            optimizer.forget()

    first, second = (SideOptimizer(c, s.critic.critic_lr, s.optimizer, trainer.ranks) for c in (critic, twin))
    steps(critic, first, 3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(critic, first, 2)
    steps(twin, second, 2)
    assert torch.equal(critic(x), twin(x))


def test_explained_variance_by_hand():
    """Targets 0, 1, 3, 4 have the variance 2.5; errors 1, 0, 0, 1 have 0.25."""
    nan = math.nan
    values, targets = torch.tensor([-1.0, nan, 1.0, 3.0, 3.0]), torch.tensor([0.0, nan, 1.0, 3.0, 4.0])
    mask = torch.tensor([True, False, True, True, True])
    assert explained_variance(values, targets, mask) == pytest.approx(0.9)
    assert explained_variance(targets + 7, targets, mask) == pytest.approx(1)
    assert explained_variance(torch.zeros(5), targets, mask) == pytest.approx(0)
    assert explained_variance(-targets, targets, mask) == pytest.approx(-3)
    assert math.isnan(explained_variance(values, torch.ones(5), mask)), "the targets do not vary"
    assert math.isnan(explained_variance(values, 1e-9 * torch.arange(5), mask)), "by more than rounding"
    assert explained_variance(values / 1e9, targets / 1e9, mask) == pytest.approx(0.9)
    assert math.isnan(explained_variance(values, targets, torch.zeros(5, dtype=torch.bool)))
    assert math.isnan(explained_variance(values, targets, torch.ones(5, dtype=torch.bool))), "NaN at a token counts"


def test_explained_variance_of_two_processes_is_that_of_all_tokens():
    generator = torch.Generator().manual_seed(0)
    values, targets = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    mask = torch.rand(40, generator=generator) < 0.7
    error = (targets - values)[mask]
    expected = 1 - error.var(correction=0) / targets[mask].var(correction=0)
    assert explained_variance(values, targets, mask) == pytest.approx(float(expected))
    # A process sees its own sums, then what both have.
    both = []
    for part in (slice(0, 15), slice(15, 40)):
        t = targets[part][mask[part]]
        e = t - values[part][mask[part]]
        size = t.square().sum() + values[part][mask[part]].square().sum()
        both.append({"count": len(t), "size": size, "target": t.sum(), "error": e.sum()})
    sums = {name: float(both[0][name] + both[1][name]) for name in both[0]}
    mean = {name: sums[name] / sums["count"] for name in ("target", "error")}
    squares = {"target": 0.0, "error": 0.0}
    for part in (slice(0, 15), slice(15, 40)):
        t = targets[part][mask[part]]
        squares["target"] += float((t - mean["target"]).square().sum())
        squares["error"] += float((t - values[part][mask[part]] - mean["error"]).square().sum())

    def total(own):
        return sums if "count" in own else squares

    first = explained_variance(values[:15], targets[:15], mask[:15], total)
    assert first == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic": CriticSettings()}, "critic: expected head, initial or a model because of ppo, got None"),
        (
            {"critic": CriticSettings("head"), "objective": ObjectiveSettings("grpo")},
            "critic: expected None because grpo has no critic, got head",
        ),
        (
            {"critic": CriticSettings("head", critic_warmup=5)},
            "critic_warmup: expected fewer than the 5 steps, got 5",
        ),
        (
            {"critic": CriticSettings("head"), "objective": ObjectiveSettings("grpo", terms=("value()",))},
            r"credit: expected one that says what a critic learns, such as gae\(\), got",
        ),
        ({"critic": CriticSettings("no/such/model")}, "critic: expected .*, got 'no/such/model'"),
        ({"critic": CriticSettings("tiny_tools(steps=0)")}, "critic: expected the tokens of tiny.*, got tiny_tools"),
        (
            {"critic": CriticSettings("head"), "aligned": OTHER},
            r"aligned: expected None because ppo has no aligned policy, got tiny\(steps=0, seed=1\)",
        ),
        (
            {"critic": CriticSettings("head"), "objective": ObjectiveSettings("rto")},
            "aligned: expected a model because of rto, got None",
        ),
    ],
)
def test_refusals(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(resolved(settings(**({"objective": ObjectiveSettings("ppo")} | changes))))


def test_settings_of_a_critic_that_is_missing_are_refused():
    for name in ("critic_lr", "critic_warmup"):
        with pytest.raises(ValueError, match=f"{name}: expected 0 because there is no critic, got 1"):
            CriticSettings(None, **{name: 1})
    assert CriticSettings("head", 0.5, 3).critic_lr == 0.5


def test_the_learning_rate_and_the_value_loss_have_defaults(settings):
    s = settings("ppo", critic=CriticSettings("head"))
    assert resolved(s).critic.critic_lr == pytest.approx(10 * s.optimizer.lr)
    assert resolved(settings("grpo")).critic == CriticSettings()
    assert Trainer(resolved(s)).objective.terms == (tc.term.value(),)
    own = dataclasses.replace(s, objective=ObjectiveSettings("ppo", terms=("value(0.1, limit=0.5)",)))
    assert Trainer(resolved(own)).objective.terms == (tc.term.value(0.1, 0.5),)
    vapo = Trainer(resolved(settings("vapo", critic=CriticSettings("head")))).objective
    assert vapo.terms == (*tc.methods.vapo().terms, tc.term.value())


def test_rto_rewards_tokens_by_another_policy(settings, uniform):
    s = settings("rto", critic=CriticSettings("head"), aligned=OTHER)
    trainer = Trainer(resolved(s))
    batch = batch_with_targets(trainer)
    ratio = batch.input("aligned_log_probs") - batch.input("ref_log_probs")
    assert ratio.abs().min() > 0 and torch.equal(batch.input("ref_log_probs"), batch.input("old_log_probs"))
    rewards = (0.05 * ratio.double()).clamp(-0.05, 0.05)
    for begin, end, outcome in zip(batch.begin.tolist(), batch.end.tolist(), batch.rewards.tolist(), strict=True):
        expected = outcome + rewards[begin:end].flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(batch.input("value_targets")[begin:end].double(), expected, rtol=1e-4, atol=1e-5)
