"""A batch as verl's V1 trainer holds it, and verl's own functions called as its driver and its workers call them."""

import numpy as np
import torch
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.tensordict_utils import index_select_tensor_dict
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_to_nested

PROMPTS, SESSIONS = 4, 4


def nested(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def batch(seed=0, padding=3):
    """Ragged rows of four prompts in shuffled order, one session lost, then verl's own kind of padding rows.

    Tokens of a tool are masked, and rows of a prompt begin alike, so that they part somewhere inside.
    """
    g = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in range(PROMPTS):
        for session in range(SESSIONS):
            length = int(torch.randint(3, 9, (1,), generator=g))
            mask = torch.rand(length, generator=g) > 0.2
            mask[0] = True
            scores = torch.zeros(length)
            scores[-1] = float(torch.randint(0, 3, (1,), generator=g)) / 2
            row = dict(
                key=f"p{prompt}_{session}_0",
                uid=f"p{prompt}",
                responses=torch.randint(5, 7, (length,), generator=g),
                response_mask=mask.long(),
                rm_scores=scores,
            )
            rows.append(row)
    rows.pop(5)
    for i in range(padding):
        one = dict(responses=torch.tensor([2]), response_mask=torch.tensor([0]), rm_scores=torch.zeros(1))
        rows.append(dict(key=f"pad9_{i}_0", uid="pad9", **one))
    for row in rows:
        length = len(row["responses"])
        row["prompts"] = torch.full((3,), 4)
        row["old_log_probs"] = -1 - torch.rand(length, generator=g)
        row["rollout_log_probs"] = row["old_log_probs"] + 0.3 * torch.randn(length, generator=g)
        row["entropy"] = torch.rand(length, generator=g)
        chosen = row["old_log_probs"].exp()
        row["sum_pi_squared"] = chosen**2 + 0.3 * (1 - chosen) ** 2
        row["log_probs"] = row["old_log_probs"] + 0.3 * torch.randn(length, generator=g)
    return [rows[i] for i in torch.randperm(len(rows), generator=g).tolist()]


def cut(rows, seed=3, shuffled=True):
    """The rows with each session of at least 4 tokens in two or three rows, as verl's agent loops return them.

    Returns the new rows, with the reward in each, and for each the old row and its first token there.
    """
    g = torch.Generator().manual_seed(seed)
    out = []
    for i, row in enumerate(rows):
        length = len(row["responses"])
        ends = sorted({length, *torch.randint(1, length, (2,), generator=g).tolist()}) if length > 3 else [length]
        for k, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            part = {name: x[first:last] if len(x) == length else x for name, x in row.items() if torch.is_tensor(x)}
            part["response_mask"] = part["response_mask"].clone()
            part["rm_scores"] = torch.zeros(last - first)
            part["rm_scores"][-1] = row["rm_scores"].sum()
            out.append(
                (part | {"prompts": row["prompts"], "uid": row["uid"], "key": f"{row['key'][:-1]}{k}"}, (i, first))
            )
    if shuffled:
        out = [out[i] for i in torch.randperm(len(out), generator=g).tolist()]
    return [row for row, _ in out], [origin for _, origin in out]


FIELDS = ("prompts", "responses", "response_mask", "rm_scores", "old_log_probs", "rollout_log_probs", "entropy")


def tensordict(rows, names=FIELDS):
    """The rows in nested tensors, as in the queue."""
    return TensorDict({name: nested(row[name] for row in rows) for name in names}, batch_size=len(rows))


def padded(rows, name):
    return nested(row[name] for row in rows).to_padded_tensor(0)


def fields(rows):
    """Fields as the adapter's trainers give them to :func:`tokcredit.adapters.verl.rollouts`."""
    responses = padded(rows, "responses")
    lengths = torch.tensor([len(row["responses"]) for row in rows])
    real = torch.arange(responses.shape[1]) < lengths[:, None]
    names = ("old_log_probs", "rollout_log_probs", "entropy", "sum_pi_squared")
    return {"responses": responses, "attention_mask": real, **{name: padded(rows, name) for name in names}}


def data_proto(rows):
    names = ("response_mask", "rm_scores", "old_log_probs", "sum_pi_squared")
    proto = DataProto(batch=tensordict(rows, names).to_padded_tensor())
    proto.batch["token_level_rewards"] = proto.batch["rm_scores"]
    proto.non_tensor_batch["uid"] = np.array([row["uid"] for row in rows], dtype=object)
    return proto


def advantages(rows, estimator, config, std=True):
    """What verl's driver computes, ``(B, T)``."""
    keys = [row["key"] for row in rows]
    out = compute_advantage_for_multi_trajectories(
        data_proto(rows), keys, estimator, num_repeat=SESSIONS, norm_adv_by_std_in_grpo=std, config=config
    )
    return out.batch["advantages"]


def actor(mode, loss_agg_mode="token-mean", **settings):
    return ActorConfig(
        strategy="fsdp",
        rollout_n=SESSIONS,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=mode),
        loss_agg_mode=loss_agg_mode,
        **settings,
    )


def loss(rows, advantages, config, parts=None, dp_size=1, counted=True, weights=None):
    """Loss, gradient to every log-prob of the rows, and metrics of the first part, from verl's own ``ppo_loss``.

    Args:
        rows: the mini-batch.
        advantages: advantages ``(B, T)``.
        config: the actor's.
        parts: lists of rows that are micro-batches; all in one if None.
        dp_size: ranks.
        counted: whether the engine has counted the mini-batch, as verl's does.
        weights: rollout correction weights ``(B, T)``.
    """
    mask = nested(row["response_mask"] for row in rows)
    whole = tensordict(rows, ("prompts", "responses", "response_mask", "old_log_probs"))
    whole["advantages"] = response_to_nested(advantages, mask)
    if weights is not None:
        whole["rollout_is_weights"] = response_to_nested(weights, mask)
    total, gradients, metrics = 0.0, {}, None
    for part in parts or [list(range(len(rows)))]:
        # The model gives a log-prob for the token after each of prompt and response.
        current = [torch.cat([torch.zeros(2), rows[i]["log_probs"], torch.zeros(1)]).requires_grad_() for i in part]
        micro = index_select_tensor_dict(whole, part)
        for name, value in (
            ("dp_size", dp_size),
            ("batch_num_tokens", sum(int(row["response_mask"].sum()) for row in rows) if counted else None),
            ("global_batch_size", len(rows) if counted else None),
        ):
            micro.set_non_tensor(name, value)
        value, found = ppo_loss(config, {"log_probs": nested(current)}, micro)
        value.backward()
        total += value.item()
        metrics = metrics or {name: metric.aggregate() for name, metric in found.items()}
        gradients |= {i: x.grad for i, x in zip(part, current, strict=True)}
    return total, torch.cat([gradients[i] for i in range(len(rows))]), metrics
