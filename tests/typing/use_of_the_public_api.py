"""The public API in use, with types: ``make lint`` checks this file with mypy, and ``test_typing.py`` runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import tokcredit as tc
import torch
from tokcredit import schedule
from tokcredit.protocol import PreparedBatch, TrainingObjective
from tokcredit.stages.base import flag, number, part
from torch import Tensor


@dataclass(frozen=True)
class shaped_reward(tc.credit.Credit):
    """A stage of a user: the reward of a row, minus a cost of its length."""

    cost: float = number(0.01, at_least=0)
    centred: bool = flag(True)
    of: tc.credit.Credit = part(tc.credit.Credit, tc.credit.group_normalized)
    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, batch: tc.Rollouts) -> Tensor:
        return self.of(batch) - self.cost * batch.lengths[:, None]


@dataclass(frozen=True)
class short_rows(tc.filters.Filter):
    """A filter of a user."""

    longest: float = number(100.0, above=0)

    def __call__(self, batch: tc.Rollouts, advantages: Tensor | None) -> Tensor:
        return (batch.lengths <= self.longest)[:, None]


@dataclass(frozen=True)
class halved(tc.scale.Scale):
    """An advantage scale of a user."""

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: tc.Spans,
        window: tc.clip.Window,
        signal: Tensor | None,
    ) -> Tensor:
        return torch.full_like(log_ratio, 0.5)


def data() -> tc.Rollouts:
    """Batches from packed tensors, from padded tensors, and with inputs."""
    edges = torch.tensor([0, 3, 5])
    packed = tc.Rollouts(
        tokens=torch.arange(5),
        cu_seqlens=edges,
        group_ids=torch.tensor([0, 0]),
        rewards=torch.tensor([1.0, 0.0]),
        response_mask=torch.tensor([True, False, True, True, True]),
        old_log_probs=torch.full((5,), -1.0),
        extras={"state_values": torch.zeros(5)},
    )
    padded = tc.Rollouts.from_padded(
        torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), torch.tensor([0, 0]), torch.tensor([1.0, 0.0])
    )
    with_entropies: tc.Rollouts = packed.with_inputs(entropies=torch.rand(5), ref_log_probs=torch.full((5,), -1.5))
    entropies: Tensor = with_entropies.input("entropies")
    spans: tc.Spans = packed.spans
    lengths: Tensor = spans.lengths
    rows: int = padded.num_rows
    shape: tuple[int, int] | None = padded.shape
    assert entropies.numel() == 5 and lengths.tolist() == [3, 2] and (rows, shape) == (2, (2, 3))
    return with_entropies


def blocks(batch: tc.Rollouts) -> None:
    """Arithmetic on spans, groups and ids."""
    spans, groups = batch.spans, batch.groups
    x = torch.rand(batch.num_tokens)
    running: Tensor = tc.scan.cumulative(x, spans)
    of_rows: Tensor = tc.segment.mean(x, spans)
    of_groups: Tensor = tc.segment.maximum(batch.rewards, groups)
    keys: tc.segment.Ids = tc.segment.keys(batch.group_index, torch.tensor([0, 1]))
    chosen: Tensor = tc.select.top_k(x, 1, spans, tc.select.everything(spans))
    kept: Tensor = tc.select.top_share(x, tc.select.Share(0.5, "nearest"), spans, protected=chosen)
    order: Tensor = tc.select.diverse(x, torch.randn(len(x), 3), 1, spans)
    replaced: Tensor = tc.attribution.uniform(5)(order[None], kept[None], None)
    trees: tc.tree.PrefixTree = tc.tree.build(batch)
    values: Tensor = tc.values.monte_carlo(trees)
    credit: Tensor = trees.expand(head=tc.values.temporal_difference(trees, values))
    log_probs, entropies = tc.log_probs.with_entropies(torch.rand(5, 7), batch.tokens)
    own, _ = tc.head.log_probs_and_entropies(torch.rand(5, 4), torch.rand(7, 4), batch.tokens)
    kl: Tensor = tc.divergence.kl(torch.rand(5, 7), torch.rand(5, 7))
    teacher = tc.divergence.Top(torch.zeros(5, 1, dtype=torch.long), torch.full((5, 1), -0.5))
    js: Tensor = tc.divergence.between(torch.rand(5, 7), teacher, "js", 0.5)
    gap: Tensor = tc.mismatch.statistics(log_probs, log_probs, batch.spans)["kl"]
    remaining: Tensor = tc.length.remaining(spans)
    made: tc.Spans = tc.Spans.from_padded(torch.tensor([2, 1]), 3)
    tensors = (running, of_rows, of_groups, chosen, credit, log_probs, entropies, own, kl, js, gap, remaining, replaced)
    assert all(isinstance(t, Tensor) for t in tensors) and keys.segments == 2 and made.size == 6


def objective() -> tc.Objective:
    """An objective with a stage of every kind."""
    return tc.Objective(
        credit=tc.credit.sum(shaped_reward(0.1), tc.methods.tempo().credit, weight=schedule.linear(0.0, 1.0)),
        filters=(short_rows(50.0), tc.filters.within("k3", "mean", high=0.5, to="ref_log_probs")),
        token_weights=(tc.token_weights.raised(tc.token_score.given("entropies"), 0.5),),
        ratio=tc.ratio.cumulative(high=5.0, to="old_log_probs"),
        clip=tc.clip.growing(0.1, 0.2, cap=0.5),
        scales=(halved(), tc.scale.within("ratio", high=4.0)),
        aggregation=tc.aggregation.sequence_sum(100),
        terms=(tc.term.kl(schedule.target_kl(), "k3", limit=10.0), tc.term.entropy(0.01)),
    )


def step(objective: TrainingObjective[Any], batch: tc.Rollouts, state: schedule.State, **variables: Tensor) -> float:
    """One optimizer step of any objective, in micro-batches."""
    prepared: PreparedBatch = objective.prepare(batch, progress=0.5, state=state)
    total = 0.0
    for rows in ([0], [1]):
        part_of_batch = prepared.select(rows)
        chosen = prepared.batch.selection(rows)
        own = chosen.of_tokens(torch.full((batch.num_tokens,), -1.1)).requires_grad_()
        further = {name: chosen.of_tokens(x) for name, x in variables.items()}
        out: tc.Loss = objective.loss(part_of_batch, own, **further)
        out.loss.backward()
        metrics: Mapping[str, Tensor] = out.metrics
        total += float(metrics["loss"])
    return total


def mixing() -> None:
    """Methods by name, alone and mixed."""
    names: tuple[str, ...] = tc.methods.names()
    mixed = tc.mix("grpo", credit="tempo", ratio="ctpo", terms=("kl(0.01)",))
    pairs: tc.Preference = tc.methods.dpo()
    texts: tc.Supervised = tc.methods.sft()
    required: frozenset[str] = mixed.required_inputs | pairs.required_inputs | texts.required_inputs
    corrected: tc.Objective = tc.rollout_correction.from_verl(tc.methods.grpo(), {"rollout_is": "token"})
    entry: tc.inputs.Input = tc.inputs.get("entropies")
    assert "rollout_log_probs" in corrected.required_inputs
    assert "grpo" in names and required == {"ref_log_probs"} and entry.shape == "[N]"


def preferences() -> None:
    """Pairs of a chosen and a rejected row."""
    tokens, mask = torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
    batch = tc.Rollouts.from_pairs(tokens, tokens, mask, mask, ref_log_probs=(-torch.ones(1, 3), -torch.ones(1, 3)))
    dpo = tc.Preference(link=tc.link.logistic(beta=0.5), transform=tc.pair.f_divergence("js"))
    loss: tc.Loss = dpo.loss(dpo.prepare(batch), -torch.ones(2, 3))
    assert loss.loss.dim() == 0


def decoding() -> None:
    """Logits processors and rewards."""
    hotter = tc.decoding.temperature.AdaptiveTemperature(0.7)
    shorter = tc.decoding.length.LengthTilt(lambda ids, candidates: torch.zeros(candidates.shape), beta=-1.0)
    scores: Tensor = shorter(torch.zeros(1, 1), hotter(torch.zeros(1, 1), torch.rand(1, 9)))
    reward: list[float] = tc.rewards.matching.rewards([1.0], [])
    assert scores.shape == (1, 9) and reward == [1.0]


def packing(batch: tc.Rollouts) -> None:
    """A plan that computes shared tokens once."""
    prompts = torch.ones(batch.num_rows, 1, dtype=torch.long)
    plan: tc.packing.TreePack = tc.packing.pack(batch.with_inputs(prompt_tokens=prompts), budget=100)
    part: tc.packing.TreePart = plan.part(0)
    per_token: Tensor = part.to_rows(torch.zeros(part.source.numel()))
    assert per_token.dim() == 1


def main() -> None:
    """Run everything."""
    batch, state = data(), schedule.State()
    blocks(batch)
    chosen = objective()
    assert step(chosen, batch, state, entropies=torch.rand(batch.num_tokens)) != 0
    state.observe(chosen, {"kl": 0.2})
    saved: dict[str, tuple[float, ...]] = state.state_dict()
    schedule.State().load_state_dict(saved)
    assert step(tc.Supervised(), batch, state) != 0
    mixing()
    preferences()
    decoding()
    packing(batch)
    threads: int = tc.num_threads()
    tc.set_num_threads(threads)
    info: dict[str, Any] = tc.build_info()
    assert "cuda" in info


if __name__ == "__main__":
    main()
