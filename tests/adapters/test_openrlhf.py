"""OpenRLHF's own experience maker and actor trainer, built as it builds them, with an objective installed."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tokcredit as tc
import torch

pytest.importorskip("openrlhf", reason="OpenRLHF is not installed; make test-others")
sys.path.insert(0, str(Path(__file__).parent))

import absent
import recipes
import rows as rr

absent.pretend("datasets", "deepspeed", "flash_attn", "pandas", "vllm")

from openrlhf.models import PolicyLoss
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray import ppo_actor
from openrlhf.utils.loss_utils import iter_grad_accum_global_norm
from tokcredit.adapters import openrlhf as adapter

# OpenRLHF takes the rows of a prompt to follow each other.
ROWS = sorted(rr.batch(), key=lambda row: row["group"])
TEMPO_CTPO = replace(tc.methods.ctpo(), credit=tc.methods.tempo().credit)


def arguments(estimator="dr_grpo", **settings):
    """The part of OpenRLHF's arguments that is read here, with its defaults."""
    given = {
        "algo.advantage.estimator": estimator,
        "algo.advantage.gamma": 1.0,
        "algo.advantage.lambd": 1.0,
        "algo.advantage.no_std_norm": False,
        "algo.advantage.is_correction_level": "off",
        "algo.advantage.is_correction_mode": "mask",
        "algo.advantage.is_correction_gating": "ratio",
        "algo.advantage.is_correction_threshold": [0.5, 5.0],
        "algo.kl.use_loss": False,
        "algo.kl.init_coef": 0.0,
        "algo.kl.target": None,
        "rollout.n_samples_per_prompt": rr.SIZE,
        "rollout.micro_batch_size": 5,
        "reward.clip_range": (-10, 10),
        "reward.overlong_buffer_len": None,
        "reward.stop_properly_penalty_coef": None,
        "logger.wandb.key": None,
        "logger.tensorboard_dir": None,
        "ckpt.best_metric_key": "",
        "train.dynamic_batch_enable": False,
        "train.max_epochs": 1,
        "train.colocate_all": False,
        "train.async_enable": False,
        "actor.eps_clip_low_high": (0.2, 0.2),
        "actor.dual_clip": None,
        "actor.loss_agg_mode": "token-mean",
        "actor.policy_loss_type": "ppo",
        "actor.aux_loss_coef": 0.0,
        "actor.entropy_coef": None,
        "ds.packing_samples": False,
        "vllm.sync_backend": "gloo",
    }
    root = SimpleNamespace()
    for path, value in {**given, **settings}.items():
        *parents, name = path.split(".")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                setattr(node, parent, SimpleNamespace())
            node = getattr(node, parent)
        setattr(node, name, value)
    return root


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(ppo_trainer, "RemoteExperienceMaker", RemoteExperienceMaker)
    monkeypatch.setattr(ppo_actor, "PolicyLoss", PolicyLoss)
    # The two parts of the actor's trainer that ask for a GPU when they are made.
    monkeypatch.setattr(ppo_actor, "NaiveReplayBuffer", MagicMock())
    monkeypatch.setattr(ppo_actor, "torch_dist_barrier_and_cuda_sync", MagicMock())


def maker(args, reference=None):
    """The experience maker that OpenRLHF's trainer makes."""
    strategy = SimpleNamespace(args=args)
    trainer = ppo_trainer.BasePPOTrainer(strategy, None, None, None, reference, None, SimpleNamespace(pad_token_id=0))
    return trainer.experience_maker


def actor_loss(args):
    """The loss that OpenRLHF's actor makes."""
    return ppo_actor.ActorPPOTrainer(SimpleNamespace(args=args), None, None, None, None).actor_loss_fn


def experiences(args):
    """Rows as OpenRLHF's rollouts have them, in its micro-batches."""
    samples = []
    for row in ROWS:
        before, size = len(row["prompt"]) - 1, len(row["prompt"]) + len(row["response"])

        def actions(x, before=before):
            return torch.cat([torch.zeros(before, dtype=x.dtype), x])[None]

        sample = Experience(
            sequences=torch.cat([row["prompt"], row["response"]])[None],
            attention_mask=torch.ones(1, size, dtype=torch.long),
            action_mask=actions(row["mask"].long()),
            action_log_probs=actions(row["old_log_probs"]),
            rollout_log_probs=actions(row["rollout_log_probs"]),
            rewards=torch.tensor([row["reward"]]),
            kl=torch.zeros(1, size - 1),
        )
        samples.append(sample)
    return maker(args).split_rollout_samples(samples)


def packed(xs):
    """What belongs to the responses, from each micro-batch's ``(B, A)``."""
    rows = [row for x in xs for row in x]
    out = []
    for x, row in zip(rows, ROWS, strict=True):
        first = len(row["prompt"]) - 1
        out.append(x[first : first + len(row["response"])])
    return torch.cat(out)


def with_advantages(args):
    return maker(args).compute_advantages_and_returns(experiences(args))


def trained(args, accumulated=2):
    """Loss and gradient of optimizer steps of several micro-batches, as OpenRLHF's actor and DeepSpeed make them."""
    loss_fn, total, gradients, first = actor_loss(args), 0.0, [], 0
    steps = iter_grad_accum_global_norm(with_advantages(args), SimpleNamespace(), accumulated, lambda e: e.action_mask)
    for experience, info in steps:
        mine = ROWS[first : first + len(experience.index)]
        first += len(mine)
        before = [torch.zeros(len(row["prompt"]) - 1) for row in mine]
        current = rr.right(
            [torch.cat([zeros, row["log_probs"]]) for zeros, row in zip(before, mine, strict=True)],
            experience.action_mask.shape[1],
        ).requires_grad_()
        loss, clipped, drift, *_ = loss_fn(
            current,
            experience.action_log_probs,
            experience.advantages,
            action_mask=experience.action_mask,
            rollout_log_probs=experience.rollout_log_probs,
            **info,
        )
        (loss / accumulated).backward()
        total += loss.item() / accumulated
        gradients.append(current.grad)
    return total, packed(gradients), (clipped.item(), drift.item())


def test_advantages_are_those_of_the_method():
    adapter.install(TEMPO_CTPO)
    out = with_advantages(arguments())
    torch.testing.assert_close(packed([x.advantages for x in out]), rr.expected(TEMPO_CTPO, ROWS)[0])
    assert all((x.advantages[x.action_mask == 0] == 0).all() for x in out)


@pytest.mark.parametrize(("ours", "theirs"), [("grpo", "group_norm"), ("rloo", "rloo"), ("dr_grpo", "dr_grpo")])
def test_advantages_equal_openrlhf(ours, theirs):
    """Except at tokens of tools, to which OpenRLHF gives advantages that it does not train."""
    expected = packed([x.advantages for x in with_advantages(arguments(theirs))]) * torch.cat(
        [row["mask"] for row in ROWS]
    )
    assert (expected > 0).any() and (expected < 0).any()
    objective = tc.Objective(credit=tc.methods.load(ours).credit)
    adapter.install(objective)
    found = packed([x.advantages for x in with_advantages(arguments())])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", [TEMPO_CTPO, tc.methods.grpo()], ids=["tempo_ctpo", "grpo"])
def test_training_equals_the_objective(objective):
    """Micro-batches of 5, 5, 5 and 1 rows add up to the whole."""
    adapter.install(objective)
    mode = "token-mean" if objective is TEMPO_CTPO else "seq-mean-token-mean"
    _, loss, gradient = rr.expected(objective, ROWS)
    value, theirs, _ = trained(arguments(**{"actor.loss_agg_mode": mode}), accumulated=4)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(theirs, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_losses_equal_openrlhf(mode, accumulated):
    args = arguments(**{"actor.loss_agg_mode": mode})
    expected = trained(args, accumulated)
    assert expected[1].abs().sum() > 0.1 and expected[2][0] > 0
    mean = tc.aggregation.token_mean() if mode == "token-mean" else tc.aggregation.sequence_mean()
    adapter.install(tc.Objective(credit=tc.methods.dr_grpo().credit, clip=tc.clip.ppo(0.2, 0.2), aggregation=mean))
    value, gradient, metrics = trained(args, accumulated)
    assert value == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-7)
    assert metrics == pytest.approx(expected[2], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (TEMPO_CTPO, {"actor.eps_clip_low_high": (0.2, 0.3)}, r"actor.eps_clip_low_high: expected OpenRLHF's default"),
        (TEMPO_CTPO, {"actor.policy_loss_type": "gspo"}, "actor.policy_loss_type: expected OpenRLHF's default 'ppo'"),
        (
            TEMPO_CTPO,
            {"algo.advantage.is_correction_level": "token"},
            "is_correction_level: expected OpenRLHF's default",
        ),
        (TEMPO_CTPO, {"actor.loss_agg_mode": "seq-mean-token-mean"}, "actor.loss_agg_mode: expected 'token-mean'"),
        (tc.methods.grpo(), {}, "actor.loss_agg_mode: expected 'seq-mean-token-mean'"),
    ],
)
def test_losses_refuse(objective, settings, message):
    adapter.install(objective)
    with pytest.raises(ValueError, match=message):
        actor_loss(arguments(**settings))


@pytest.mark.parametrize(
    ("settings", "reference", "message"),
    [
        ({"algo.advantage.estimator": "gae"}, None, "algo.advantage.estimator: expected 'dr_grpo'"),
        ({"algo.kl.init_coef": 0.01}, "a reference model", "algo.kl.init_coef: expected 0, or algo.kl.use_loss"),
        ({"reward.clip_range": (-1, 1)}, None, r"reward.clip_range: expected OpenRLHF's default \(-10, 10\)"),
    ],
)
def test_experience_makers_refuse(settings, reference, message):
    adapter.install(TEMPO_CTPO)
    with pytest.raises(ValueError, match=message):
        maker(arguments(**settings), reference)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (tc.methods.pods(), "expected no filters"),
        (tc.methods.ba(), "aggregation stage without group statistics"),
        (tc.methods.dr_grpo(), "a length in the aggregation stage"),
        (
            tc.Objective(terms=(tc.term.kl(estimator="k3"),)),
            r"expected no terms, because OpenRLHF adds its own \(algo.kl.use_loss for KL\)",
        ),
    ],
)
def test_install_refuses(objective, message):
    with pytest.raises(ValueError, match=message):
        adapter.install(objective)
    assert ppo_actor.PolicyLoss is PolicyLoss and ppo_trainer.RemoteExperienceMaker is RemoteExperienceMaker


def test_recipe():
    """As ``docs/hosts.md`` prints it."""
    recipes.run("OpenRLHF")["setup"]()
    out = with_advantages(arguments())
    torch.testing.assert_close(packed([x.advantages for x in out]), rr.expected(TEMPO_CTPO, ROWS)[0])
    assert isinstance(actor_loss(arguments()), adapter.PolicyLoss)


def test_inputs_that_the_batch_lacks():
    weighted = replace(TEMPO_CTPO, token_weights=(tc.token_weights.importance(high=2.0),))
    adapter.install(weighted)
    rows = experiences(arguments())
    for row in rows:
        row.rollout_log_probs = None
    with pytest.raises(ValueError, match="requires rollout_log_probs"):
        maker(arguments()).compute_advantages_and_returns(rows)
