import dataclasses

import pytest
import tokcredit as tc
import torch
from tokcredit.decoding.temperature import AdaptiveTemperature
from tokcredit.train import ObjectiveSettings, OptimizerSettings, SamplingSettings, collectors, run, tiny
from tokcredit.train.clock import Clock
from tokcredit.train.experiment import resolved
from tokcredit.train.record import read_metrics
from tokcredit.train.sampler import TransformersSampler
from tokcredit.train.scoring import left_padded
from tokcredit.train.trainer import Trainer

WORDS = tiny.tokenizer()
TEMPERATURE = 0.8
ROWS = [(0, [5, 9, 1]), (1, [7]), (0, [5, 4, 6, 9]), (1, [8, 8]), (0, [3])]
PROMPTS = [WORDS("47+85=").input_ids, WORDS("1+2=").input_ids]


@pytest.fixture(scope="module")
def models():
    out = [tiny.model(WORDS, seed).double().eval() for seed in range(3)]
    with torch.no_grad():
        for model in out:
            for p in model.parameters():
                p.mul_(2.0)
    return out


@pytest.fixture
def batch():
    lengths = [len(tokens) for _, tokens in ROWS]
    return tc.Rollouts(
        torch.tensor([t for _, tokens in ROWS for t in tokens]),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor([g for g, _ in ROWS]),
        torch.arange(5.0),
        extras={"prompt_tokens": left_padded([PROMPTS[g] for g, _ in ROWS], -1, torch.device("cpu"))[0]},
    )


def alone(model, row):
    """Logits and hidden states of one row's tokens, without padding, cache or batch."""
    group, tokens = row
    out = model(torch.tensor([[*PROMPTS[group], *tokens]]), output_hidden_states=True)
    begin = len(PROMPTS[group]) - 1
    return out.logits[0, begin:-1] / TEMPERATURE, out.hidden_states[-1][0, begin:-1]


@pytest.mark.parametrize("size", [1, 2, 100])
def test_each_token_alone(models, batch, size):
    policy, reference, teacher = models
    names = frozenset({"old_log_probs", "entropies", "squared_probs", "ref_log_probs"})
    names |= {"reverse_kl", "forward_kl", "ref_forward_kl", "hidden_states"}
    found = collectors.collect(names, batch, size, policy, reference, teacher, TEMPERATURE)
    expected = {name: [] for name in names}
    for row in ROWS:
        logits, hidden = alone(policy, row)
        p, q = logits.log_softmax(-1), alone(teacher, row)[0].log_softmax(-1)
        chosen = torch.tensor(row[1])[:, None]
        expected["old_log_probs"].append(p.gather(1, chosen)[:, 0])
        expected["ref_log_probs"].append(alone(reference, row)[0].log_softmax(-1).gather(1, chosen)[:, 0])
        expected["entropies"].append(-(p.exp() * p).sum(-1))
        expected["squared_probs"].append(p.exp().square().sum(-1))
        expected["reverse_kl"].append((p.exp() * (p - q)).sum(-1))
        expected["forward_kl"].append((q.exp() * (q - p)).sum(-1))
        ref = alone(reference, row)[0].log_softmax(-1)
        expected["ref_forward_kl"].append((ref.exp() * (ref - p)).sum(-1))
        expected["hidden_states"].append(hidden)
    for name in names:
        torch.testing.assert_close(
            found.input(name).double(), torch.cat(expected[name]), atol=1e-5, rtol=1e-4, msg=name
        )


def test_one_pass_of_the_teacher_gives_all_divergences(models, batch):
    def collect():
        collectors.collect(collectors.FROM_TEACHER, batch, len(ROWS), models[0], None, models[2], TEMPERATURE)

    collect()  # the first time, a model is checked by passes of its own
    passes = []
    hook = models[2].register_forward_hook(lambda *_: passes.append(1))
    collect()
    hook.remove()
    assert len(passes) == 1


def test_inputs_of_whole_groups(models, batch):
    names = frozenset({"token_probs", "disagreement", "padded_disagreement"})
    found = collectors.collect(names, batch, 1, models[0], temperature=TEMPERATURE)
    probs = [alone(models[0], row)[0].softmax(-1) for row in ROWS]
    words = [sorted({t for g, tokens in ROWS if g == group for t in tokens}) for group in (0, 1)]
    at = 0
    for (group, tokens), p in zip(ROWS, probs, strict=True):
        for i in range(len(tokens)):
            row = found.extras["token_probs"][at + i].double()
            torch.testing.assert_close(row[: len(words[group])], p[i, words[group]], atol=1e-5, rtol=1e-4)
            assert not row[len(words[group]) :].any()
        at += len(tokens)
    logits = torch.cat([alone(models[0], row)[0] for row in ROWS])
    for name, padded in (("disagreement", False), ("padded_disagreement", True)):
        expected = tc.divergence.disagreement(logits, batch, padded=padded).double()
        torch.testing.assert_close(found.extras[name].double(), expected, atol=1e-4, rtol=1e-3)


def test_old_log_probs_of_replayed_rows_are_those_they_were_sampled_with(models, batch):
    stored = -torch.arange(1.0, 12.0)
    replayed = torch.tensor([False, True, False, False, True])
    plain = collectors.collect({"old_log_probs"}, batch, 2, models[0], temperature=TEMPERATURE).old_log_probs
    batch = batch.with_inputs(replayed=replayed, rollout_log_probs=stored)
    found = collectors.collect({"old_log_probs"}, batch, 2, models[0], temperature=TEMPERATURE).old_log_probs
    of_token = replayed.repeat_interleave(batch.lengths)
    assert torch.equal(found[of_token], stored[of_token].to(found.dtype))
    torch.testing.assert_close(found[~of_token], plain[~of_token])


def test_every_registered_input_of_a_forward_pass_is_computed():
    assert all(map(collectors.computes, collectors.collected()))
    assert not collectors.computes("rollout_log_probs") and not collectors.computes("_scores")
    for name in tc.methods.names():
        assert all(map(collectors.computes, tc.methods.load(name).variables))


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("larger", ["policy", "teacher"])
def test_ids_that_pad_the_output_layer_of_one_model_are_not_compared(batch, larger, longer):
    """Models of one family have the same tokens, but output layers of different sizes."""
    policy, teacher = (tiny.model(WORDS, seed).double().eval() for seed in range(2))
    (policy if larger == "policy" else teacher).resize_token_embeddings(len(WORDS) + 5, mean_resizing=False)
    told = [[4, 4, *prompt] if longer else prompt for prompt in PROMPTS]
    prompts = left_padded([told[group] for group, _ in ROWS], -1, torch.device("cpu"))[0]
    batch = batch.with_inputs(teacher_prompt_tokens=prompts)
    objective = tc.methods.gkd(tc.supervised.js(0.3, top_k=4))
    prepared, values, gradients = objective.prepare(batch), [], []
    for hidden_only in (False, True):
        forward = collectors.ForwardPass(
            {"js"}, batch, policy, teacher=teacher, token_loss=objective.token_loss, hidden_only=hidden_only
        )
        if hidden_only:
            weight, bias, settings = forward.layer
            settings["teacher"] = forward.teacher_states
            loss = objective.loss_from_hidden(prepared, forward.final_hidden_states, weight, bias, **settings).loss
        else:
            loss = objective.loss(prepared, forward.read("js")).loss
        values.append(loss.item())
        gradients.append(torch.cat([x.reshape(-1) for x in torch.autograd.grad(loss, list(policy.parameters()))]))
    each = []
    for group, tokens in ROWS:
        own, other = (
            model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1, : len(WORDS)]
            for model, prompt in ((policy, PROMPTS[group]), (teacher, told[group]))
        )
        each.append(objective.token_loss(own, other))
    assert values == pytest.approx([torch.cat(each).mean().item()] * 2)
    torch.testing.assert_close(*gradients)
    assert gradients[0].norm() > 1e-3


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "ref_forward_kl", "entropies", "log_probs"])
def test_the_gradient_of_a_variable_reaches_the_policy(models, batch, name):
    policy, reference, teacher = models
    value = collectors.ForwardPass({name}, batch, policy, reference, teacher, TEMPERATURE).read(name)
    policy.zero_grad()
    value.sum().backward()
    grads = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    total = 0.0
    for row in ROWS:
        p, q, ref = (alone(x, row)[0].log_softmax(-1) for x in (policy, teacher, reference))
        q, ref = q.detach(), ref.detach()
        total = (
            total
            + {
                "reverse_kl": lambda p=p, q=q: (p.exp() * (p - q)).sum(),
                "forward_kl": lambda p=p, q=q: (q.exp() * (q - p)).sum(),
                "ref_forward_kl": lambda p=p, ref=ref: (ref.exp() * (ref - p)).sum(),
                "entropies": lambda p=p: -(p.exp() * p).sum(),
                "log_probs": lambda p=p, row=row: p.gather(1, torch.tensor(row[1])[:, None]).sum(),
            }[name]()
        )
    total.backward()
    torch.testing.assert_close(value.sum(), total, rtol=1e-5, atol=1e-6)
    for ours, p in zip(grads, policy.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_distillation_needs_a_teacher_with_the_same_tokens(settings):
    with pytest.raises(ValueError, match="teacher: expected a model because of tip, got None"):
        Trainer(resolved(settings("tip")))
    with pytest.raises(ValueError, match="teacher: expected the tokens of tiny"):
        Trainer(resolved(settings("tip", teacher="tiny_tools(steps=0)")))


@pytest.mark.parametrize("token_loss", [None, "forward_kl()"])
def test_an_update_brings_the_student_nearer_to_its_teacher(settings, batch, token_loss):
    """A step along the gradient lowers the loss of its own rollouts, if it is small."""
    objective = ObjectiveSettings("tip", set=("share=1.0",), token_loss=token_loss)
    s = settings(objective=objective, teacher="tiny(steps=0, seed=1)")
    trainer = Trainer(resolved(dataclasses.replace(s, optimizer=dataclasses.replace(s.optimizer, lr=1e-4))))
    losses = []
    for number in (1, 2, 3):
        update = trainer.learner.update(trainer.learner.with_inputs(batch), number, Clock())
        losses.append(update.metrics["loss"])
    assert losses[0] > losses[1] > losses[2] > 0


def test_adaptive_sampling_returns_its_own_log_probs(models):
    adaptive = AdaptiveTemperature(0.9, 0.5, (1.0, 0.5, -2.0, 2.0))
    sampler = TransformersSampler(models[0], WORDS, adaptive=adaptive)
    torch.manual_seed(0)
    made = sampler.sample(PROMPTS, 2, 5, temperature=0.9)
    plain = TransformersSampler(models[0], WORDS)
    torch.manual_seed(0)
    other = plain.sample(PROMPTS, 2, 5, temperature=0.9)
    assert not torch.equal(made.log_probs, other.log_probs)
    for i, (b, e) in enumerate(zip(made.cu_seqlens[:-1].tolist(), made.cu_seqlens[1:].tolist(), strict=True)):
        tokens = made.tokens[b:e].tolist()
        logits = alone(models[0], (i // 2, tokens))[0] * TEMPERATURE
        expected = adaptive(None, logits).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(made.log_probs[b:e].double(), expected.double(), atol=1e-4, rtol=1e-4)


def test_sampling_at_another_temperature_is_plain(models):
    """Short answers and greedy responses have temperatures of their own."""
    adaptive = TransformersSampler(models[0], WORDS, adaptive=AdaptiveTemperature(0.9, 0.5, (1.0, 0.5, -2.0, 2.0)))
    for temperature in (0.6, 0.0):
        sampled = []
        for sampler in (adaptive, TransformersSampler(models[0], WORDS)):
            torch.manual_seed(0)
            sampled.append(sampler.sample(PROMPTS, 3, 5, temperature).tokens)
        assert torch.equal(*sampled)


def test_adaptive_temperature_survives_a_resume(settings, tmp_path):
    sampling = SamplingSettings(prompts=2, group=4, max_tokens=6, adaptive=0.3)
    whole = settings("hapo", sampling=sampling, steps=4, save_every=2, output=tmp_path / "whole")
    parts = dataclasses.replace(whole, output=tmp_path / "parts", steps=2)
    run(whole)
    run(parts)
    run(dataclasses.replace(parts, steps=4, resume=True))
    # The method has no schedule, so stopping at step 2 and continuing changes nothing.
    lines = [read_metrics(s.output) for s in (whole, parts)]
    for name in ("reward_mean", "tokens", "loss", "grad_norm"):
        assert [line.get(name) for line in lines[0]] == [line.get(name) for line in lines[1]]


@pytest.mark.parametrize("collector", ["user", "policy"])
def test_an_input_that_is_not_collected_is_named(settings, monkeypatch, collector):
    monkeypatch.setattr(tc.inputs, "_REGISTRY", dict(tc.inputs._REGISTRY))
    tc.inputs.register("surprise", per="token", dtype="float", meaning="for a test", collector=collector)
    objective = ObjectiveSettings("grpo", filters=("top_share(0.5, score=given('surprise'))",))
    with pytest.raises(ValueError, match=r"method: expected an objective whose inputs .* which requires surprise"):
        Trainer(resolved(settings(objective=objective)))


@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_of_an_update_is_that_of_separate_rows(settings, gradients, monkeypatch, shared):
    """Where rows share predictions, the output layer is computed once for each; elsewhere together with the loss."""
    optimizer = OptimizerSettings(lr=1e-5, micro_batch=16, precision="no")
    trainer = Trainer(resolved(settings("tempo", optimizer=optimizer)))
    rows = [[5, 9, 4, 7], [5, 9, 4, 8], [5, 9, 4, 8], [5, 9]] if shared else [[5, 9], [4, 8, 7], [6], [8, 8, 5, 9]]
    batch = tc.Rollouts(
        torch.tensor([t for row in rows for t in row]),
        torch.tensor([0, *map(len, rows)]).cumsum(0),
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([1.0, 0.0, 0.25, 0.5]),
        extras={"prompt_tokens": torch.tensor([PROMPTS[0]] * 4)},
    )
    calls, own = [], tc.Objective.loss_from_hidden
    monkeypatch.setattr(tc.Objective, "loss_from_hidden", lambda *a, **k: calls.append(1) or own(*a, **k))
    model = trainer.model
    log_probs = []
    for row in rows:
        logits = model(torch.tensor([[*PROMPTS[0], *row]])).logits[0, len(PROMPTS[0]) - 1 : -1]
        log_probs.append((logits / trainer.settings.sampling.temperature).log_softmax(-1)[range(len(row)), row])
    current = torch.cat(log_probs)
    trainer.objective.loss(trainer.objective.prepare(batch), current).loss.backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    trainer.learner.update(trainer.learner.with_inputs(batch), 1, Clock())
    assert len(calls) == (0 if shared else 1)
    torch.testing.assert_close(gradients[0], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
