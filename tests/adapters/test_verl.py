"""Against verl's own estimators and losses, on its own batches, in this process and in Ray actors."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import tokcredit as tc
import torch

pytest.importorskip("verl", reason="verl is not installed; make test-verl")
sys.path.insert(0, str(Path(__file__).parent))

import dumps
import ray
import recipes
import transfer_queue as tq
import verl_batch as vb
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict
from tokcredit.adapters import verl as adapter
from tokcredit.adapters import verl_trainer
from tokcredit.adapters.capabilities import policy_methods
from tokcredit.methods.hapo import widened

SEQUENCES = "seq-mean-token-mean"
ROWS = vb.batch()
ALGORITHM = OmegaConf.create({"norm_adv_by_std_in_grpo": True})
# verl's defaults of the clip, which its configuration must keep where ours decides.
adapter.register(
    "as_vanilla", lambda: tc.Objective(clip=tc.clip.ppo(0.2, 0.2, 3.0), aggregation=tc.aggregation.token_mean())
)
adapter.register("as_vanilla_rows", lambda: tc.methods.grpo(cap=3.0))
adapter.register("as_vanilla_sum", lambda: replace(tc.methods.dr_grpo(), clip=tc.clip.ppo(0.2, 0.2, 3.0)))
adapter.register("as_gspo", lambda: tc.methods.gspo(0.2, 0.2))
adapter.register("as_cispo", lambda: tc.methods.cispo(0.2, 0.2))
adapter.register(
    "as_dppo_tv",
    lambda: tc.mix("dapo", clip=tc.clip.gated(on="probability", low=-0.05, high=0.08, cap=math.log(3.0))),
)
adapter.register(
    "as_dppo_kl",
    lambda: tc.mix("dapo", clip=tc.clip.gated(on="binary_kl", low=-0.05, high=0.08, cap=math.log(3.0))),
)
adapter.register("as_gpg", lambda: tc.mix("dapo", ratio="one()", clip="gated()"))
# verl's settings of the losses that have other bounds than its defaults.
BOUNDS = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08}
THEIRS = {"as_dppo_tv": BOUNDS, "as_dppo_kl": BOUNDS}
UNBOUNDED = ("sapo", "as_gpg")
LOSSES = {
    "as_dppo_tv": ("dppo_tv", "token-mean"),
    "as_dppo_kl": ("dppo_kl", "token-mean"),
    "as_gpg": ("gpg", "token-mean"),
    "as_vanilla": ("vanilla", "token-mean"),
    "as_vanilla_rows": ("vanilla", SEQUENCES),
    "as_vanilla_sum": ("vanilla", "seq-mean-token-sum-norm"),
    "as_gspo": ("gspo", SEQUENCES),
    "as_cispo": ("cispo", "token-mean"),
    "sapo": ("sapo", SEQUENCES),
}


def estimated(name, rows=ROWS, **settings):
    config = OmegaConf.merge(ALGORITHM, {"tokcredit": settings}) if settings else ALGORITHM
    with adapter.rollouts(vb.fields(rows)):
        return vb.advantages(rows, f"tokcredit_{name}", config)


@pytest.mark.parametrize(
    ("ours", "settings", "theirs", "std"),
    [
        ("grpo", {}, "grpo", True),
        ("grpo", {"scale": False}, "grpo", False),
        ("dr_grpo", {}, "grpo", False),
        ("grpo", {}, "grpo_vectorized", True),
        ("rloo", {}, "rloo", True),
    ],
)
def test_estimators_equal_verl(ours, settings, theirs, std):
    """Shuffled and incomplete groups, tool tokens and padding rows."""
    expected = vb.advantages(ROWS, theirs, ALGORITHM, std)
    assert (expected > 0).any() and (expected < 0).any()
    torch.testing.assert_close(estimated(ours, **settings), expected, rtol=1e-5, atol=1e-6)


def test_rows_without_a_chosen_token():
    """verl counts them in their group, as ``count_empty`` does."""
    counting = tc.credit.group_normalized(count_empty=True)
    adapter.register("counting_empty", lambda: tc.Objective(counting))
    empty = next(i for i, row in enumerate(ROWS) if row["uid"] == "p1")
    rows = list(ROWS)
    rows[empty] = {**rows[empty], "response_mask": torch.zeros_like(rows[empty]["response_mask"])}
    expected = vb.advantages(rows, "grpo", ALGORITHM)
    torch.testing.assert_close(estimated("counting_empty", rows), expected, rtol=1e-5, atol=1e-6)
    group = torch.tensor([row["uid"] == "p1" for row in rows])
    assert ((estimated("grpo", rows) - expected).abs()[group].amax(1) > 0.01).sum() == 2


def test_optimal_token_baseline_equals_verl():
    """On rows without tool tokens; verl ends a row at its count of chosen tokens."""
    rows = [row | {"response_mask": torch.ones_like(row["response_mask"])} for row in ROWS if row["uid"] != "pad9"]
    rows += [row for row in ROWS if row["uid"] == "pad9"]
    expected = vb.advantages(rows, "optimal_token_baseline", ALGORITHM)
    assert (expected > 0).any() and (expected < 0).any()
    assert (expected.std(1) > 0.05).any(), "tokens of a row have equal advantages"
    torch.testing.assert_close(estimated("otb", rows), expected, rtol=1e-5, atol=1e-6)


def test_credit_of_the_tree():
    advantages = estimated("tempo")
    fields, names = vb.fields(ROWS), sorted({row["uid"] for row in ROWS})
    groups = torch.tensor([names.index(row["uid"]) for row in ROWS])
    rewards = torch.stack([row["rm_scores"].sum() for row in ROWS])
    mask = vb.padded(ROWS, "response_mask")
    data = tc.Rollouts.from_padded(fields["responses"], mask, groups, rewards, fields["attention_mask"])
    torch.testing.assert_close(advantages, tc.methods.tempo().prepare(data).advantages)
    assert (advantages != vb.advantages(ROWS, "grpo", ALGORITHM))[mask.bool()].any(), "no advantage of a branch"
    assert (advantages[~mask.bool()] == 0).all()


def test_padding_rows_change_nothing():
    real = [row for row in ROWS if not row["uid"].startswith("pad")]
    kept = torch.tensor([not row["uid"].startswith("pad") for row in ROWS])
    torch.testing.assert_close(estimated("tempo")[kept], estimated("tempo", real))


def test_multiplying_weights_are_part_of_the_advantage():
    adapter.register("weighted", lambda: tc.Objective(token_weights=(tc.token_weights.importance(high=1.1),)))
    plain, weighted = estimated("grpo"), estimated("weighted")
    fields = vb.fields(ROWS)
    ratio = (fields["old_log_probs"] - fields["rollout_log_probs"]).exp().clamp(max=1.1)
    torch.testing.assert_close(weighted, plain * ratio, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weighted, plain)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dp_size", [1, 2])
def test_losses_equal_verl(name, dp_size):
    """Value and gradient, with and without rollout correction; micro-batches add up to the mini-batch."""
    theirs, mode = LOSSES[name]
    scale = {"loss_scale_factor": 12} if mode.endswith("norm") else {}
    advantages = estimated("tempo")
    weights = 0.5 + torch.rand(advantages.shape, generator=torch.Generator().manual_seed(2))
    ours = vb.actor(f"tokcredit_{name}", mode, **scale)
    for correction in (None, weights):
        host = vb.actor(theirs, mode, **scale, **THEIRS.get(name, {}))
        expected = vb.loss(ROWS, advantages, host, dp_size=dp_size, weights=correction)
        value, gradient, metrics = vb.loss(ROWS, advantages, ours, dp_size=dp_size, weights=correction)
        assert gradient.abs().sum() > 0.1
        assert value == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-7)
        assert name in UNBOUNDED or metrics["actor/pg_clipfrac"] > 0, "nothing was clipped"
        if name in ("as_vanilla", "as_cispo"):
            assert metrics["actor/pg_clipfrac"] == pytest.approx(expected[2]["actor/pg_clipfrac"], rel=1e-5)
        parts = [list(range(i, min(i + 5, len(ROWS)))) for i in range(0, len(ROWS), 5)]
        cut = vb.loss(ROWS, advantages, ours, parts, dp_size=dp_size, weights=correction)
        assert cut[0] == pytest.approx(value, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(cut[1], gradient, rtol=1e-5, atol=1e-7)


def test_loss_without_counts():
    advantages = estimated("grpo")
    expected = vb.loss(ROWS, advantages, vb.actor("vanilla"), counted=False)
    value, gradient, _ = vb.loss(ROWS, advantages, vb.actor("tokcredit_as_vanilla"), counted=False)
    assert value == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="batch_num_tokens: expected the number over all ranks"):
        vb.loss(ROWS, advantages, vb.actor("tokcredit_as_vanilla"), counted=False, dp_size=2)


def test_padding_alone():
    """A micro-batch of padding rows has no loss, and a gradient of zero."""
    rows = [row for row in ROWS if row["uid"].startswith("pad")]
    value, gradient, _ = vb.loss(rows, torch.zeros(3, 1), vb.actor("tokcredit_ctpo"), counted=False)
    assert value == 0.0 and torch.equal(gradient, torch.zeros_like(gradient))


@dataclass(frozen=True)
class minus_one(tc.token_weights.TokenWeight):
    def __call__(self, batch, advantages):
        return -torch.ones(batch.num_rows, 1)


@dataclass(frozen=True)
class from_hidden_states(tc.credit.Credit):
    reads: ClassVar[frozenset[str]] = frozenset({"hidden_states"})


MIXED = tc.credit.sum(tc.credit.group_normalized(), tc.credit.leave_one_out(), tc.schedule.linear(0.0, 1.0))
adapter.register("filtered", lambda: tc.mix("grpo", filters="improbable(0.5)"))
adapter.register("uncarried", lambda: tc.Objective(credit=from_hidden_states()))
adapter.register("penalized", lambda: tc.Objective(terms=(tc.term.kl(estimator="k3"),)))
adapter.register("negative", lambda: tc.Objective(token_weights=(minus_one(),)))
adapter.register("widened", lambda: tc.Objective(clip=widened(tc.token_score.given("entropies"))))
adapter.register(
    "scheduled", lambda: tc.Objective(credit=MIXED, clip=tc.clip.growing(tc.schedule.linear(0.1, 0.2), 0.2))
)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("filtered", {}, "expected no filters"),
        ("negative", {}, "token weights of at least 0"),
        ("pods", {}, "expected no filters"),
        ("scheduled", {}, "expected constant settings, .* progress of training, got linear"),
        ("uncarried", {}, "credit stage .* requires hidden_states"),
        ("otb", {"by_turn": True}, "credit stage .* requires turn_rewards"),
        ("tempo", {"clip_high": 0.3}, "algorithm.tokcredit: expected the clip of tokcredit_tempo"),
    ],
)
def test_estimators_refuse(name, settings, message):
    with pytest.raises(ValueError, match=message):
        estimated(name, **settings)


def test_estimators_need_token_ids():
    with pytest.raises(RuntimeError, match=r"trainer\.v1\.trainer_mode=tokcredit_sync"):
        vb.advantages(ROWS, "tokcredit_grpo", ALGORITHM)


@pytest.mark.parametrize(
    ("mode", "settings", "message"),
    [
        ("tokcredit_grpo", {}, "loss_agg_mode: expected 'seq-mean-token-mean'"),
        ("tokcredit_ba", {}, "aggregation stage without group statistics"),
        (
            "tokcredit_widened",
            {"loss_agg_mode": SEQUENCES},
            "clip stage that reads no more inputs than the policy loss of verl",
        ),
        (
            "tokcredit_scheduled",
            {"loss_agg_mode": SEQUENCES},
            "expected constant settings, .* progress of training, got linear",
        ),
        ("tokcredit_ctpo", {"clip_ratio_high": 0.28}, "clip_ratio_high: expected verl's default 0.2"),
        (
            "tokcredit_penalized",
            {"loss_agg_mode": SEQUENCES},
            r"expected no terms, because verl adds its own \(use_kl_loss for KL\)",
        ),
        (
            "tokcredit_dr_grpo",
            {"loss_agg_mode": "seq-mean-token-sum-norm"},
            "loss_scale_factor: expected the number of tokens of the longest",
        ),
        (
            "tokcredit_dr_grpo",
            {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 11.5},
            r"loss_scale_factor: expected the number of tokens .* got 11\.5",
        ),
    ],
)
def test_losses_refuse(mode, settings, message):
    with pytest.raises(ValueError, match=message):
        vb.loss(ROWS, torch.zeros(len(ROWS), 8), vb.actor(mode, **settings))


def test_recipe():
    """As ``docs/hosts.md`` prints it: the loss has the wider bound, the estimator is that of the method."""
    recipes.run("verl")
    part = adapter.policy_loss("tokcredit_wide", "token-mean", vb.actor("tokcredit_wide"))
    assert part.clip == tc.methods.ctpo(clip_high=0.1).clip != tc.methods.ctpo().clip
    torch.testing.assert_close(estimated("wide"), estimated("ctpo"))


def test_names_are_registered_once():
    with pytest.raises(ValueError, match="name: expected a new name, got 'tempo'"):
        adapter.register("tempo", tc.methods.tempo)


def configuration(*overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            [
                "trainer.v1.trainer_mode=tokcredit_sync",
                "algorithm.adv_estimator=tokcredit_tempo",
                "actor_rollout_ref.actor.policy_loss.loss_mode=tokcredit_ctpo",
                *overrides,
            ],
        )


def test_configuration_is_checked_before_anything_starts():
    assert verl_trainer.checked(configuration()).credit == tc.methods.tempo().credit
    summed = ("algorithm.adv_estimator=tokcredit_mt_grpo", "+algorithm.tokcredit_rows.reward_rule=sum")
    assert verl_trainer.checked(configuration(*summed)).credit == tc.methods.mt_grpo().credit
    scaled = verl_trainer.checked(configuration("+algorithm.tokcredit.scale=false"))
    assert scaled.credit == tc.methods.tempo(scale=False).credit
    plain = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.policy_loss.loss_mode=vanilla")
    assert verl_trainer.checked(configuration(*plain)) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla", "loss_mode: expected one of tokcredit's"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=tokcredit_cpo", "name: expected one of"),
        ("algorithm.adv_estimator=tokcredit_temp", "name: expected one of"),
        ("algorithm.adv_estimator=tokcredit_uncarried", "credit stage .* requires hidden_states"),
        ("algorithm.adv_estimator=tokcredit_mt_grpo", "credit stage .* requires token_rewards"),
        ("algorithm.adv_estimator=tokcredit_otb", "credit stage .* requires squared_probs"),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean", "loss_agg_mode: expected 'token-mean'"),
        (
            "+algorithm.tokcredit_rows.reward_rule=mean",
            "reward_rule: expected one of same, last, split, sum, got 'mean'",
        ),
        ("+algorithm.tokcredit_rows.field=x", "tokcredit_rows: expected trajectory_field or reward_rule, got field"),
        ("actor_rollout_ref.actor.clip_ratio_c=10.0", "clip_ratio_c: expected verl's default"),
        ("+algorithm.tokcredit.clip_low=0.1", "algorithm.tokcredit: expected the clip of"),
        (
            "algorithm.rollout_correction={bypass_mode: true, rollout_rs: token_k1}",
            "rollout_rs: expected null with bypass_mode, .* got 'token_k1'",
        ),
    ],
)
def test_trainers_refuse(override, message):
    config = configuration(override)
    with pytest.raises(ValueError, match=message):
        verl_trainer.CreditSync(config)


def test_example_is_a_configuration_that_verl_takes():
    """The command as shipped, its job printed by verl itself and checked as the trainer would."""
    script = Path(__file__).parents[2] / "examples/verl/tempo_ctpo.sh"
    run = subprocess.run(
        ["bash", script, "--cfg", "job"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    config = OmegaConf.create(run.stdout[run.stdout.index("actor_rollout_ref:") :])
    assert config.trainer.v1.trainer_mode == "tokcredit_sync"
    assert verl_trainer.checked(config).credit == tc.methods.tempo().credit


def test_info_names_what_verl_knows():
    known = adapter.registered()
    for kind in ("estimators", "policy losses"):
        assert {f"tokcredit_{name}" for name in policy_methods()} <= set(known[kind].split(", "))
    assert known["trainers"] == "tokcredit_colocate_async, tokcredit_separate_async, tokcredit_sync"


@pytest.mark.parametrize("missing", [None, "transfer_queue", "verl.trainer"])
def test_info_shows_what_verl_hides(missing):
    hide = f"sys.modules[{missing!r}] = None; " if missing else ""
    code = f"import sys; {hide}from tokcredit.cli import info; info()"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    lines = dict(line.split("  ", 1) for line in run.stdout.splitlines() if line.startswith("verl "))
    if missing == "verl.trainer":
        assert "failed to load" in lines["verl plugins"]
        return
    assert "tokcredit_tempo" in lines["verl estimators"] and "tokcredit_tempo" in lines["verl policy losses"]
    if missing:
        assert "failed to load" in lines["verl tokcredit_trainer"] and "failed to load" in lines["verl trainers"]
    else:
        assert "tokcredit_sync" in lines["verl trainers"]


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
    )
    yield
    tq.close()
    ray.shutdown()


@ray.remote(num_cpus=1)
class Worker:
    """Imports verl and nothing else, as verl's own actors do."""

    def advantages(self, rows, name):
        import verl_batch
        from verl.trainer.ppo.core_algos import get_adv_estimator_fn

        rollouts = get_adv_estimator_fn(name).func.__globals__["rollouts"]
        with rollouts(verl_batch.fields(rows)):
            return verl_batch.advantages(rows, name, {"norm_adv_by_std_in_grpo": True})

    def loss(self, rows, advantages, mode, loss_agg_mode):
        import verl_batch

        return verl_batch.loss(rows, advantages, verl_batch.actor(mode, loss_agg_mode))


def test_inside_ray_actors(local_ray):
    worker = Worker.remote()
    for name in ("tokcredit_tempo", "tokcredit_grpo"):
        advantages = ray.get(worker.advantages.remote(ROWS, name))
        torch.testing.assert_close(advantages, estimated(name.removeprefix("tokcredit_")), rtol=0, atol=0)
    for name, mode in (("tokcredit_ctpo", "token-mean"), ("tokcredit_gspo", SEQUENCES)):
        value, gradient, metrics = ray.get(worker.loss.remote(ROWS, advantages, name, mode))
        expected = vb.loss(ROWS, advantages, vb.actor(name, mode))
        assert (value, metrics) == (expected[0], expected[2]) and value != 0
        assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("name", dumps.DUMPS)
def test_dumps_that_reports_read(local_ray, tmp_path, name):
    """``tests/report`` reads what this version of verl writes; the group of a padding row has a random name."""
    written, kept = (
        [json.loads(re.sub(r'"pad\w+"', '"pad"', line)) for line in file.read_text().splitlines()]
        for file in (dumps.DUMPS[name](tmp_path), dumps.FILES / name)
    )
    assert written == kept


@pytest.fixture(scope="module")
def queue(local_ray):
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))


def through_the_queue(rows, partition, *overrides):
    """Advantages that the trainer's own ``_compute_advantage`` writes into verl's real queue."""
    keys = [row["key"] for row in rows]
    fields = vb.tensordict(rows)
    for name in {"uid", "step_ids"} & rows[0].keys():
        fields[name] = [row[name] for row in rows]
    tq.kv_batch_put(keys=keys, partition_id=partition, fields=fields, tags=[{} for _ in keys])
    meta = tq.KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id=partition)
    config = configuration(*overrides)
    trainer = object.__new__(verl_trainer.CreditSync)
    trainer.config, trainer.objective = config, verl_trainer.checked(config)
    with open_dict(config):
        config.algorithm.rollout_correction = None
    trainer._compute_advantage(meta, {})
    out = tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=["advantages", "response_mask"])
    assert adapter._ROLLOUTS.get() is None
    return out["advantages"].to_padded_tensor(0)


def test_trainer_with_its_queue(queue):
    torch.testing.assert_close(through_the_queue(ROWS, "train"), estimated("tempo"), rtol=0, atol=0)


LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode=tokcredit_as_vanilla"


@pytest.mark.parametrize("field", [None, "step_ids"])
def test_sessions_of_several_rows_in_the_queue(queue, field):
    """Cut anywhere, and in any order where verl numbers the rows, a session has the advantages of the whole one."""
    rows, origins = vb.cut(ROWS, shuffled=field is None)
    overrides = [LOSS, "algorithm.adv_estimator=tokcredit_rloo"]
    if field is not None:
        rows = [row | {"step_ids": row["key"].rsplit("_", 1)[0], "key": f"x{i}_0_0"} for i, row in enumerate(rows)]
        overrides.append(f"+algorithm.tokcredit_rows.trajectory_field={field}")
    found = through_the_queue(rows, f"cut_{field}", *overrides)
    whole = estimated("rloo")
    assert (found != 0).any()
    for advantages, row, (i, first) in zip(found, rows, origins, strict=True):
        n = len(row["responses"])
        torch.testing.assert_close(advantages[:n], whole[i, first : first + n])


def test_losses_that_sessions_of_several_rows_cannot_have(queue):
    rows, _ = vb.cut(ROWS)
    estimator = "algorithm.adv_estimator=tokcredit_rloo"
    with pytest.raises(ValueError, match=r"expected a loss of single tokens, because verl passes the rows .* one by"):
        through_the_queue(rows, "cumulative", estimator)
    mode = "actor_rollout_ref.actor.policy_loss.loss_mode=tokcredit_grpo"
    with pytest.raises(ValueError, match=r"expected an aggregation stage over tokens, because verl averages over rows"):
        through_the_queue(rows, "means", estimator, mode, f"actor_rollout_ref.actor.loss_agg_mode={SEQUENCES}")


def of_rows(rows, name, rule="same", **settings):
    """Advantages of rows whose keys verl made."""
    config = OmegaConf.merge(ALGORITHM, {"tokcredit": settings, "tokcredit_rows": {"reward_rule": rule}})
    keys = [row["key"].rsplit("_", 1) for row in rows]
    with adapter.rollouts(vb.fields(rows), [key[0] for key in keys], [int(key[1]) for key in keys]):
        return vb.advantages(rows, f"tokcredit_{name}", config)


RETURNS = tc.Objective(tc.credit.returns(discount=0.5))


def test_rewards_of_rows_that_are_summed():
    """A reward in each row is one of a turn: it reaches the turns before it, and not those after it."""
    rows, origins = vb.cut([row for row in ROWS if row["uid"] == "p1"])
    for row in rows:
        row["rm_scores"] = torch.zeros(len(row["responses"]))
        row["rm_scores"][-1] = float(int(row["key"].rsplit("_", 1)[1]) + len(row["responses"]))
    adapter.register("returns", lambda: RETURNS)
    found = of_rows(rows, "returns", "sum")
    by_session = {}
    for i, row in enumerate(rows):
        by_session.setdefault(row["key"].rsplit("_", 1)[0], []).append(i)
    order = []
    for members in by_session.values():
        members.sort(key=lambda i: origins[i][1])
        order += members
    scores = []
    for i in order:
        mask = rows[i]["response_mask"].bool()
        of_tokens = torch.zeros(len(mask))
        of_tokens[mask.nonzero()[-1] if mask.any() else 0] = rows[i]["rm_scores"][-1]
        scores.append(of_tokens)
    assert all(rows[i]["response_mask"].any() for i in order)
    lengths = torch.tensor([len(rows[i]["responses"]) for i in order])
    batch = tc.Rollouts(
        torch.cat([rows[i]["responses"] for i in order]),
        torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        torch.zeros(len(order), dtype=torch.long),
        None,
        torch.cat([rows[i]["response_mask"] for i in order]).bool(),
        trajectory_ids=torch.tensor([k for k, members in enumerate(by_session.values()) for _ in members]),
        token_rewards=torch.cat(scores),
    )
    expected = RETURNS.prepare(batch).advantages.split(lengths.tolist())
    for i, advantages in zip(order, expected, strict=True):
        torch.testing.assert_close(found[i, : len(advantages)], advantages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rm_scores": torch.tensor([9.0])},
            r"token_level_rewards: expected the same reward \(reward_rule 'same'\) in",
        ),
        ({"uid": "p3"}, r"uid: expected one group in all rows of session '.*', got '.*' in row \d+ beside '.*' in row"),
        ({"key": None}, r"index: expected another number in each row of session '.*', got 0 in rows \d+ and \d+"),
    ],
)
def test_sessions_that_contradict_themselves(change, message):
    rows, _ = vb.cut(ROWS)
    i = next(i for i, row in enumerate(rows) if row["uid"] == "p1" and not row["key"].endswith("_0"))
    key = rows[i]["key"].rsplit("_", 1)[0] + "_0"
    other = {name: key if x is None else x for name, x in change.items()}
    if "rm_scores" in other:
        other["rm_scores"] = torch.nn.functional.pad(other["rm_scores"], (len(rows[i]["responses"]) - 1, 0))
    rows[i] |= other
    with pytest.raises(ValueError, match=message):
        of_rows(rows, "rloo")
