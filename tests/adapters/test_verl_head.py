"""verl's patched model with our output layer gives what it gives with verl's own."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed; make test-verl")
sys.path.insert(0, str(Path(__file__).parent))

import tiny
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.utils.experimental import torch_functional

STOCK = torch_functional.FusedLinearForPPO


@pytest.fixture
def head(monkeypatch):
    monkeypatch.setattr(torch_functional, "FusedLinearForPPO", STOCK)  # what it is afterwards
    from tokcredit.adapters import verl_head

    torch_functional.FusedLinearForPPO = STOCK
    return verl_head


def forward(model, ids, backend="torch", **options):
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    return model(input_ids=ids, return_dict=True, **options)


def results(model, ids, **options):
    out = forward(model, ids, **options)
    weights = torch.linspace(-1, 1, ids.numel()).view_as(ids)
    loss = (out.log_probs * weights).sum() + (out.entropy * weights**2).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [out.log_probs.detach(), out.entropy.detach(), *gradients]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_stock_verl(temperature, head, monkeypatch):
    model = tiny.model()
    monkeypatch.setattr(type(model), "forward", type(model).forward)  # which verl replaces
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"temperature": temperature, "shift_labels": ids.roll(-1, 1)}
    expected = results(model, ids, **options)
    seen = []
    ours = head.FusedLinear.forward
    monkeypatch.setattr(head.FusedLinear, "forward", lambda self, *x, **y: seen.append(1) or ours(self, *x, **y))
    torch_functional.FusedLinearForPPO = head.FusedLinear
    found = results(model, ids, **options)
    assert seen == [1]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_autocast_gives_float32(head, monkeypatch):
    model = tiny.model()
    monkeypatch.setattr(type(model), "forward", type(model).forward)
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    torch_functional.FusedLinearForPPO = head.FusedLinear
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = forward(model, ids)
    assert out.log_probs.dtype == out.entropy.dtype == torch.float32
    (out.log_probs.sum() + out.entropy.sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_another_backend_is_refused(head, monkeypatch):
    model = tiny.model()
    monkeypatch.setattr(type(model), "forward", type(model).forward)
    torch_functional.FusedLinearForPPO = head.FusedLinear
    with pytest.raises(ValueError, match=r"impl_backend: expected torch with tokcredit, got liger"):
        forward(model, torch.zeros(1, 3, dtype=torch.long), "liger")


def test_importing_the_module_is_all(monkeypatch):
    monkeypatch.setattr(torch_functional, "FusedLinearForPPO", STOCK)
    monkeypatch.delitem(sys.modules, "tokcredit.adapters.verl_head", raising=False)
    from verl.utils.import_utils import import_external_libs

    import_external_libs("tokcredit.adapters.verl_head")
    assert torch_functional.FusedLinearForPPO is sys.modules["tokcredit.adapters.verl_head"].FusedLinear
