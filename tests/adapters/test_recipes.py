"""Recipes of ``docs/hosts.md`` for hosts that are not on PyPI, run as printed, called as the hosts' sources do."""

import dataclasses
import enum
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokcredit as tc
import torch

sys.path.insert(0, str(Path(__file__).parent))

import rows as rr

HOSTS = Path(__file__).parents[2] / "docs/hosts.md"
ROWS = rr.batch()
TEMPO_CTPO = dataclasses.replace(tc.methods.ctpo(), credit=tc.methods.tempo().credit)


def recipe(host, monkeypatch, **modules):
    """The names that the recipe for a host defines, its host's modules holding no more than these."""
    for name, members in modules.items():
        parts = name.split("__")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        vars(sys.modules[".".join(parts)]).update(members)
    (code,) = re.findall(rf"```python\n(# my\.py: {host}\n.*?)```", HOSTS.read_text(), re.DOTALL)
    names: dict[str, Any] = {"tc": tc, "torch": torch, "dataclasses": dataclasses}
    exec(compile(code, str(HOSTS), "exec"), names)
    return names


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def test_prime_rl(monkeypatch):
    """One call per sequence, prompt included; the sum is divided by the tokens of all."""
    loss = recipe("prime-rl", monkeypatch, prime_rl__trainer__rl__loss={"LossOutputs": LossOutputs})["loss"]
    advantages, expected, gradient = rr.expected(TEMPO_CTPO, ROWS)
    found, total, tokens = [], 0.0, sum(int(row["mask"].sum()) for row in ROWS)
    for row, of_row in zip(ROWS, advantages.split([len(row["response"]) for row in ROWS]), strict=True):
        before = torch.zeros(len(row["prompt"]))
        current = torch.cat([before, row["log_probs"]]).requires_grad_()
        out = loss(
            LossInputs(
                trainer_logprobs=current,
                inference_logprobs=torch.cat([before, row["old_log_probs"]]),
                ref_logprobs=None,
                advantages=torch.cat([before + 7, of_row]),
                loss_mask=torch.cat([before, row["mask"]]).bool(),
            )
        )
        assert all(x.dim() == 0 for x in out.metrics.values())
        (out.loss / tokens).backward()
        total += out.loss.item() / tokens
        found.append(current.grad[len(before) :])
    assert total == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat(found), gradient, rtol=1e-5, atol=1e-8)


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


def test_nemo_rl(monkeypatch):
    """Micro-batches of right-padded rows, prompt included, one of which ``sample_mask`` leaves out."""
    members = {"LossType": LossType, "LossInputType": LossInputType}
    loss_fn = recipe("NeMo-RL", monkeypatch, nemo_rl__algorithms__loss__interfaces=members)["CtpoLoss"]()
    assert loss_fn.loss_type is LossType.TOKEN_LEVEL and loss_fn.input_type is LossInputType.LOGPROB
    advantages, expected, gradient = rr.expected(TEMPO_CTPO, ROWS)
    lengths = [len(row["response"]) for row in ROWS]

    def whole(xs, outside=0.0):
        return rr.right(
            [torch.cat([torch.full((len(r["prompt"]),), outside), x]) for r, x in zip(ROWS, xs, strict=True)]
        )

    extra = [0, *range(len(ROWS))]  # the first row twice, and only once in the loss
    data = {
        "token_mask": whole([row["mask"].float() for row in ROWS])[extra],
        "sample_mask": torch.tensor([0.0] + [1.0] * len(ROWS)),
        "prev_logprobs": whole([row["old_log_probs"] for row in ROWS])[extra],
        "advantages": whole(advantages.split(lengths), 7.0)[extra],
    }
    current = whole([row["log_probs"] for row in ROWS])[extra].requires_grad_()
    tokens, total = torch.tensor(sum(int(row["mask"].sum()) for row in ROWS)), 0.0
    for part in (slice(0, 7), slice(7, 17)):
        micro = {name: x[part] for name, x in data.items()}
        loss, metrics = loss_fn(
            data=micro,
            global_valid_seqs=torch.tensor(len(ROWS)),
            global_valid_toks=tokens,
            next_token_logprobs=current[part][:, 1:],
        )
        loss.backward()
        total += loss.item()
        assert metrics == {"loss": loss.item(), "num_valid_samples": micro["sample_mask"].sum().item()}
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert (current.grad[0] == 0).all()
    found = [x[len(r["prompt"]) :][: len(r["response"])] for r, x in zip(ROWS, current.grad[1:], strict=True)]
    torch.testing.assert_close(torch.cat(found), gradient, rtol=1e-5, atol=1e-8)
