import math
import traceback
from fractions import Fraction

import numpy as np
import pytest
import torch
from tokcredit.rewards.bounded import Failure
from tokcredit.train.judging import BoundedReward, Judging, RewardError
from tokcredit.train.problems import Problem


def problem(reward, question="How much?", answer="7"):
    return Problem("test", question, answer, reward)


def returning(value):
    return problem(lambda response: value)


def failing(response):
    if "bad" in response:
        raise KeyError("missing")
    return 0.25


VALUES = [1, 0.5, True, -3, Fraction(1, 4), np.float32(0.5), np.int64(2), np.array(0.5), torch.tensor(0.5)]
NO_VALUES = [
    None,
    math.nan,
    math.inf,
    -math.inf,
    "1.0",
    "",
    b"1",
    [1.0],
    [],
    [1.0, 0.0],
    (0.5,),
    {},
    {"reward": 1.0},
    1j,
]
NO_VALUES += [torch.tensor([0.5]), torch.tensor([0.5, 1.0]), np.array([1.0]), torch.tensor(math.nan), np.float64("inf")]
NO_VALUES += [10**400, object(), np.array("1")]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_one_finite_number_is_a_reward(value):
    rewards = Judging()([returning(value)], ["reply"])
    assert rewards == [float(value)] and type(rewards[0]) is float


@pytest.mark.parametrize("value", NO_VALUES, ids=lambda value: repr(value)[:20])
def test_everything_else_is_named(value):
    with pytest.raises(RewardError) as caught:
        Judging()([returning(1.0), returning(value)], ["fine", "the reply"])
    text = str(caught.value)
    assert text.startswith(f"reward: expected one finite number, got {value!r:.200}\n")
    assert "prompt: 'How much?'" in text and "reply: 'the reply'" in text


def test_a_value_without_a_text_is_named():
    class Silent:
        def __repr__(self):
            raise RuntimeError

    with pytest.raises(RewardError, match="reward: expected one finite number, got a value of type Silent\n"):
        Judging()([returning(Silent())], ["x"])


def test_an_error_is_named_with_its_own_traceback():
    with pytest.raises(RewardError) as caught:
        Judging()([problem(failing)] * 2, ["good", "so bad"])
    text = str(caught.value)
    assert text.startswith("reward: KeyError: 'missing'\n") and "prompt: 'How much?'" in text
    assert "reply: 'so bad'" in text and "reply: 'good'" not in text
    lines = text.splitlines()
    assert sum(line.lstrip().startswith("File ") for line in lines) == 1 and 'raise KeyError("missing")' in text
    assert "test_judging.py" in text and 'judging.py", line' not in text.replace('test_judging.py", line', "")
    assert isinstance(caught.value.__context__, KeyError)
    assert "".join(traceback.format_exception(caught.value)).count("KeyError") == 3, "the message, its line, its end"


def test_long_prompts_and_replies_are_cut():
    with pytest.raises(RewardError) as caught:
        Judging()([problem(failing, "q" * 10000)], ["bad" * 10000])
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(("policy", "instead"), [("zero", 0.0), ("drop", math.nan)])
def test_policies(policy, instead, caplog):
    judging = Judging(policy)
    problems = [problem(failing), problem(failing), returning(None), problem(failing)]
    rewards = judging(problems, ["good", "bad", "none", "bad again"])
    np.testing.assert_equal(rewards, [0.25, instead, instead, instead])
    assert judging.failures() == 3 and judging.failures() == 0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3 and all(r.levelname == "WARNING" for r in caplog.records)
    for message, reply in zip(messages, ("'bad'", "'none'", "'bad again'"), strict=True):
        assert "prompt: 'How much?'" in message and f"reply: {reply}" in message
    # The traceback is shown once.
    assert ["Traceback" in message for message in messages] == [True, False, False]


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match="on_reward_error: expected stop, zero, drop, got 'skip'"):
        Judging("skip")


def test_an_interrupt_is_no_failure_of_the_reward():
    def interrupted(response):
        raise KeyboardInterrupt

    for policy in ("stop", "zero", "drop"):
        with pytest.raises(KeyboardInterrupt):
            Judging(policy)([problem(interrupted)], ["x"])


@pytest.mark.parametrize("policy", ["stop", "zero", "drop"])
def test_a_reply_beyond_the_limits_has_reward_0_and_is_counted(policy, caplog):
    asked = []

    def calls(arguments):
        asked.append(arguments)
        return [Failure("no result within 2 s") if "tower" in text else float(number) for number, text in arguments]

    def bounded(number):
        return problem(BoundedReward(calls, (number,), str.strip))

    judging = Judging(policy)
    problems = [bounded(1), returning(0.5), bounded(2), bounded(3)]
    assert judging(problems, [" a ", "b", "the tower ", "c"]) == [1.0, 0.5, 0.0, 3.0]
    # One batch for all that the same calls judge.
    assert asked == [[(1, "a"), (2, "the tower"), (3, "c")]]
    assert judging.failures() == 1
    (record,) = caplog.records
    for part in ("no result within 2 s", "the reward is 0", "reply: 'the tower '", "prompt: 'How much?'"):
        assert part in record.getMessage()
    assert bounded(4).reward("x") == 4.0 and bounded(4).reward("tower") == 0.0
