"""AReaL's own actor on its own batches: what it stores, splits, packs and hands to the loss."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokcredit as tc
import torch

if importlib.util.find_spec("areal") is None:
    pytest.skip("AReaL is not installed; make test-others", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import absent
import recipes
import rows as rr

absent.pretend("areal.infra.rpc", "areal.engine", "areal.experimental")
absent.without_init("areal", "areal.infra", "areal.trainer", "areal.trainer.ppo")
sys.modules["areal.infra"].TrainController = object

from areal.api.cli_args import MicroBatchSpec, NormConfig, PPOActorConfig, RejectionSamplingConfig
from areal.trainer.ppo.actor import PPOActor
from areal.utils import stats_tracker
from areal.utils.data import pack_tensor_dict, split_padded_tensor_dict_into_mb_list
from tokcredit.adapters.areal import CreditActor

ROWS = rr.batch()
TEMPO_CTPO = replace(tc.methods.ctpo(), credit=tc.methods.tempo().credit)
VANILLA = replace(TEMPO_CTPO, credit=tc.methods.grpo().credit, ratio=tc.ratio.token(), clip=tc.clip.ppo(0.2, 0.2))


class Engine:
    """What AReaL's engines do with a loss: split, pack, weigh, add up; the model is a table of log-probs."""

    def __init__(self, parts):
        self.parts, self.total, self.table = parts, 0.0, None

    def train(self):
        pass

    def get_version(self):
        return 1

    def train_batch(self, batch, loss_fn, loss_weight_fn):
        spec = MicroBatchSpec(n_mbs=self.parts)
        parts = [pack_tensor_dict(part) for part in split_padded_tensor_dict_into_mb_list(batch, spec).mbs]
        weight = sum(loss_weight_fn(part) for part in parts)
        assert len(parts) == self.parts
        for part in parts:
            current = self.table[part["place"]]
            extremes = dict(vocab_min_logits=torch.zeros_like(current), vocab_max_logits=torch.zeros_like(current))
            loss = loss_fn(current, -current.detach(), part, **extremes) * loss_weight_fn(part) / weight
            loss.backward()
            self.total += loss.item()
        return {}


def config(**settings):
    return PPOActorConfig(**{"kl_ctl": 0.0, "ppo_n_minibatches": 1, "recompute_logprob": True, **settings})


def trajectories():
    """One dict per row, as AReaL's workflows return them, and the current policy's log-probs by place."""
    data, first = [], 0
    for row in ROWS:
        before, size = len(row["prompt"]), len(row["prompt"]) + len(row["response"])

        def whole(x, before=before):
            return torch.cat([torch.zeros(before, dtype=x.dtype), x])[None]

        data.append(
            {
                "input_ids": torch.cat([row["prompt"], row["response"]])[None],
                "attention_mask": torch.ones(1, size, dtype=torch.bool),
                "loss_mask": whole(row["mask"].int()),
                "logprobs": whole(row["rollout_log_probs"]),
                # Recomputed log-probs are where they were predicted.
                "prox_logp": whole(row["old_log_probs"]).roll(-1, -1),
                "rewards": torch.tensor([row["reward"]]),
                "place": torch.arange(first, first + size)[None],
            }
        )
        first += size
    table = [torch.cat([torch.zeros(len(row["prompt"])), row["log_probs"]]).roll(-1) for row in ROWS]
    return data, torch.cat(table).requires_grad_()


def packed(xs):
    """What belongs to the responses, from a tensor per row in which each token's is at the place before it."""
    out = [x.reshape(-1).roll(1)[len(row["prompt"]) :] for x, row in zip(xs, ROWS, strict=True)]
    return torch.cat(out)


def stepped(actor, engine):
    """Advantages, loss and gradient, packed, through the actor's own calls."""
    data, engine.table = trajectories()
    data = actor.compute_advantages(data)
    advantages = packed([row["advantages"] for row in data])
    actor.ppo_update(data)
    gradient = packed(engine.table.grad.split([row["place"].numel() for row in data]))
    return advantages, engine.total, gradient, stats_tracker.export()


@pytest.mark.parametrize("objective", [TEMPO_CTPO, tc.methods.grpo()], ids=["tempo_ctpo", "grpo"])
@pytest.mark.parametrize("parts", [1, 3])
def test_training_equals_the_objective(objective, parts):
    engine = Engine(parts)
    advantages, value, gradient, logged = stepped(CreditActor(config(), engine, objective=objective), engine)
    advantages, loss, expected = rr.expected(objective, ROWS)
    torch.testing.assert_close(advantages, advantages)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert logged["ppo_actor/update/tokcredit/ratio_mean"] > 0


def test_recipe():
    """As ``docs/hosts.md`` prints it."""
    engine = Engine(1)
    assert recipes.run("AReaL")["with_credit"](engine, config()) is engine
    advantages, value, *_ = stepped(engine.actor, engine)
    expected, loss, _ = rr.expected(TEMPO_CTPO, ROWS)
    torch.testing.assert_close(advantages, expected)
    assert value == pytest.approx(loss.item(), rel=1e-5)


def test_training_equals_areal():
    """Clipped ratios and the mean over tokens, of the same advantages."""
    engine, own = Engine(2), Engine(2)
    actor, stock = CreditActor(config(), engine, objective=VANILLA), PPOActor(config(), own)
    stock._compute_advantages = actor._compute_advantages
    _, value, gradient, logged = stepped(actor, engine)
    _, expected, theirs, known = stepped(stock, own)
    assert theirs.abs().sum() > 0.1
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-7)
    assert logged["ppo_actor/update/actor_loss"] != 0 and known["ppo_actor/update/clip_ratio/avg"] > 0


def test_weights_correct_for_the_engine():
    objective = replace(TEMPO_CTPO, token_weights=(tc.token_weights.importance(high=1.1),))
    engine = Engine(1)
    advantages, *_ = stepped(CreditActor(config(), engine, objective=objective), engine)
    data = rr.rollouts(ROWS)
    ratio = (data.old_log_probs - data.rollout_log_probs).exp().clamp(max=1.1)
    torch.testing.assert_close(advantages, rr.expected(TEMPO_CTPO, ROWS)[0] * ratio)


@pytest.mark.parametrize(
    ("settings", "objective", "message"),
    [
        ({"kl_ctl": 0.1}, TEMPO_CTPO, "kl_ctl: expected 0"),
        ({"eps_clip": 0.3}, TEMPO_CTPO, "eps_clip: expected AReaL's default 0.2"),
        ({"use_decoupled_loss": True}, TEMPO_CTPO, "use_decoupled_loss: expected AReaL's default False"),
        (
            {"adv_norm": NormConfig(mean_level="batch", std_level="batch")},
            TEMPO_CTPO,
            "adv_norm: expected AReaL's default None",
        ),
        (
            {"rejection_sampling": RejectionSamplingConfig()},
            TEMPO_CTPO,
            "rejection_sampling: expected AReaL's default None",
        ),
        ({}, tc.methods.pods(), "expected no filters"),
        (
            {},
            replace(TEMPO_CTPO, credit=tc.methods.match_tir().credit),
            "credit stage that reads no more inputs",
        ),
        ({}, tc.methods.ba(), "aggregation stage without group statistics"),
        ({}, tc.methods.dr_grpo(), "a length in the aggregation stage"),
        ({}, replace(TEMPO_CTPO, aggregation=tc.aggregation.token_sum()), "aggregation stage that is a mean"),
    ],
)
def test_actors_refuse(settings, objective, message):
    with pytest.raises(ValueError, match=message):
        CreditActor(config(**settings), Engine(1), objective=objective)


def test_a_teacher_is_not_forgotten():
    engine = Engine(1)
    actor = CreditActor(config(), engine, objective=TEMPO_CTPO)
    data, engine.table = trajectories()
    data = [{**row, "teacher_logp": row["logprobs"]} for row in actor.compute_advantages(data)]
    with pytest.raises(ValueError, match="teacher_logp: expected None"):
        actor.ppo_update(data)


def test_keys_that_the_batch_lacks():
    data, _ = trajectories()
    for row in data:
        del row["rewards"]
    with pytest.raises(RuntimeError, match="rewards: expected in AReaL's batch"):
        CreditActor(config(), Engine(1), method="ctpo").compute_advantages(data)
