"""Trust regions and rollout corrections against verl's own functions, values and gradients."""

import inspect
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import tokcredit as tc
import torch

pytest.importorskip("verl", reason="verl is not installed; make test-verl")

from verl.trainer.config.algorithm import AlgoConfig, RolloutCorrectionConfig
from verl.trainer.ppo import rollout_corr_helper as theirs
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

ROWS, WIDTH = 6, 9


def batch(seed=0):
    """Rows of different lengths, with holes in the mask; the engine differs from the trainer, and no row is empty."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, WIDTH + 1, (ROWS,), generator=g)
    mask = (torch.arange(WIDTH) < lengths[:, None]) & (torch.rand(ROWS, WIDTH, generator=g) > 0.2)
    mask[:, 0] = True
    old = -0.1 - torch.rand(ROWS, WIDTH, generator=g, dtype=torch.float64)
    engine = old + 0.3 * torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64)
    current = (old + 0.4 * torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64)).clamp(max=-0.01)
    rewards = torch.randn(ROWS, generator=g, dtype=torch.float64)
    rollouts = tc.Rollouts.from_padded(
        torch.zeros(ROWS, WIDTH, dtype=torch.long),
        mask,
        torch.zeros(ROWS, dtype=torch.long),
        rewards,
        old_log_probs=old,
        rollout_log_probs=engine.masked_fill(~mask, 0.0),
    )
    return rollouts, current


def gradient(loss, variable):
    return torch.autograd.grad(loss, variable)[0]


@pytest.mark.parametrize(
    ("mode", "objective", "settings", "policy_loss"),
    [
        ("geo_mean", tc.methods.gmpo(0.3, 0.2), {"clip_ratio_low": 0.3, "clip_ratio_high": 0.2}, {}),
        ("dro", tc.methods.dro(0.7), {}, {"dro_beta": 0.7}),
        (
            "dppo_tv",
            tc.mix(tc.methods.dppo_tv(0.05, 0.08, 1.2, to="old_log_probs"), aggregation="token_mean"),
            {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08, "clip_ratio_c": 1.2},
            {},
        ),
        (
            "dppo_kl",
            tc.mix(tc.methods.dppo_kl(0.01, 0.02, 1.2, to="old_log_probs"), aggregation="token_mean"),
            {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 1.2},
            {},
        ),
    ],
)
def test_gradients_of_losses(mode, objective, settings, policy_loss):
    rollouts, current = batch()
    mask = rollouts.shaped(rollouts.response_mask)
    prepared = objective.prepare(rollouts)
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=ROWS,
        policy_loss=PolicyLossConfig(loss_mode=mode, **policy_loss),
        loss_agg_mode="token-mean",
        **settings,
    )
    config.global_batch_info.update(dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=ROWS)
    ours, his = current.clone().requires_grad_(), current.clone().requires_grad_()
    expected, _ = get_policy_loss_fn(mode)(
        rollouts.shaped(rollouts.old_log_probs), his, prepared.advantages, mask.double(), "token-mean", config
    )
    found, wanted = gradient(objective.loss(prepared, ours).loss, ours), gradient(expected, his)
    # verl adds 1e-8 to numbers of tokens and to 1 - p.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    stopped = (wanted == 0) & mask & (prepared.advantages != 0)
    assert mode == "dro" or (0 < stopped.sum() < mask.sum())


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_gradients_of_losses_that_choose_tokens_by_covariance(mode):
    """verl takes the covariance of the current log-probs, so near to the old ones that the choice is equal."""
    rollouts, current = batch(2)
    mask, old = rollouts.shaped(rollouts.response_mask), rollouts.shaped(rollouts.old_log_probs)
    current = old + (current - old) / 200
    # All candidates of clip_cov are dropped: verl draws some, and so do we, but not the same ones.
    bounds = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 5.0}
    share = {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}
    chosen = {"clip_cov": tc.methods.clip_cov(0.2, 0.2, 1.0, 0.1, 5.0), "kl_cov": tc.methods.kl_cov(0.7, 0.2)}
    prepared = chosen[mode].prepare(rollouts)
    found = []
    for x in (old, current):
        recorded = rollouts.with_inputs(old_log_probs=x.reshape(-1))
        cov = tc.filters.covariance(recorded, prepared.credit)[rollouts.response_mask]
        count = int(0.2 * len(cov))
        found.append(cov > (0.1 if mode == "clip_cov" else cov.sort(descending=True).values[count]))
    assert torch.equal(*found) and 1 < found[0].sum() < len(cov) / 2
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=ROWS,
        policy_loss=PolicyLossConfig(loss_mode=mode, **(bounds if mode == "clip_cov" else share)),
        loss_agg_mode="token-mean",
    )
    config.global_batch_info.update(dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=ROWS)
    ours, his = current.clone().requires_grad_(), current.clone().requires_grad_()
    expected, _ = get_policy_loss_fn(mode)(old, his, prepared.advantages, mask.double(), "token-mean", config)
    value = chosen[mode].loss(prepared, ours).loss
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient(value, ours), gradient(expected, his), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("threshold", [1.1, "0.8_1.2"])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights(level, threshold, normalize):
    config = RolloutCorrectionConfig(
        rollout_is=level, rollout_is_threshold=threshold, rollout_is_batch_normalize=normalize
    )
    rollouts, _ = batch()
    mask = rollouts.shaped(rollouts.response_mask)
    y = rollouts.shaped(rollouts.old_log_probs - rollouts.rollout_log_probs)
    expected, _ = theirs.compute_rollout_correction_weights(y, mask.double(), level, threshold, normalize)
    (stage,) = tc.token_weights.from_verl(config)
    found = stage(rollouts, rollouts.rewards[:, None])
    found = found.expand(ROWS, WIDTH) if found.dim() == 2 else rollouts.shaped(found)
    torch.testing.assert_close(found[mask], expected.double()[mask], rtol=1e-6, atol=1e-8)
    assert len(set(found[mask].tolist())) > 3


@pytest.mark.parametrize(
    ("options", "thresholds"),
    [
        ("token_k1", "0.8_1.3"),
        ("token_k1", "1.25"),
        ("token_k2", "0.02"),
        ("token_k3", "0.03"),
        ("seq_sum_k1", "0.9_1.6"),
        ("seq_mean_k1", "0.95_1.2"),
        ("seq_sum_k2", "0.2"),
        ("seq_mean_k3", "0.05"),
        ("seq_max_k2", "0.1"),
        ("seq_max_k3", "0.1"),
        ("seq_mean_k1,token_k3", "0.9_1.2,0.05"),
        ("token_k2,token_k3", "0.03"),
    ],
)
def test_rejection(options, thresholds):
    rollouts, _ = batch(1)
    mask = rollouts.shaped(rollouts.response_mask)
    y = rollouts.shaped(rollouts.old_log_probs - rollouts.rollout_log_probs)
    expected, _ = theirs.compute_rollout_rejection_mask(y, mask.double(), options, thresholds)
    config = RolloutCorrectionConfig(rollout_rs=options, rollout_rs_threshold=thresholds)
    kept = mask
    for stage in tc.filters.from_verl(config):
        inside = stage(rollouts, rollouts.rewards[:, None])
        kept = kept & (inside if inside.dim() == 2 else rollouts.shaped(inside))
    assert torch.equal(kept, expected.bool()) and 0 < kept.sum() < mask.sum()


BOUNDS = {
    "rs_threshold": {"seq_mean_k1": "0.93_1.12", "seq_sum_k1": "0.6_1.6", "seq_mean_k3": 0.06},
    "is_threshold": 1.1,
    "threshold": 1.2,
    "threshold_lower": 0.8,
}
MORE = {
    "several": {"rollout_rs": "seq_mean_k1,token_k3", "rollout_rs_threshold": "0.9_1.2,0.05", "rollout_is": "token"},
    "normalized": {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.05, "rollout_is_batch_normalize": True},
    "normalized tokens": {
        "rollout_is": "token",
        "rollout_is_threshold": "0.7_1.4",
        "rollout_rs": "seq_max_k3",
        "rollout_rs_threshold": 0.15,
        "rollout_is_batch_normalize": True,
    },
    "bypassed tokens": {"bypass_mode": True, "rollout_rs": "token_k1,token_k2", "rollout_rs_threshold": "1.3,0.04"},
    "bypassed sums": {
        "bypass_mode": True,
        "loss_type": "reinforce",
        "rollout_is_threshold": "0.5_1.8",
        "rollout_rs": "seq_max_k2,seq_sum_k3",
        "rollout_rs_threshold": "0.25,0.6",
    },
}


def presets():
    """The configurations that verl has a name for, with bounds that bind in :func:`batch`, and some without a name."""
    for name, make in inspect.getmembers(RolloutCorrectionConfig, inspect.ismethod):
        if not name.startswith(("decoupled_", "bypass_")):
            continue
        given = set(inspect.signature(make).parameters)
        assert given <= BOUNDS.keys()
        settings = {x: BOUNDS[x] for x in given - {"rs_threshold"}}
        if "rs_threshold" in given:
            settings["rs_threshold"] = BOUNDS["rs_threshold"][make().rollout_rs]
        yield pytest.param(make(**settings), id=name)
    for name, settings in MORE.items():
        yield pytest.param(RolloutCorrectionConfig(**settings), id=name)


@pytest.mark.parametrize("config", list(presets()))
def test_rollout_correction(config):
    """Loss and gradient of verl's own functions, called as its trainer and its actor call them."""
    rollouts, current = batch(3)
    mask = rollouts.shaped(rollouts.response_mask)
    old, engine = (rollouts.shaped(x) for x in (rollouts.old_log_probs, rollouts.rollout_log_probs))
    current = (current + old) / 2  # not much further from the engine than the old policy
    base = tc.mix("grpo", clip=tc.clip.ppo(0.1, 0.2, 3.0), aggregation="token_mean")
    objective = tc.rollout_correction.from_verl(base, config)
    prepared = objective.prepare(rollouts.with_inputs(old_log_probs=None) if config.bypass_mode else rollouts)
    bypass = {"loss_mode": "bypass_mode", "rollout_correction": config} if config.bypass_mode else {}
    actor = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=ROWS,
        policy_loss=PolicyLossConfig(**bypass),
        loss_agg_mode="token-mean",
        clip_ratio_low=0.1,
        clip_ratio_high=0.2,
    )
    kept, weights = mask.double(), None
    if not config.bypass_mode:
        names = (
            "rollout_is",
            "rollout_is_threshold",
            "rollout_is_batch_normalize",
            "rollout_rs",
            "rollout_rs_threshold",
        )
        found, kept, _ = theirs.compute_rollout_correction_and_rejection_mask(
            old, engine, kept, **{name: getattr(config, name) for name in names}
        )
        weights = None if found is None else found.batch["rollout_is_weights"]
    actor.global_batch_info.update(dp_size=1, batch_num_tokens=int(kept.sum()), global_batch_size=ROWS)
    loss = get_policy_loss_fn("bypass_mode" if config.bypass_mode else "vanilla")
    ours, his = current.clone().requires_grad_(), current.clone().requires_grad_()
    value = objective.loss(prepared, ours).loss
    divisor = engine if config.bypass_mode else old
    expected, metrics = loss(divisor, his, prepared.advantages, kept, "token-mean", actor, weights)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    slopes, wanted = gradient(value, ours), gradient(expected, his)
    torch.testing.assert_close(slopes, wanted, rtol=1e-6, atol=1e-9)
    assert wanted.any()
    if config.rollout_rs:
        rejected = (
            metrics["rollout_corr/rollout_rs_masked_fraction"] if config.bypass_mode else 1 - kept.sum() / mask.sum()
        )
        assert 0 < rejected < 1, "bounds that never bind prove nothing"


def test_every_option_is_in_the_table():
    """An option that a later verl adds fails here until docs/hosts.md says what it is."""
    text = (Path(__file__).parents[2] / "docs/hosts.md").read_text()
    table = "".join(text.split(f"\n{mark} verl\n")[1].split(f"\n{mark} ")[0] for mark in ("##", "###"))
    configs = (PolicyLossConfig, ActorConfig, RolloutCorrectionConfig, AlgoConfig)
    named = {f.name for config in configs for f in fields(config)}
    assert len(named) > 50 and not {x for x in named - {"_target_"} if not re.search(rf"\b{x}\b", table)}


def test_statistics():
    rollouts, _ = batch()
    mask = rollouts.shaped(rollouts.response_mask)
    old, engine = (rollouts.shaped(x) for x in (rollouts.old_log_probs, rollouts.rollout_log_probs))
    expected = theirs.compute_offpolicy_metrics(old, engine, mask.double())
    found = tc.mismatch.statistics(rollouts.old_log_probs, rollouts.rollout_log_probs, rollouts.spans)
    for name, x in found.items():
        assert x.item() == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    assert found["kl"] != 0 and math.isfinite(found["chi2_seq"])
