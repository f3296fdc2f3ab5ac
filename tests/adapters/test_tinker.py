"""Training data of Tinker's cookbook, assembled by its own function from its own trajectories."""

import importlib.util
import sys
from pathlib import Path

import pytest
import tokcredit as tc

if importlib.util.find_spec("tinker_cookbook") is None:
    pytest.skip("tinker-cookbook is not installed; make test-others", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import absent
import recipes

absent.pretend("datasets")

import tinker
from tinker_cookbook.completers import TokensWithLogprobs
from tinker_cookbook.rl import data_processing
from tinker_cookbook.rl.types import PARSE_ERROR_MASKED_METRIC_KEY, Trajectory, TrajectoryGroup, Transition
from tokcredit.adapters import tinker as adapter

RETURNS = tc.Objective(tc.credit.returns(discount=0.5))


def step(observation, action, reward, masked=False):
    return Transition(
        ob=tinker.ModelInput.from_ints(observation),
        ac=TokensWithLogprobs(tokens=action, maybe_logprobs=[-1.0 - 0.1 * t for t in range(len(action))]),
        reward=reward,
        episode_done=False,
        metrics={PARSE_ERROR_MASKED_METRIC_KEY: float(masked)},
    )


def group(*trajectories, final):
    made = [Trajectory(list(steps), tinker.ModelInput.empty()) for steps in trajectories]
    return TrajectoryGroup(trajectories_G=made, final_rewards_G=final, metrics_G=[{} for _ in made])


def groups():
    """The first trajectory is two data: the third observation does not go on from the second."""
    return [
        group(
            [step([1, 2], [3, 4], 0.5), step([1, 2, 3, 4, 9], [5], 1.0), step([7], [8, 8], 0.25)],
            [step([1, 2], [6], 0.0), step([1, 2, 6, 9], [6, 6], 0.75, masked=True)],
            final=[2.0, 1.0],
        ),
        group([step([1], [2], 1.5)], [step([1], [3, 4], 0.5)], final=[0.0, 0.0]),
    ]


def of_data(data, name):
    return [datum.loss_fn_inputs[name].to_torch().tolist() for datum in data]


def test_centered_rewards_are_those_of_the_cookbook():
    whole = groups()
    expected, origins = data_processing.assemble_training_data(whole, data_processing.compute_advantages(whole))
    data, ours = adapter.assemble_training_data(tc.Objective(tc.credit.group_normalized(scale=False)), whole)
    assert ours == origins and len(data) == 5
    assert of_data(data, "mask") == of_data(expected, "mask")
    for found, advantages in zip(of_data(data, "advantages"), of_data(expected, "advantages"), strict=True):
        assert found == pytest.approx(advantages)
    assert sum(map(abs, of_data(data, "advantages")[0])) > 1


def test_rewards_of_turns():
    """Returns go on from datum to datum; the reward of a masked turn is at the last token that trains before it."""
    data, _ = adapter.assemble_training_data(RETURNS, groups())
    last = 0.25 + 2.0  # the last reward of a turn, and the outcome
    fifth = 1.0 + 0.25 * last
    assert of_data(data, "advantages") == [
        [0.0, 0.5 * (0.5 + 0.5 * fifth), 0.5 + 0.5 * fifth, 0.0, fifth],
        [0.5 * last, last],
        [0.0, 0.75 + 1.0, 0.0, 0.0, 0.0],
        [1.5],
        [0.25, 0.5],
    ]


def test_turns_are_calls():
    """Calls with nothing between them are turns of their own."""
    whole = [group([step([1], [2, 3], 1.0), step([1, 2, 3], [4], 3.0)], [step([1], [5], 0.0)], final=[0.0, 0.0])]
    by_turn = tc.Objective(tc.credit.returns(discount=0.5, unit="turn"))
    data, _ = adapter.assemble_training_data(by_turn, whole)
    assert of_data(data, "advantages") == [[2.5, 2.5, 3.0], [0.0]]


def test_rewards_of_turns_may_sum_to_the_outcomes():
    """By chance they do in every trajectory; both count."""
    whole = [group([step([1], [2, 3], 1.0)], [step([1], [5], 0.0)], final=[1.0, 0.0])]
    data, _ = adapter.assemble_training_data(RETURNS, whole)
    assert of_data(data, "advantages") == [[1.0, 2.0], [0.0]]


def test_nothing_to_train():
    assert adapter.assemble_training_data(RETURNS, [group([], [], final=[0.0, 1.0])]) == ([], [])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (group([step([], [2, 3], 1.0)], final=[0.0]), "ob: expected at least one token before the first action"),
        (group([step([1], [2], float("nan"))], final=[0.0]), "reward: expected finite numbers, got nan in row 0"),
    ],
)
def test_trajectories_that_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        adapter.assemble_training_data(RETURNS, [changed])


@pytest.mark.parametrize(
    ("objective", "message"),
    [(tc.methods.pods(), "expected no filters"), (tc.methods.otb(), "requires old_log_probs|requires squared_probs")],
)
def test_objectives_that_tinker_cannot_carry(objective, message):
    with pytest.raises(ValueError, match=message):
        adapter.assemble_training_data(objective, groups())


def test_recipe():
    """As ``docs/hosts.md`` prints it."""
    data, _ = recipes.run("Tinker")["training_data"](groups())
    assert any(len(set(x)) > 2 for x in of_data(data, "advantages"))
