import dataclasses
import math

import naive
import pytest
import tokcredit as tc
import torch
from tokcredit import schedule


def test_linear():
    assert [schedule.linear(2.0, 1.0)(p) for p in (0.0, 0.25, 1.0)] == [2.0, 1.75, 1.0]


def test_cosine_restarts():
    wave = schedule.cosine_restarts(start=0.0, peak=1.0, trough=0.2, steps=11, warmup=2, period=4)
    at = [wave(step / 10) for step in range(11)]
    half = 0.2 + 0.4 * (1 + math.cos(math.pi / 4))
    low = 0.2 + 0.4 * (1 + math.cos(3 * math.pi / 4))
    assert at == pytest.approx([0.5, 1.0, 1.0, half, 0.6, low, 1.0, half, 0.6, low, 1.0])
    with pytest.raises(ValueError, match="cosine_restarts: steps: expected a whole number at least 1, got 0"):
        schedule.cosine_restarts(0, 1, 0, 0, 0, 4)


def test_progress_is_asked_for_and_checked():
    batch, _ = naive.random_batch()
    batch = naive.with_inputs(batch, {"ref_log_probs"})
    objective = tc.mix("grpo", terms=(tc.term.kl(schedule.linear(0.0, 0.4)),))
    assert objective.is_scheduled
    assert objective.prepare(batch, progress=0.25).objective.terms[0].coefficient == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"progress: expected a number from 0 to 1 because of linear.*, got None"):
        objective.prepare(batch)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"progress: expected a number from 0 to 1, got {wrong}"):
            objective.prepare(batch, progress=wrong)
    assert tc.methods.grpo().prepare(batch, progress=0.5).objective == tc.methods.grpo()


def test_cosine_by_hand():
    """CHORD's share of the expert, over 200 steps."""
    mu = schedule.cosine(0.9, 0.05)
    found = [mu(step / 200) for step in (0, 50, 100, 150, 200)]
    assert found == pytest.approx([0.9, 0.775520, 0.475, 0.174480, 0.05], abs=1e-6)


def test_target_entropy_by_hand():
    """Target 0.2, delta 0.005, start 0: the coefficient of a step depends on the entropy of the step before."""
    controller = schedule.target_entropy(target=0.2, delta=0.005, start=0.0)
    objective = tc.Objective(terms=(tc.term.entropy(controller),))
    state = schedule.State()
    applied, kept = [], []
    for entropy in (0.5, 0.18, 0.19, 0.25, 0.1):
        applied.append(state(controller))
        state.observe(objective, {controller.metric: entropy})
        kept.append(state.state_dict()[repr(controller)][0])
    assert applied == pytest.approx([0, 0, 0.005, 0.01, 0])
    assert kept == pytest.approx([0, 0.005, 0.01, 0.005, 0.01])


def test_target_entropy_stays_in_its_range():
    controller = schedule.target_entropy(target=1.0, delta=0.5, low=0.0, high=0.8)
    state = controller.initial()
    assert controller.value(state) == 0
    for _ in range(3):
        state = controller.updated(state, 0.5)
    assert controller.value(state) == 0.8
    for _ in range(3):
        state = controller.updated(state, 2.0)
    assert state[0] == 0.0 and controller.value(state) == 0


def test_target_kl_by_hand():
    controller = schedule.target_kl(target=0.1, start=0.5, horizon=1000.0, rows=100.0)
    state = controller.initial()
    assert controller.value(state) == 0.5
    state = controller.updated(state, 0.11)
    assert controller.value(state) == pytest.approx(0.5 * (1 + 0.1 * 0.1))
    for observed, error in ((9.0, 0.2), (0.0, -0.2)):
        assert controller.value(controller.updated((1.0,), observed)) == pytest.approx(1 + error * 0.1)


def test_a_controller_reaches_the_loss():
    batch, current = naive.random_batch()
    batch = batch.with_inputs(ref_log_probs=current.reshape(-1) - 0.3)
    controller = schedule.target_kl(target=0.1, start=0.5, horizon=512.0)
    objective = tc.mix("grpo", terms=(tc.term.kl(controller, "k1"),))
    assert objective.adjustables == (controller,) and not objective.is_scheduled
    state = schedule.State()
    with pytest.raises(ValueError, match=r"state: expected a tokcredit\.schedule\.State because of target_kl"):
        objective.prepare(batch)
    first = objective.loss(objective.prepare(batch, state=state), current)
    state.observe(objective, {name: float(value) for name, value in first.metrics.items()})
    second = objective.loss(objective.prepare(batch, state=state), current)
    for out, coefficient in ((first, 0.5), (second, 0.5 * 1.2)):
        torch.testing.assert_close(out.metrics["kl"].item(), 0.3)
        torch.testing.assert_close((out.loss - out.metrics["policy_loss"]).item(), coefficient * 0.3)


def test_the_state_is_saved_and_loaded():
    controller = schedule.target_kl(start=0.5)
    objective = tc.mix("grpo", terms=(tc.term.kl(controller),))
    state = schedule.State()
    state.observe(objective, {"kl": torch.tensor(9.0)})
    again = schedule.State()
    assert again(controller) == 0.5 != state(controller)
    again.load_state_dict({name: list(values) for name, values in state.state_dict().items()})
    assert again(controller) == state(controller)
    assert again.state_dict() == state.state_dict()


def test_equal_controllers_share_their_state_and_move_once():
    controller = schedule.target_kl(start=0.5, target=0.1, horizon=512.0)
    objective = tc.mix("grpo", terms=(tc.term.kl(controller), tc.term.nll(dataclasses.replace(controller))))
    state = schedule.State()
    state.observe(objective, {"kl": 0.3})
    assert state(controller) == pytest.approx(0.5 * 1.2)


def test_a_missing_metric_is_an_error():
    objective = tc.mix("grpo", terms=(tc.term.kl(schedule.target_kl()),))
    with pytest.raises(ValueError, match=r"metrics: expected kl because of target_kl.*, got \['loss'\]"):
        schedule.State().observe(objective, {"loss": 1.0})


def test_a_controller_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class counting(schedule.Controller):
        metric: str = "loss"

        def initial(self):
            return (0.0,)

        def value(self, state):
            return state[0]

        def updated(self, state, observed):
            return (state[0] + observed,)

    objective = tc.mix("grpo", terms=(tc.term.kl(counting()),))
    state = schedule.State()
    for loss in (1.0, 2.5):
        state.observe(objective, {"loss": loss})
    assert state(counting()) == 3.5
