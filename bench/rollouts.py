"""Measure moving rows between the padded and the packed layout beside verl's functions and boolean indexing."""

from __future__ import annotations

import tokcredit as tc
import torch
from harness import Table, close, main


def run(table: Table, quick: bool) -> None:
    from incumbents import verl_padding
    from tensordict import NonTensorData, TensorDict
    from verl.utils.attention_utils import unpad_input

    for rows, length in ((128, 512), (512, 128)) if quick else ((1_024, 8_192), (16_384, 512)):
        lengths = torch.randint(length // 4, length + 1, (rows,))
        real = torch.arange(length) < lengths[:, None]
        attention = real.long()
        total, shape = int(lengths.sum()), f"{rows} x {length}"
        groups = torch.arange(rows) // 8
        padded = tc.Rollouts.from_padded(torch.zeros(rows, length, dtype=torch.int32), real, groups, torch.rand(rows))
        edges = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        tokens = torch.zeros(total, dtype=torch.int32)
        packed = tc.Rollouts(tokens, edges, groups, torch.rand(rows))
        table.measure(
            "padded -> packed",
            shape,
            lambda rows=rows, length=length: (torch.randn(rows, length),),
            8 * total,
            {
                "tokcredit": padded.to_packed,
                "verl unpad_input": lambda x, m=attention: unpad_input(x[..., None], m)[0][:, 0],
                "boolean index": lambda x, m=real: x[m],
            },
            close(0, 0),
            {"verl unpad_input": 10},
        )
        # verl's function takes the log-probs of prompt and response together, here with a prompt of one token.
        whole = torch.cat([torch.ones(rows, 1, dtype=torch.long), real.long()], 1)
        data = TensorDict(
            {"prompts": torch.zeros(rows, 1), "responses": torch.zeros(rows, length), "attention_mask": whole},
            batch_size=rows,
        )
        data["max_response_len"] = NonTensorData(length)
        place = torch.arange(total) + torch.arange(rows).repeat_interleave(lengths)
        width = int(lengths.max())

        def verl(x, data=data, place=place, size=total + rows, width=width):
            # The log-prob of a token is where its predecessor is.
            return verl_padding.no_padding_2_padding(torch.zeros(size).index_copy_(0, place, x), data)[:, :width]

        def boolean(x, real=real, rows=rows, length=length, width=width):
            return torch.zeros(rows, length).masked_scatter_(real, x)[:, :width]

        table.measure(
            "packed -> padded",
            shape,
            lambda total=total: (torch.randn(total),),
            4 * total + 4 * rows * width,
            {"tokcredit": packed.to_padded, "verl no_padding_2_padding": verl, "boolean index": boolean},
            close(0, 0),
            {"verl no_padding_2_padding": 10},
        )


if __name__ == "__main__":
    main(run)
