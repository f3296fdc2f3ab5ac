"""Operations run directly, and through torch's dispatcher where something watches."""

import pytest
import torch
from tokcredit import Spans, ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def counted(spans):
    return ops.segment_rows(spans.mask, *spans.arrays, ops.REDUCTIONS.index("count"), 0.0, 1)


@pytest.fixture
def spans():
    return Spans(torch.tensor([0, 3]), torch.tensor([3, 5]), 5, torch.tensor([True, False, True, True, True]))


def test_directly(spans, monkeypatch):
    monkeypatch.setattr(ops.segment_rows, "_dispatched", None)  # would fail
    assert counted(spans).tolist() == [2, 2]


def test_a_dispatch_mode_sees_the_call(spans):
    with Names() as names:
        assert counted(spans).tolist() == [2, 2]
    assert "tokcredit.segment_rows.default" in names.seen


def test_the_profiler_sees_the_call(spans):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        counted(spans)
    assert "tokcredit::segment_rows" in {event.key for event in profile.key_averages()}


def test_compiled(spans):
    def f(mask):
        return ops.segment_rows(mask, spans.begin, spans.end, mask, ops.REDUCTIONS.index("count"), 0.0, 1) + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert compiled(spans.mask).tolist() == [3, 3]


def test_tensors_without_data(spans):
    begin, end, mask = spans.arrays
    meta = ops.segment_rows(*(x.to("meta") for x in (mask, begin, end, mask)), 0, 0.0, 1)
    assert meta.device.type == "meta" and meta.shape == (2,)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (mask, begin, end, mask)]
    fake = ops.segment_rows(*fakes, 0, 0.0, 1)
    assert fake.shape == (2,) and type(fake) is type(fakes[0])


def test_a_tensor_of_another_class_goes_through_torch(spans, monkeypatch):
    class Own(torch.Tensor):
        pass

    called = []
    monkeypatch.setattr(ops.segment_rows, "_dispatched", lambda *arguments: called.append(arguments))
    mask = spans.mask.as_subclass(Own)
    ops.segment_rows(mask, spans.begin, spans.end, mask, 0, 0.0, 1)
    assert len(called) == 1
