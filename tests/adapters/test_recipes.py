"""``docs/hosts.md``: recipes for hosts that are not on PyPI, called as the hosts' sources do, and the table of stages.

Recipes for hosts on PyPI run in the tests of their adapters, inside the host's own environment.
"""

import enum
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tokcredit as tc
import torch
from tokcredit.adapters.capabilities import given_advantages
from tokcredit.stages.base import Stage

sys.path.insert(0, str(Path(__file__).parent))

import recipes
import rows as rr

ROWS = rr.batch()
TEMPO_CTPO = tc.mix("ctpo", credit="tempo")
# The test that runs the Python block of each section.
RUN_BY = {
    "TRL": "test_trl",
    "verl": "test_verl",
    "vLLM": "test_vllm",
    "SkyRL": "test_skyrl",
    "OpenRLHF": "test_openrlhf",
    "AReaL": "test_areal",
    "slime": "test_slime",
    "Tinker": "test_tinker",
    "rLLM": "test_rllm",
    "verifiers": "test_verifiers",
    "prime-rl": "test_recipes",
    "NeMo-RL": "test_recipes",
    "A loop of your own": "test_recipes",
    "A loss from a teacher": "test_recipes",
    "Another trainer's output layer": "test_recipes",
}


def test_every_block_is_run():
    """No section has a Python block that no test runs."""
    assert [name for name in recipes.sections() if recipes.blocks(name)] == list(RUN_BY)
    for section, module in RUN_BY.items():
        assert f'recipes.run("{section}"' in (Path(__file__).parent / f"{module}.py").read_text(), section


def test_a_loop_without_logits(capsys):
    """The block prints what its last comment says, and its log-probs are those of all logits."""
    names = recipes.run("A loop of your own")
    (block,) = recipes.blocks("A loop of your own")
    assert f"# {capsys.readouterr().out.strip()}\n" in block
    prompts, responses = names["prompts"], names["responses"]
    logits = names["model"](names["ids"][:, :-1]).logits[:, prompts.shape[1] - 1 :]
    expected = logits.log_softmax(-1).gather(-1, responses[..., None])[..., 0]
    torch.testing.assert_close(names["out"].log_probs, expected.detach())


def test_a_loss_from_a_teacher(capsys):
    names = recipes.run("A loss from a teacher")
    (block,) = recipes.blocks("A loss from a teacher")
    assert f"# {capsys.readouterr().out.strip()}\n" in block
    gradient, mask = names["student"].grad, names["mask"]
    assert gradient[mask].any() and not gradient[~mask].any()


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_output_layers_of_other_trainers(alone):
    """Called as the sources of NeMo-RL and prime-rl call the functions that these replace."""
    names = recipes.run("Another trainer's output layer")
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(x, generator=g, requires_grad=True) for x in ((2, 5, 4), (9, 4)))
    target = torch.randint(0, 9, (2, 5), generator=g)
    temperature = 0.5 + torch.rand(2, 5, generator=g)
    weights = torch.linspace(-1, 1, 10).view(2, 5)

    def expected(scale):
        log_p = (hidden @ weight.t() / scale).log_softmax(-1)
        return log_p.gather(-1, target[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    def same(found, truth):
        torch.testing.assert_close(found, truth)
        leaves = hidden, weight
        gradients = (torch.autograd.grad((x * weights).sum(), leaves, retain_graph=True) for x in (found, truth))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

    by_time = hidden.transpose(0, 1)
    same(names["nemo_rl"](by_time, target, weight, 0, 9, 3, alone), expected(1.0)[0])
    assert not names["nemo_rl"](by_time, target, weight, 0, 9, 3, alone, True).requires_grad
    found = names["prime_rl"](SimpleNamespace(weight=weight), hidden, labels=target, temperature=temperature)
    for name, truth in zip(("logprobs", "entropy"), expected(temperature[..., None]), strict=True):
        same(found[name], truth)


NUMBERS = {
    **dict.fromkeys(("low", "high", "threshold", "share", "weight", "coefficient", "penalty", "strength"), 0.5),
    **dict.fromkeys(("clip_ratio_low", "clip_ratio_high", "eps_clip_low", "eps_clip_high", "epsilon"), 0.2),
    **dict.fromkeys(("dppo_mask_low", "dppo_mask_high", "ipo_threshold", "kl_tau"), 0.2),
    **dict.fromkeys(("clip_min", "tis_clip_low", "delta_low", "delta_high", "opsm_delta"), 0.1),
    **dict.fromkeys(("clip_ratio_c", "rollout_is_threshold", "epsilon_high", "delta", "cap", "clip_max"), 3.0),
    **dict.fromkeys(("tau_pos", "tau_neg", "sapo_temperature_pos", "sapo_temperature_neg", "tis_clip"), 1.05),
    **dict.fromkeys(("dro_beta", "kl_loss_coef", "beta", "entropy_coeff", "entropy_coef", "entropy_loss_coef"), 0.1),
    **dict.fromkeys(("k_pos", "lambda_pos", "k_neg", "lambda_neg", "target", "start"), 0.5),
    **dict.fromkeys(("clip_ratio", "clip_cov_ratio", "kl_cov_ratio", "kl_cov_frac", "clip_cov_lb", "ppo_kl_coef"), 0.1),
    **dict.fromkeys(("clip_cov_ub", "horizon"), 5.0),
    **dict.fromkeys(("gamma", "lam", "lambd", "value_clip", "cpo_alpha", "simpo_gamma", "alpha", "discopop_tau"), 0.5),
    "label_smoothing": 0.1,
    **dict.fromkeys(("loss_scale_factor", "max_completion_length", "max_seq_len"), 64),
    "rs_veto_threshold": 1e-4,
    "scale": True,
    "config": {"rollout_is": "token", "rollout_rs": "token_k2", "rollout_rs_threshold": 0.5},
    "objective": tc.methods.grpo(),
    "over": "mean",
    "estimator": "k2",
    "rule": tc.filters.nonzero_advantage(),
}


def stages_of_the_table():
    _, _, table = recipes.HOSTS.read_text().partition("## Options of the hosts")
    for line in table.splitlines():
        cells = line.strip("| ").split(" | ")
        if line.startswith("| ") and len(cells) == 2:
            yield from re.findall(r"`([a-z_]+\.[a-z_]+\(.*?\))`", cells[1])


@pytest.mark.parametrize("text", sorted(set(stages_of_the_table())))
def test_stages_of_the_table_can_be_made(text):
    kinds = ("aggregation", "clip", "credit", "filters", "link", "methods", "pair", "ratio", "term", "token_score")
    modules = {name: getattr(tc, name) for name in (*kinds, "token_weights", "rollout_correction", "schedule")}
    names = {**NUMBERS, **modules, "log": math.log, "inf": math.inf, "target_entropy": tc.schedule.target_entropy}
    if text.startswith("scale."):
        names["scale"] = tc.scale
    if "icepop" in text:
        names["high"] = 2.0
    made = eval(text.replace("(...)", "(0.5)").replace("=...", "=0.5"), names)
    found = made if isinstance(made, tuple) else (made,)
    assert found and all(isinstance(x, Stage) for x in found)


def with_modules(monkeypatch, **modules):
    """Modules of a host that is not installed, with no more than these names."""
    for name, members in modules.items():
        parts = name.split("__")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        vars(sys.modules[".".join(parts)]).update(members)


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def test_prime_rl(monkeypatch):
    """One call per sequence, prompt included; the sum is divided by the tokens of all."""
    with_modules(monkeypatch, prime_rl__trainer__rl__loss={"LossOutputs": LossOutputs})
    loss = recipes.run("prime-rl", 1)["loss"]
    advantages, expected, gradient = rr.expected(TEMPO_CTPO, ROWS)
    found, total, tokens = [], 0.0, sum(int(row["mask"].sum()) for row in ROWS)
    for row, of_row in zip(ROWS, advantages.split([len(row["response"]) for row in ROWS]), strict=True):
        before = torch.zeros(len(row["prompt"]))
        current = torch.cat([before, row["log_probs"]]).requires_grad_()
        inputs = LossInputs(
            trainer_logprobs=current,
            inference_logprobs=torch.cat([before, row["old_log_probs"]]),
            ref_logprobs=None,
            advantages=torch.cat([before + 7, of_row]),
            loss_mask=torch.cat([before, row["mask"]]).bool(),
        )
        out = loss(inputs)
        assert all(x.dim() == 0 for x in out.metrics.values())
        weights = torch.full_like(current, 3.0).detach()
        weighted = loss(replace(inputs, loss_weights=weights))
        torch.testing.assert_close(weighted.loss, 3 * out.loss)
        (out.loss / tokens).backward()
        total += out.loss.item() / tokens
        found.append(current.grad[len(before) :])
    assert total == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat(found), gradient, rtol=1e-5, atol=1e-8)


def test_prime_rl_default_loss():
    """Its loss, as the sources have it, is that of the stages in the table; ``kl_tau`` pulls at masked tokens too."""
    log_probs, engine, advantages = (
        torch.cat([row[name] for row in ROWS]).double() for name in ("log_probs", "old_log_probs", "log_probs")
    )
    advantages = advantages - advantages.mean()
    engine = engine + torch.linspace(-0.5, 0.5, len(engine), dtype=torch.float64)
    log_probs = log_probs.clamp(max=-0.01)
    low, high, kl_tau = 0.02, 0.03, 0.1
    theirs = log_probs.clone().requires_grad_()
    log_ratio, moved = theirs - engine, (theirs.exp() - engine.exp()).detach()
    stopped = torch.where(advantages > 0, moved > high, moved < -low)
    loss = torch.where(stopped, 0, -advantages * log_ratio.exp()) + kl_tau * log_ratio**2
    loss.mean().backward()
    assert 0 < stopped.sum() < len(stopped)
    objective = tc.mix(
        tc.methods.dppo_tv(low, high, None),
        credit=given_advantages(),
        aggregation="token_mean()",
        terms=tc.term.kl(2 * kl_tau, "k2", to="rollout_log_probs"),
    )
    n = len(engine)
    batch = tc.Rollouts(
        torch.zeros(n, dtype=torch.long),
        torch.tensor([0, n]),
        torch.zeros(1, dtype=torch.long),
        torch.zeros(1),
        rollout_log_probs=engine,
        extras={"advantages": advantages},
    )
    ours = log_probs.clone().requires_grad_()
    objective.loss(objective.prepare(batch), ours).loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


def test_nemo_rl(monkeypatch):
    """Micro-batches of right-padded rows, prompt included, one of which ``sample_mask`` leaves out."""
    members = {"LossType": LossType, "LossInputType": LossInputType}
    with_modules(monkeypatch, nemo_rl__algorithms__loss__interfaces=members)
    loss_fn = recipes.run("NeMo-RL")["CtpoLoss"]()
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
