"""Batches and objectives with malformed tensors: everything returns or raises, and the process lives."""

import malformed
import naive
import tokcredit as tc
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_public_functions import RAISED, survives

B, T = 4, 6
SETTINGS = settings(suppress_health_check=list(HealthCheck))
METHODS = naive.OF_GROUPS


def packed():
    return {
        "tokens": torch.arange(B * T) % 3,
        "cu_seqlens": torch.tensor([0, 5, 5, 11, B * T]),
        "group_ids": torch.tensor([4, 9, 9, 4]),
        "rewards": torch.tensor([1.0, 0.0, 0.5, 0.0]),
        "response_mask": torch.arange(B * T) % 5 != 2,
        "old_log_probs": -torch.rand(B * T),
        "ref_log_probs": -torch.rand(B * T),
        "entropies": torch.rand(B * T),
        "extras": {"truncated": torch.tensor([True, False, True, False])},
        "trajectory_ids": torch.tensor([3, 1, 2, 0]),
    }


def padded():
    mask = torch.arange(T) < torch.tensor([6, 0, 3, 4])[:, None]
    return {
        "tokens": torch.arange(B * T).view(B, T) % 3,
        "response_mask": mask,
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "rewards": torch.tensor([1.0, 0.0, 1.0, 0.5]),
        "attention_mask": mask,
        "old_log_probs": -torch.rand(B, T),
        "extras": {"entropies_of_a_typo": torch.rand(B, T)},
    }


@st.composite
def broken(draw, well_formed, least=1):
    made = dict(well_formed)
    for name in draw(st.lists(st.sampled_from(sorted(made)), min_size=least, max_size=2, unique=True)):
        x = made[name]
        if isinstance(x, torch.Tensor) and draw(st.booleans()):
            made[name] = draw(malformed.changed(x))
        elif isinstance(x, dict):
            key = draw(st.sampled_from(["truncated", "hidden_states", "state_values", "old_log_probs", "unknown"]))
            made[name] = {key: draw(malformed.anything(B * T))}
        else:
            made[name] = draw(malformed.anything(x.numel()))
    return made


def batch_or_none(function, named):
    try:
        return function(**named)
    except RAISED as error:
        assert str(error)
        return None


@given(st.data(), st.sampled_from(METHODS))
@SETTINGS
def test_a_packed_batch(data, name):
    batch = batch_or_none(tc.Rollouts, data.draw(broken(packed())))
    if batch is not None:
        survives(run, name, batch, data.draw(malformed.anything(batch.num_tokens)), data.draw(malformed.anything(3)))


def in_rows():
    """Two trajectories of two rows each, with named rewards and rewards of tokens."""
    return packed() | {
        "rewards": torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.5], [1.0, 0.5]]),
        "trajectory_ids": torch.tensor([3, 1, 1, 3]),
        "token_rewards": torch.rand(B * T) * (torch.arange(B * T) % 5 != 2),
        "extras": {"truncated": torch.tensor([False, False, True, True]), "turn_ids": torch.arange(B * T)},
    }


@given(st.data(), st.sampled_from(METHODS))
@SETTINGS
def test_trajectories_of_several_rows(data, name):
    batch = batch_or_none(tc.Rollouts, data.draw(broken(in_rows(), least=0)))
    if batch is not None:
        survives(run, name, batch, data.draw(malformed.anything(batch.num_tokens)), data.draw(malformed.anything(3)))


@given(st.data(), st.sampled_from(METHODS))
@SETTINGS
def test_a_padded_batch(data, name):
    batch = batch_or_none(tc.Rollouts.from_padded, data.draw(broken(padded())))
    if batch is not None:
        log_probs = -torch.rand(batch.shape)
        survives(run, name, batch, log_probs.requires_grad_(), data.draw(malformed.anything(3)))


@given(st.data(), st.sampled_from(METHODS))
@SETTINGS
def test_inputs_of_a_good_batch(data, name):
    """Whatever the method reads is malformed, or has NaN, inf and huge numbers in the right shape."""
    required, named = tc.methods.load(name).required_inputs, packed()
    del named["extras"], named["trajectory_ids"]
    batch = tc.Rollouts(**named)
    for key in sorted(required):
        entry = tc.inputs.get(key)
        size = batch.num_tokens if entry.per == "token" else batch.num_rows
        dtype = {"float": torch.float32, "integer": torch.int64, "bool": torch.bool}[entry.dtype]
        x = torch.ones(size, *(3 for _ in entry.axes), dtype=dtype)
        x = data.draw(malformed.changed(x)) if data.draw(st.booleans()) else data.draw(malformed.anything(size))
        changed = batch_or_none(batch.with_inputs, {key: x})
        batch = batch if changed is None else changed
    log_probs = data.draw(malformed.changed(-torch.rand(batch.num_tokens))).requires_grad_()
    survives(run, name, batch, log_probs, [0, 1])


def run(name, batch, log_probs, rows):
    objective = tc.methods.load(name)
    prepared = objective.prepare(batch, progress=0.5)
    further = dict.fromkeys(objective.variables[1:], log_probs)
    out = objective.loss(prepared, log_probs, **further)
    dict(out.metrics)
    if out.loss.requires_grad:
        out.loss.backward()
    part = prepared.select(rows)
    zeros = torch.zeros(part.batch.shape or (part.batch.num_tokens,))
    objective.loss(part, zeros, **dict.fromkeys(further, zeros))
    prepared.minibatch(rows)


@given(st.data(), st.sampled_from(sorted(set(tc.methods.names()) - set(METHODS))))
@SETTINGS
def test_pairs(data, name):
    pair = {name: torch.arange(6).view(2, 3) % 4 for name in ("chosen", "rejected")}
    masks = {f"{name}_mask": torch.ones(2, 3, dtype=torch.bool) for name in pair}
    read = {x for x in tc.methods.load(name).required_inputs if tc.inputs.get(x).per == "token"}
    given_inputs = {x: (-torch.rand(2, 3), -torch.rand(2, 3)) for x in read}
    batch = batch_or_none(tc.Rollouts.from_pairs, {**data.draw(broken(pair | masks, least=0)), **given_inputs})
    if batch is not None:
        batch = batch.with_inputs(**({"prompt_pairs": batch.rewards > 2} if name == "mapl" else {}))
        survives(run, name, batch, data.draw(malformed.anything(batch.num_tokens)), data.draw(malformed.anything(3)))
