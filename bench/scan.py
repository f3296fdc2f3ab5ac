"""Measure advantages and returns along rows beside verl's loops and torchrl's convolution."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, close, main
from tokcredit import Spans
from tokcredit.blocks import scan


def run(table: Table, quick: bool) -> None:
    from incumbents import AlgoConfig, unwhitened, vec_generalized_advantage_estimate, verl

    rows, length = (128, 2_048) if quick else (1_024, 16_384)
    n, shape = rows * length, f"{rows} x {length}"
    mask = torch.rand(rows, length) > 0.05
    real = mask.float()
    dense = Spans.from_cu_seqlens(torch.arange(rows + 1) * length)
    spans = dense.with_mask(mask.reshape(-1))
    gamma, trace = 0.99, 0.95

    def advantages(rewards, values):
        y = scan.generalized_advantages(rewards.reshape(-1), values.reshape(-1), spans, gamma, trace)
        y = y.view(rows, length)
        return y, y + values

    def loop(rewards, values):
        return unwhitened(verl.compute_gae_advantage_return)(rewards, values, real, gamma, trace)

    def where_trained(ours, theirs):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a[mask], b[mask], rtol=1e-3, atol=1e-3)

    table.measure(
        "GAE, masked",
        shape,
        lambda: (torch.randn(rows, length) * real, torch.randn(rows, length)),
        17 * n,
        {"tokcredit": advantages, "verl": loop},
        where_trained,
        {"verl": 20},
    )

    # Episodes of 8 calls of the model, each a row of its own for us; verl gets them as whole rows.
    calls, short = rows // 8 * 8, length // 8
    episodes = torch.arange(calls) // 8
    kept = mask[:calls, :short]
    packed = tc.Rollouts(
        torch.zeros(calls * short, dtype=torch.int32),
        torch.arange(calls + 1) * short,
        episodes // 8,
        None,
        kept.reshape(-1),
        trajectory_ids=episodes,
        token_rewards=torch.zeros(calls * short),
    )
    objective, whole = tc.Objective(tc.credit.gae(gamma, trace)), kept.reshape(calls // 8, 8 * short)

    def of_episodes(rewards, values):
        batch = packed.with_inputs(token_rewards=rewards.reshape(-1), values=values.reshape(-1))
        return objective.prepare(batch).credit.view(rewards.shape)

    def where_chosen(ours, theirs):
        torch.testing.assert_close(ours[whole], theirs[whole], rtol=1e-3, atol=1e-3)

    table.measure(
        "GAE, episodes of 8 rows",
        f"{calls} x {short}",
        lambda: (torch.randn(whole.shape) * whole, torch.randn(whole.shape)),
        13 * whole.numel(),
        {
            "tokcredit": of_episodes,
            "verl, whole rows": lambda r, v: unwhitened(verl.compute_gae_advantage_return)(
                r, v, whole.float(), gamma, trace
            )[0],
        },
        where_chosen,
        {"verl, whole rows": 20},
    )

    done = torch.zeros(rows, length, 1, dtype=torch.bool)
    done[:, -1] = True

    def torchrl(rewards, values):
        following = torch.cat([values[:, 1:], torch.zeros(rows, 1)], 1)
        arguments = (values[..., None], following[..., None], rewards[..., None], done, done)
        return vec_generalized_advantage_estimate(gamma, trace, *arguments)[0][..., 0]

    table.measure(
        "GAE, dense",
        shape,
        lambda: (torch.randn(rows, length), torch.randn(rows, length)),
        12 * n,
        {
            "tokcredit": lambda r, v: scan.generalized_advantages(r.reshape(-1), v.reshape(-1), dense, gamma, trace),
            "torchrl vectorised": torchrl,
        },
        close(1e-3, 1e-3),
        {"torchrl vectorised": 20},
    )

    config = AlgoConfig(gamma=gamma)
    table.measure(
        "returns, masked",
        shape,
        lambda: (torch.randn(rows, length) * real,),
        9 * n,
        {
            "tokcredit": lambda r: scan.returns(r.reshape(-1), spans, gamma),
            "verl": lambda r: unwhitened(verl.compute_reinforce_plus_plus_outcome_advantage)(r, real, config)[1],
        },
        close(1e-3, 1e-3),
        {"verl": 20},
    )


if __name__ == "__main__":
    main(run)
