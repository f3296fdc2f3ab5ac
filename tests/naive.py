"""The stages of a loss as float64 loops over one row at a time, for checking methods against their papers' formulas."""

import dataclasses
import math

import tokcredit as tc
import torch
from tokcredit.rollouts import FIELDS

OF_GROUPS = [x for x in tc.methods.names() if not isinstance(tc.methods.load(x), tc.Preference)]
"""Methods that take groups of any size; the others take pairs."""


def random_batch(seed=0, groups=3, size=4, length=7, padded=True, **extra):
    """A batch in which every branch of the formulas is taken: prefixes shared, masked holes, one empty row."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    rows = groups * size
    tokens = torch.randint(0, 3, (rows, length), generator=g)
    mask = torch.rand(rows, length, generator=g) > 0.2
    mask[1] = False
    order = torch.randperm(rows, generator=g)
    old = -torch.rand(rows, length, generator=g, dtype=torch.float64)
    rewards = torch.randint(0, 2, (rows,), generator=g).double()
    rewards[order < 3] += torch.rand(3, generator=g, dtype=torch.float64)
    current = old + 0.4 * torch.randn(rows, length, generator=g, dtype=torch.float64)
    batch = tc.Rollouts.from_padded(tokens, mask, order % groups, rewards, old_log_probs=old, **extra)
    return batch, current


def random_pairs(seed=0, pairs=6, length=7, **extra):
    """The rows of :func:`random_batch` as preference pairs with different rewards."""
    batch, current = random_batch(seed, groups=pairs, size=2, length=length, **extra)
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    rewards = torch.randperm(batch.num_rows, generator=g).double()
    return dataclasses.replace(batch, rewards=rewards), current


def synthetic(name, batch, g):
    """An input of this name for a batch, random, with nothing but NaN where the mask is False."""
    n = batch.num_tokens
    x = torch.rand(n, generator=g, dtype=torch.float64)
    sparse = torch.where(torch.arange(n) % 5 % 3 == 1, x, float("nan"))
    rows = torch.arange(batch.num_rows)
    first = (
        torch.stack([(batch.group_index == i).nonzero()[0, 0] for i in range(batch.num_groups)]) if len(rows) else rows
    )
    earlier = torch.stack([(batch.group_index[:r] == batch.group_index[r]).sum() for r in rows]) if len(rows) else rows
    chosen = (-x if batch.old_log_probs is None else batch.old_log_probs.double()).exp()
    made = {
        "old_log_probs": -x,
        "rollout_log_probs": -x,
        "ref_log_probs": -x,
        "entropies": 1.2 * x,
        # Between what one probability and one other token of the rest's make.
        "squared_probs": chosen**2 + x * (1 - chosen) ** 2,
        "teacher_log_probs": -(x**2),
        "teacher_top_ids": torch.stack([torch.arange(n) % 7, torch.arange(n) % 7 + 1], 1),
        "teacher_top_log_probs": torch.stack([-1 - x, -2 - x], 1),
        "teacher_mask": rows % 3 != 2,
        "reverse_kl": x**2,
        "forward_kl": x**3,
        "ref_forward_kl": x**3,
        "disagreement": x,
        "padded_disagreement": x**2,
        "hidden_states": torch.randn(n, 4, generator=g, dtype=torch.float64),
        "token_probs": tc.log_probs.group_probs(torch.randn(n, 5, generator=g, dtype=torch.float64), batch),
        "state_values": sparse,
        "step_values": sparse,
        "node_ids": rows,
        # The first two rows of a group leave the prompt, the others the node of the first.
        "parent_ids": torch.where(earlier < 2, -1, first[batch.group_index]) if len(rows) else rows,
        "answer_probs": sparse,
        "answer_confidences": (sparse * 3) % 1,
        "turn_rewards": x,
        "token_rewards": x.masked_fill(~batch.response_mask, 0),
        "turn_ids": torch.arange(n) // 2,
        "values": x,
        "value_targets": x**2,
        "bootstrap_values": torch.where(rows % 3 != 1, rows / 7.0, 0),
        "context_keys": batch.group_index // 2,
        "role_ids": rows % 2,
        "role_baselines": rows % 4 / 9.0,
        "greedy_rewards": rows % 3 / 2.0,
        "anchor_ids": torch.arange(n) % 3,
        "turn_scores": at_turns(batch, torch.where(torch.arange(n) % 4 == 1, float("nan"), x)),
        "answer_log_probs": at_turns(batch, -3 * x),
        "initial_answer_log_probs": -(rows % 5) / 2.0 - 0.1,
        "ref_answer_log_probs": at_turns(batch, -3 * x),
        "ref_initial_answer_log_probs": -(rows % 5) / 2.0 - 0.1,
        "implicit_rewards": x - 0.4,
        "prompt_tokens": rows[:, None],
        "replayed": rows % 4 == 3,
        "expert": rows % 4 == 2,
        "aligned_log_probs": -2 * x,
        "better_log_probs": -x,
        "worse_log_probs": -2 * x.square(),
        "contrastive_log_probs": -x,
        "reward_masks": x,
        "divergence_masks": x.square(),
        "prompt_attention": x.square(),
        "teacher_distance": 2 * x,
        "field_weights": 1 + x.round(),
        "prompt_pairs": batch.group_index % 2 == 1,
        "planning_tokens": torch.arange(n) % 3 == 1,
        "truncated": rows % 3 != 1,
        "length_values": -x,
    }[name]
    if tc.inputs.get(name).per == "token" and made.is_floating_point() and name != "token_rewards":
        made[~batch.response_mask] = float("nan")
    return made


def at_turns(batch, x):
    """Numbers at the last token of each turn, NaN elsewhere."""
    made = torch.full_like(x, float("nan"))
    last = [turn[-1] for row in turns_of(batch) for turn in row]
    made[last] = x[last]
    return made


def with_inputs(batch, names, seed=5):
    """The batch with synthetic inputs of these names, where it has none."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    fields, extras = {}, dict(batch.extras)
    for name in sorted(names):
        if name not in FIELDS:
            extras.setdefault(name, synthetic(name, batch, g))
        elif getattr(batch, name) is None:
            fields[name] = synthetic(name, batch, g)
    return dataclasses.replace(batch, **fields, extras=extras)


def rows_of(batch):
    """For each row, the flat positions of its training tokens."""
    flat = batch.response_mask.tolist()
    spans = zip(batch.begin.tolist(), batch.end.tolist(), strict=True)
    return [[t for t in range(b, e) if flat[t]] for b, e in spans]


def turns_of(batch):
    """For each row its turns, each a list of the positions of its training tokens."""
    names = batch.input("turn_ids").tolist() if batch.has_input("turn_ids") else None
    found = []
    for row in rows_of(batch):
        turns = []
        for t in row:
            goes_on = turns and (turns[-1][-1] == t - 1 if names is None else names[turns[-1][-1]] == names[t])
            turns[-1].append(t) if goes_on else turns.append([t])
        found.append(turns)
    return found


def token_rewards(batch):
    """The reward of each training token by position, with the outcome at the last one of a row."""
    dense = batch.token_rewards
    found = {t: 0.0 if dense is None else dense[t].item() for row in rows_of(batch) for t in row}
    for r, row in enumerate(rows_of(batch)):
        if row:
            found[row[-1]] += batch.rewards[r].sum().item()
    return found


def to_go(rewards, discount=1.0):
    """The discounted sums of a list from each element on."""
    found = []
    for r in reversed(rewards):
        found.append(r + discount * (found[-1] if found else 0.0))
    return found[::-1]


def total_rewards(batch):
    """The total reward of each row."""
    rewards = token_rewards(batch)
    return [sum(rewards[t] for t in row) for row in rows_of(batch)]


def turn_rewards(batch):
    """For each row, the rewards of its turns."""
    rewards = token_rewards(batch)
    return [[sum(rewards[t] for t in turn) for turn in row] for row in turns_of(batch)]


def moments(x, population=False):
    """Mean and standard deviation of a list; 0 and 1 of fewer than two numbers."""
    if len(x) < 2:
        return 0.0, 1.0
    mean = sum(x) / len(x)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - (not population)))


def spread_turns(batch, of_turns):
    """Numbers of turns, row by row, as numbers of tokens by position."""
    turns = turns_of(batch)
    return {
        t: x
        for row, numbers in zip(turns, of_turns, strict=True)
        for tokens, x in zip(row, numbers, strict=True)
        for t in tokens
    }


def whitened(x):
    """Numbers of tokens by position with mean 0 and sample variance 1."""
    mean, std = moments(list(x.values()))
    return {t: (v - mean) / math.sqrt(std**2 + 1e-8) for t, v in x.items()}


def token_ppo(batch, log_probs, advantages, low, high):
    """Clipped token losses, row by row; advantages by position."""
    old = batch.old_log_probs
    return [[clipped(advantages[t], (log_probs[t] - old[t]).exp(), low, high) for t in row] for row in rows_of(batch)]


def group_rows(batch):
    index = batch.group_index.tolist()
    return [[r for r in range(len(index)) if index[r] == g] for g in range(batch.num_groups)]


def counted_rows(batch):
    """The rows of each group that statistics count: those with a token that the policy chose."""
    tokens = rows_of(batch)
    return [[r for r in rows if tokens[r]] for rows in group_rows(batch)]


def group_advantages(batch, scale=True, epsilon=1e-6):
    rewards, out = batch.rewards.tolist(), [0.0] * batch.num_rows
    for rows in counted_rows(batch):
        own = [rewards[r] for r in rows]
        mean = sum(own) / len(own) if len(own) > 1 else 0.0
        std = math.sqrt(sum((x - mean) ** 2 for x in own) / (len(own) - 1)) if len(own) > 1 else 1.0
        for r in rows:
            out[r] = (rewards[r] - mean) / ((std + epsilon) if scale else 1.0)
    return out


def clipped(advantage, ratio, low, high, cap=None):
    """The clipped surrogate of one token; ``ratio`` may carry a gradient."""
    value = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
    if cap is not None and advantage < 0:
        value = torch.minimum(value, torch.as_tensor(-advantage * cap, dtype=value.dtype))
    return value


def further(objective, variable):
    """The variables that ``loss`` takes by name, positive and each a function of the first one at the same token."""
    x = variable.detach()
    return {name: x.square() * (1 + i) + 0.1 for i, name in enumerate(getattr(objective, "variables", ("",))[1:])}


def loss_of(objective, prepared, variable):
    """The loss of the first variable, with synthetic ones beside it."""
    return objective.loss(prepared, variable, **further(objective, variable))


def gradient(objective, batch, current):
    """The loss, with synthetic variables beside the first, and its gradient to the first."""
    x = current.clone().requires_grad_()
    out = loss_of(objective, objective.prepare(batch), x)
    out.loss.backward()
    return out, x.grad


def check_same(objectives, batch, current):
    """Two objectives have the same loss and gradient."""
    (a, of_a), (b, of_b) = (gradient(x, batch, current) for x in objectives)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(of_a, of_b)
    assert of_a.any()


def check(objective, batch, current, naive, progress=None):
    """Loss and gradients of the objective equal those of ``naive(batch, flat variables)``, differentiated by torch."""
    others = further(objective, current)
    ours, theirs = ([x.clone().requires_grad_() for x in (current, *others.values())] for _ in range(2))
    out = objective.loss(
        objective.prepare(batch, progress=progress), ours[0], **dict(zip(others, ours[1:], strict=True))
    )
    expected = naive(
        batch, theirs[0].reshape(-1), **{k: x.reshape(-1) for k, x in zip(others, theirs[1:], strict=True)}
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-14)
    grads = torch.autograd.grad(out.loss, ours), torch.autograd.grad(expected, theirs)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert b.abs().sum() > 0, "a comparison of zeros proves nothing"
    return out


def token_mean(batch, losses):
    total = sum(len(t) for t in rows_of(batch))
    return sum(x for row in losses for x in row) / total


def sequence_mean(batch, losses):
    rows = [row for row in losses if row]
    return sum(sum(row) / len(row) for row in rows) / len(rows)


def ppo(batch, log_probs, advantages, low, high, cap=None):
    """Clipped token losses, row by row; advantages per row."""
    old = batch.old_log_probs
    return [
        [clipped(advantages[r], (log_probs[t] - old[t]).exp(), low, high, cap) for t in tokens]
        for r, tokens in enumerate(rows_of(batch))
    ]


def scores(batch, log_probs, weight, advantages=None, to="old_log_probs"):
    """Token losses ``-A * w * log p``, row by row, with ``w = weight(l, o, A)`` of three floats held fixed."""
    advantages = group_advantages(batch) if advantages is None else advantages
    reference = batch.input(to)
    return [
        [
            -advantages[r] * weight(log_probs[t].item(), reference[t].item(), advantages[r]) * log_probs[t]
            for t in tokens
        ]
        for r, tokens in enumerate(rows_of(batch))
    ]


@dataclasses.dataclass(frozen=True)
class fixed(tc.credit.Credit):
    """Advantages that a test chooses: the rewards, or the token rewards of the batch."""

    tokens: bool = False

    def __call__(self, batch):
        return batch.input("turn_rewards") if self.tokens else batch.rewards[:, None]


def two_rows(**extras):
    """Two rows of four and three tokens with advantages 1 and -1, with NaN beneath a masked token of each.

    Returns the batch with all log-probs, and those of the current policy.
    """

    def logs(a, b):
        return torch.tensor([[*a, math.nan], [b[0], math.nan, *b[1:], math.nan]], dtype=torch.float64).log()

    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 1, 0]]).bool()
    batch = tc.Rollouts.from_padded(
        torch.arange(10).view(2, 5),
        mask,
        torch.zeros(2, dtype=torch.long),
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        old_log_probs=logs([0.5, 0.05, 0.9, 0.2], [0.5, 0.05, 0.9]),
        rollout_log_probs=logs([0.45, 0.06, 0.9, 0.25], [0.5, 0.2, 0.95]),
        ref_log_probs=logs([0.4, 0.3, 0.8, 0.1], [0.5, 0.1, 0.6]),
        extras=extras,
    )
    return batch, logs([0.55, 0.25, 0.7, 0.2], [0.3, 0.01, 0.97])


def slopes(objective, batch=None, current=None, credit=None):
    """Derivative of each token's loss, without weights of rows, for the seven tokens of :func:`two_rows`."""
    if batch is None:
        batch, current = two_rows()
    objective = dataclasses.replace(objective, credit=credit or fixed(), aggregation=tc.aggregation.token_sum())
    current = current.clone().requires_grad_()
    objective.loss(objective.prepare(batch, progress=0.5), current).loss.backward()
    return current.grad[batch.shaped(batch.response_mask)].tolist()


def is_integral(prepared):
    """Whether the value of the loss is the integral of its slope, with nothing held fixed."""
    objective = prepared.objective
    if isinstance(objective, tc.Preference):
        return not any(getattr(term, "constant_weight", False) for term in objective.pair_terms)
    if not isinstance(objective, tc.Objective):
        return True
    held = prepared.window.surrogate == "gated" or isinstance(objective.ratio, tc.ratio.one)
    return not (held or objective.scales or any(getattr(term, "uncertain", False) for term in objective.terms))


def influence(batch, tokens, weights):
    """Both sums as they are written, over whole distributions restricted to the group's tokens."""
    column = tc.log_probs.group_vocabulary(batch)[1]
    hidden, probs = batch.extras["hidden_states"], batch.extras["token_probs"]
    errors = -probs.clone()
    for t in range(batch.num_tokens):
        if batch.response_mask[t]:
            errors[t, column[t]] += 1
    out = {}
    for rows in group_rows(batch):
        for j in rows:
            for q in tokens[j]:
                out[q] = sum(
                    weights[i] * (errors[k] @ errors[q]).item() * (hidden[k] @ hidden[q]).item()
                    for i in rows
                    for k in tokens[i]
                    if batch.rewards[i] > 0.5
                )
    return out
