"""The plain loop runs as its first lines say, and a step of it favours the replies with more reward.

Loops of host trainers are in ``tests/adapters``.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tokcredit as tc
import torch

EXAMPLE = Path(__file__).parents[1] / "examples/grpo.py"
COMMANDS = re.findall(r"^    python examples/grpo\.py(.*)$", EXAMPLE.read_text(), re.M)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("plain_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_docstring_shows_a_method_and_a_mixture():
    assert len(COMMANDS) == 2 and "--ratio" in COMMANDS[1] and "--ratio" not in COMMANDS[0]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_the_printed_commands_run(arguments):
    command = [sys.executable, EXAMPLE, *shlex.split(arguments), "--steps", "2"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rewards = [float(x) for x in re.findall(r"^step +\d+ +reward ([\d.]+)", out, re.M)]
    assert len(rewards) == 2 and all(0 <= r <= 1 for r in rewards)


@pytest.mark.parametrize("method", ["grpo", "tempo", "ctpo", "ba"])
def test_a_small_step_favours_the_replies_with_more_reward(example, method):
    """Whatever the weights of the policy are: replies are given, and the step goes along the gradient."""
    torch.manual_seed(0)
    policy = example.Policy(8).double()
    prompts = torch.tensor([[3]] * 4 + [[7]] * 4)
    replies = torch.tensor([[3, 3, 1], [3, 1, 1], [1, 1, 1], [3, 3, 3], [7, 7, 7], [2, 7, 2], [7, 2, 2], [2, 2, 2]])
    rewards = (replies == prompts).double().mean(1)
    mask = torch.ones_like(replies, dtype=torch.bool)
    old = policy.log_probs(prompts, replies).detach()
    batch = tc.Rollouts.from_padded(replies, mask, prompts[:, 0], rewards, old_log_probs=old)
    objective = tc.methods.load(method)
    prepared = objective.prepare(batch)
    objective.loss(prepared, policy.log_probs(prompts, replies)).loss.backward()
    with torch.no_grad():
        for p in policy.parameters():
            p -= 1e-4 * p.grad
    moved = policy.log_probs(prompts, replies).detach() - old
    weight = prepared.row_weights if prepared.row_weights.dim() == 0 else prepared.row_weights.expand(8, 3)
    assert (moved * prepared.advantages * weight).sum() > 0
    assert set(prepared.advantages.sign().unique().tolist()) >= {-1.0, 1.0}
