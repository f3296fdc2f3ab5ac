"""SkyRL's own trainer computes, scales and sums what estimators and policy losses of ours return."""

import importlib.util
import inspect
import re
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokcredit as tc
import torch

if importlib.util.find_spec("skyrl") is None:
    pytest.skip("SkyRL is not installed; make test-others", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import absent
import recipes
import rows as rr

absent.pretend("datasets", "deepspeed", "flash_attn", "megatron", "pandas", "vllm", "skyrl.tinker")

import cloudpickle
from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
from skyrl.train.config import AlgorithmConfig, OffPolicyCorrectionConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.trainer import RayPPOTrainer
from tokcredit.adapters import skyrl as adapter

ROWS = rr.batch()
ROWWISE = {"loss_reduction": "sequence_mean"}
SUMMED = tc.aggregation.sequence_sum(12)
adapter.register("tempo_ctpo", replace(tc.methods.ctpo(), credit=tc.methods.tempo().credit))
adapter.register("as_dual_clip", tc.Objective(clip=tc.clip.ppo(0.2, 0.2, 3.0), aggregation=tc.aggregation.token_mean()))
adapter.register("as_gspo", tc.methods.gspo(0.2, 0.2))
adapter.register("as_cispo", tc.methods.cispo(0.0, 5.0))
adapter.register("unclipped", tc.mix("dapo", clip="unclipped()"))
adapter.register("summed", replace(tc.methods.dr_grpo(), aggregation=SUMMED))
adapter.register("weighted", tc.Objective(token_weights=(tc.token_weights.importance(high=1.1),)))


class CreditTrainer(adapter.Credit, RayPPOTrainer):
    pass


def configuration(estimator, loss, step_wise=False, **settings):
    algorithm = AlgorithmConfig(advantage_estimator=estimator, policy_loss_type=loss, **settings)
    trainer = SimpleNamespace(algorithm=algorithm, micro_train_batch_size_per_gpu=2)
    return SimpleNamespace(trainer=trainer, generator=SimpleNamespace(step_wise_trajectories=step_wise))


def training_batch(rows=ROWS):
    """As SkyRL's preprocessing lays rows out: left-padded sequences, responses at their right end."""
    width = max(len(row["response"]) for row in rows)
    sequences = [torch.cat([row["prompt"], row["response"]]) for row in rows]
    ones = [torch.ones(len(row["response"])) for row in rows]
    rewards = [torch.zeros(len(row["response"])) for row in rows]
    for row, reward in zip(rows, rewards, strict=True):
        reward[-1] = row["reward"]
    batch = TrainingInputBatch(
        {
            "sequences": rr.left(sequences),
            "attention_mask": rr.left([torch.ones(len(x), dtype=torch.long) for x in sequences]),
            "response_mask": rr.left(ones),
            "loss_mask": rr.left([row["mask"].float() for row in rows]),
            "rewards": rr.left(rewards),
            "action_log_probs": rr.left([row["old_log_probs"] for row in rows], width),
            "rollout_logprobs": rr.left([row["rollout_log_probs"] for row in rows], width),
            "base_action_log_probs": None,
            "values": None,
        }
    )
    batch.metadata = {"uids": [f"p{row['group']}" for row in rows], "avg_response_length": 5.0}
    return batch


def trainer(config):
    """SkyRL's trainer with a configuration and nothing that needs a GPU."""
    one = CreditTrainer.__new__(CreditTrainer)
    one.cfg, one.all_metrics = config, {}
    adapter.check(config)
    return one


def advantages_of(config, rows=ROWS):
    """Advantages as the trainer stores them, packed."""
    out = trainer(config).compute_advantages_and_returns(training_batch(rows))
    return out["advantages"][out["response_mask"].bool()]


def trained(config, rows=ROWS, parts=((0, 6), (6, 16)), key=None):
    """Loss and gradient to the packed log-probs, by the calls of the trainer and of its workers."""
    one = trainer(config)
    batch = one._normalize_advantages(one.compute_advantages_and_returns(training_batch(rows)), [(0, len(rows))])
    loss_fn = PolicyLossRegistry.get(config.trainer.algorithm.policy_loss_type)
    current = rr.left([row["log_probs"] for row in rows]).requires_grad_()
    total = 0.0
    for first, last in parts:
        loss, metrics = loss_fn(
            current[first:last],
            batch["action_log_probs"][first:last],
            batch["advantages"][first:last],
            config=config.trainer.algorithm,
            loss_mask=batch["loss_mask"][first:last],
            rollout_logprobs=batch["rollout_logprobs"][first:last],
        )
        loss.backward()
        total += loss.item()
    assert 0 <= metrics.get("clip_ratio", 0.0) <= 1
    return total, current.grad[batch["response_mask"].bool()]


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_estimators_equal_skyrl(name):
    """Except at tokens of tools, to which SkyRL gives advantages that it does not train."""
    config = configuration(f"tokcredit_{name}", "tokcredit_grpo", **ROWWISE)
    expected = advantages_of(configuration(name, "regular")) * torch.cat([row["mask"] for row in ROWS])
    assert (expected > 0).any() and (expected < 0).any()
    torch.testing.assert_close(advantages_of(config), expected, rtol=1e-5, atol=1e-6)


def steps():
    """The rows with each trajectory of at least 4 tokens in two steps; a step has no reward but the last."""
    rows, last = [], []
    for row in sorted(ROWS, key=lambda row: row["group"]):
        length = len(row["response"])
        for first, end in ((0, length // 2), (length // 2, length)) if length > 3 else ((0, length),):
            part = {name: x[first:end] for name, x in row.items() if torch.is_tensor(x) and name != "prompt"}
            rows.append(row | part | {"reward": row["reward"] if end == length else 0.25})
            last.append(end == length)
    return rows, last


def step_wise(name, one=None, **changes):
    """Advantages of the steps, packed, and SkyRL's metrics."""
    rows, last = steps()
    batch = training_batch(rows)
    batch.metadata |= {"is_last_step": last, **changes}
    one = one or trainer(configuration(name, "tokcredit_dapo", step_wise=True))
    out = one.compute_advantages_and_returns(batch)
    assert one.cfg.generator.step_wise_trajectories
    return out["advantages"][out["response_mask"].bool()], out.metadata["metrics"]


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_steps_equal_skyrl(name):
    """Both read the reward of the last step; a trajectory counts once."""
    expected, metrics = step_wise(name, trainer(configuration(name, "regular", step_wise=True)))
    found, ours = step_wise(f"tokcredit_{name}")
    mask = torch.cat([row["mask"] for row in steps()[0]])
    assert (expected > 0).any() and (expected < 0).any()
    torch.testing.assert_close(found, expected * mask, rtol=1e-5, atol=1e-6)
    assert ours["avg_final_rewards"] == pytest.approx(metrics["avg_final_rewards"]) != 0


def test_steps_equal_whole_rows():
    rows = sorted(ROWS, key=lambda row: row["group"])
    whole = advantages_of(configuration("tokcredit_rloo", "tokcredit_dapo"), rows)
    torch.testing.assert_close(step_wise("tokcredit_rloo")[0], whole)


def test_rewards_of_steps_that_are_summed():
    class Summing(CreditTrainer):
        reward_rule = "sum"

    adapter.register("returns", tc.Objective(tc.credit.returns(discount=0.5)))
    one = Summing.__new__(Summing)
    one.cfg, one.all_metrics = configuration("tokcredit_returns", "tokcredit_dapo", step_wise=True), {}
    found, _ = step_wise(None, one)
    rows, last = steps()
    returns, total = [], 0.0
    for row, ends in zip(reversed(rows), reversed(last), strict=True):
        total, of_row = 0.0 if ends else total, []
        places = row["mask"].nonzero()[:, 0].tolist()
        assert places, "the reward of a row without chosen tokens would move to another row"
        for t in reversed(range(len(row["mask"]))):
            if row["mask"][t]:
                total = (row["reward"] if t == places[-1] else 0.0) + 0.5 * total
            of_row.append(total if row["mask"][t] else 0.0)
        returns = of_row[::-1] + returns
    torch.testing.assert_close(found, torch.tensor(returns))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"is_last_step": [True, False]},
            "is_last_step: expected one for each of .* rows, True in the last one, got 2",
        ),
        ({"uids": None}, "uids: expected one group in all rows of trajectory 0, got 'x' in row 1 beside 'p0' in row 0"),
    ],
)
def test_steps_that_contradict_themselves(changes, message):
    rows, last = steps()
    assert last[:2] == [False, True]
    if "uids" in changes:
        changes = {"uids": ["p0", "x", *(f"p{row['group']}" for row in rows[2:])]}
    with pytest.raises(ValueError, match=message):
        step_wise("tokcredit_rloo", **changes)


def test_rule_is_checked_before_anything_starts():
    class Averaging(CreditTrainer):
        reward_rule = "mean"

    with pytest.raises(ValueError, match="reward_rule: expected one of same, last, split, sum, got 'mean'"):
        Averaging(configuration("tokcredit_tempo", "tokcredit_ctpo"))


@pytest.mark.parametrize("name", ["tempo_ctpo", "grpo", "tempo", "summed"])
def test_training_equals_the_objective(name):
    objective = adapter._OBJECTIVES[f"tokcredit_{name}"]
    settings = {"loss_reduction": adapter._REDUCTIONS[type(objective.aggregation)]}
    if name == "summed":
        settings["max_seq_len"] = 12
    config = configuration(f"tokcredit_{name}", f"tokcredit_{name}", **settings)
    advantages, loss, gradient = rr.expected(objective, ROWS)
    torch.testing.assert_close(advantages_of(config), advantages)
    value, theirs = trained(config)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(theirs, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        ("as_dual_clip", "dual_clip", {}),
        ("as_gspo", "gspo", ROWWISE),
        ("sapo", "sapo", ROWWISE),
        ("as_cispo", "cispo", {}),
        ("unclipped", "importance_sampling", {}),
    ],
)
def test_losses_equal_skyrl(ours, theirs, settings):
    expected = trained(configuration("grpo", theirs, **settings))
    value, gradient = trained(configuration("tokcredit_grpo", f"tokcredit_{ours}", **settings))
    assert gradient.abs().sum() > 0.1
    assert value == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-7)


def test_multiplying_weights_are_part_of_the_advantage():
    plain = advantages_of(configuration("tokcredit_grpo", "tokcredit_grpo", **ROWWISE))
    weighted = advantages_of(configuration("tokcredit_weighted", "tokcredit_grpo", **ROWWISE))
    data = rr.rollouts(ROWS)
    ratio = (data.old_log_probs - data.rollout_log_probs).exp().clamp(max=1.1)
    torch.testing.assert_close(weighted, plain * ratio, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weighted, plain)


def test_what_a_worker_is_sent():
    """SkyRL pickles the functions of its registries by value."""
    loss = PolicyLossRegistry.get("tokcredit_tempo_ctpo")
    x = torch.tensor([[-1.0, -1.5, -0.5]])
    arguments = (x, x + 0.3, torch.tensor([[1.0, -2.0, 3.0]]), AlgorithmConfig())
    assert cloudpickle.loads(cloudpickle.dumps(loss))(*arguments)[0] == loss(*arguments)[0] != 0


@pytest.mark.parametrize(
    ("estimator", "loss", "settings", "message"),
    [
        ("grpo", "tokcredit_ctpo", {}, "advantage_estimator: expected one of tokcredit_.*got 'grpo'"),
        ("tokcredit_tempo", "regular", {}, "policy_loss_type: expected one of tokcredit_.*got 'regular'"),
        ("tokcredit_tempo", "tokcredit_grpo", {}, "loss_reduction: expected 'sequence_mean'"),
        ("tokcredit_tempo", "tokcredit_ba", {}, "aggregation stage without group statistics"),
        ("tokcredit_pods", "tokcredit_ctpo", {}, "expected no filters"),
        ("tokcredit_tempo", "tokcredit_ctpo", {"eps_clip_high": 0.28}, "eps_clip_high: expected SkyRL's default 0.2"),
        ("tokcredit_tempo", "tokcredit_dr_grpo", {}, "a length in the aggregation stage"),
        (
            "tokcredit_summed",
            "tokcredit_summed",
            {"loss_reduction": "seq_mean_token_sum_norm"},
            "max_seq_len: expected",
        ),
        ("tokcredit_tempo", "tokcredit_ctpo", {"step_wise": True}, "expected a loss of single tokens, because SkyRL"),
        (
            "tokcredit_tempo",
            "tokcredit_grpo",
            {"step_wise": True, **ROWWISE},
            "expected an aggregation stage over tokens, because SkyRL averages over rows",
        ),
        (
            "tokcredit_tempo",
            "tokcredit_ctpo",
            {"off_policy_correction": OffPolicyCorrectionConfig(tis_ratio_type="token")},
            "off_policy_correction: expected SkyRL's default",
        ),
    ],
)
def test_trainers_refuse(estimator, loss, settings, message):
    with pytest.raises(ValueError, match=message):
        CreditTrainer(configuration(estimator, loss, **settings))


def test_estimators_need_token_ids():
    config = configuration("tokcredit_tempo", "tokcredit_ctpo")
    with pytest.raises(RuntimeError, match=r"mix tokcredit\.adapters\.skyrl\.Credit into the trainer"):
        RayPPOTrainer.compute_advantages_and_returns(trainer(config), training_batch())


def test_inputs_that_the_batch_lacks():
    batch = training_batch()
    del batch["rollout_logprobs"]
    config = configuration("tokcredit_weighted", "tokcredit_grpo", **ROWWISE)
    with pytest.raises(ValueError, match="requires rollout_log_probs"):
        trainer(config).compute_advantages_and_returns(batch)
    del batch["loss_mask"]
    with pytest.raises(RuntimeError, match="loss_mask: expected in SkyRL's batch"):
        trainer(config).compute_advantages_and_returns(batch)


def test_recipe():
    """As ``docs/hosts.md`` prints it: SkyRL's entry point makes our trainer, which has checked the configuration."""
    names = recipes.run("SkyRL")
    whole = configuration("tokcredit_mix", "tokcredit_mix", **ROWWISE)
    parts = dict.fromkeys(inspect.signature(BasePPOExp.get_trainer).parameters)
    del parts["self"]
    with pytest.raises(ValueError, match="loss_reduction: expected 'token_mean'"):
        names["CreditExp"].get_trainer(None, **{**parts, "cfg": whole})


def test_every_option_is_in_the_table():
    """An option that a later SkyRL adds fails here until docs/hosts.md says what it is."""
    table = (Path(__file__).parents[2] / "docs/hosts.md").read_text().split("\n### SkyRL\n")[1].split("\n### ")[0]
    config = AlgorithmConfig()
    inner = [x for f in fields(config) if is_dataclass(x := getattr(config, f.name))]
    names = {f.name for part in (config, *inner) for f in fields(part)} - {"type"}
    assert len(names) > 40 and not {name for name in names if not re.search(rf"\b{name}\b", table)}


def test_names_are_registered_once():
    with pytest.raises(ValueError, match="name: expected a new name, got 'tempo'"):
        adapter.register("tempo", tc.methods.tempo())


@pytest.mark.parametrize("inference_only", [False, True])
def test_the_output_layer(inference_only, tmp_path, monkeypatch):
    """The function of the documentation inside SkyRL's, which shifts, pads and scales around it."""
    from skyrl.backends.skyrl_train.distributed.megatron import model_utils

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        g = torch.Generator().manual_seed(0)
        leaves = [torch.randn(x, generator=g, requires_grad=True) for x in ((2, 6, 4), (9, 4))]
        tokens = torch.randint(0, 9, (2, 6), generator=g)

        def run():
            found = model_utils.from_parallel_hidden_to_logprobs(
                *leaves, tokens, 0, 9, torch.distributed.group.WORLD, inference_only, None, 4, 0.7
            )
            if inference_only:
                return [found.detach()]
            weights = torch.linspace(-1, 1, found.numel()).view_as(found)
            return [found.detach(), *torch.autograd.grad((found * weights).sum(), leaves)]

        expected = run()
        names = recipes.run("Another trainer's output layer")
        monkeypatch.setattr(model_utils, "_fused_lm_head_logprob_apply", names["skyrl"])
        for a, b in zip(run(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()
