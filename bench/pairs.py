"""Measure losses of pairs, ``prepare`` included, beside TRL's ``DPOTrainer`` and eager torch."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, main
from loss import ours, step


def eager(reference, mask, beta):
    """Return DPO's loss as trainers write it."""

    def loss(log_probs):
        chosen, rejected = ((log_probs - reference) * mask).sum(1).chunk(2)
        return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()

    return loss


def run(table: Table, quick: bool) -> None:
    from incumbents import trl_dpo_loss

    for pairs, length in ((16, 512),) if quick else ((16, 512), (64, 4_096)):
        rows, beta = 2 * pairs, 0.1
        lengths = torch.randint(length // 4, length + 1, (rows,))
        mask = torch.arange(length) < lengths[:, None]
        reference, aligned = -torch.rand(rows, length) * mask, -torch.rand(rows, length) * mask
        tokens = torch.zeros(pairs, length, dtype=torch.long)
        batch = tc.Rollouts.from_pairs(
            tokens,
            tokens,
            *mask.chunk(2),
            ref_log_probs=reference.chunk(2),
            aligned_log_probs=aligned.chunk(2),
        )
        trl, plain = trl_dpo_loss(beta), eager(reference, mask, beta)

        def made(name, batch=batch, beta=beta):
            objective = tc.methods.load(name, beta=beta)
            return lambda x: ours(objective, objective.prepare(batch))(x)

        # TRL has the chosen responses first; from_pairs has the two responses of a pair beside each other.
        order = torch.arange(rows).view(2, pairs).T.reshape(-1)

        def inputs(reference=reference, mask=mask, order=order):
            x = (reference + 0.1 * torch.randn_like(reference)) * mask
            return x, x[order]

        def same(ours, theirs, order=order):
            torch.testing.assert_close(ours, theirs[order], rtol=1e-3, atol=1e-6)

        dpo, tgdpo, written = step(made("dpo")), step(made("tgdpo")), step(plain)
        stock = step(lambda x, f=trl, m=mask, r=reference: f(x * m, r, m))
        table.measure(
            "DPO, prepare + loss",
            f"{pairs} pairs x {length}",
            inputs,
            13 * rows * length,  # two log-probs and the mask read, the gradient written
            {
                "tokcredit": lambda _, x, f=dpo: f(x),
                "TRL": lambda x, _, f=stock: f(x),
                "torch eager": lambda x, _, f=written: f(x),
            },
            same,
            {"TRL": 1, "torch eager": 1},
        )
        table.measure(
            "TGDPO, prepare + loss",
            f"{pairs} pairs x {length}",
            inputs,
            17 * rows * length,
            {"tokcredit": lambda _, x, f=tgdpo: f(x), "TRL's DPO": lambda x, _, f=stock: f(x)},
            None,
            {"TRL's DPO": 1},
        )


if __name__ == "__main__":
    main(run)
