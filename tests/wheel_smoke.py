"""Check an installed wheel: ``python wheel_smoke.py [cuda]``, from any folder, with torch beside it.

One operation of each kind is computed on the CPU, and the wheel has CUDA kernels if and only if ``cuda`` is given.
"""

import sys
from pathlib import Path

import tokcredit as tc
import torch
from tokcredit import kernels

assert not Path(tc.__file__).is_relative_to(Path(__file__).parents[1] / "python"), "the working tree was imported"
assert tc.build_info()["cuda"] is (sys.argv[1:] == ["cuda"])

tokens = torch.tensor([[5, 8, 2], [5, 9, 2], [7, 2, 0], [5, 8, 2]])
mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
batch = tc.Rollouts.from_padded(tokens, mask, torch.zeros(4, dtype=torch.long), torch.tensor([1.0, 0.0, 0.0, 1.0]))
objective = tc.methods.tempo()
prepared = objective.prepare(batch)
log_probs = torch.full((4, 3), -1.0, requires_grad=True)
objective.loss(prepared, log_probs).loss.backward()

expected = torch.tensor([[2, 2.5, 1.5], [-1, -3.5, -1.5], [-3, -1.5, 0], [2, 2.5, 1.5]]) / 3**0.5
torch.testing.assert_close(prepared.advantages, expected, atol=1e-4, rtol=0)
torch.testing.assert_close(log_probs.grad, -prepared.advantages / 11)
found = tc.log_probs.with_entropies(torch.zeros(2, 8), torch.tensor([1, 2]))
torch.testing.assert_close(torch.stack(found), torch.tensor([[-2.0794415], [2.0794415]]).expand(2, 2))
print(f"tokcredit {tc.__version__}: {len(tc.methods.names())} methods; CPU {kernels.cpu()}; CUDA {kernels.cuda()}")
