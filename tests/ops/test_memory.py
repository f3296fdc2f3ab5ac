"""Large results on the CPU lie in memory that earlier ones left."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import tokcredit as tc
import torch
from tokcredit import _C, ops
from tokcredit.ops.call import result

linux = pytest.mark.skipif(sys.platform != "linux", reason="nothing is kept elsewhere")
MIB = 1 << 20
ONE = torch.zeros(1)


def held(megabytes):
    return result(ONE, (megabytes * MIB // 4,))


@pytest.fixture(autouse=True)
def nothing_kept():
    ops.empty_cache()
    yield
    ops.empty_cache()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool]
)
def test_is_a_tensor_like_any_other(dtype):
    x = result(ONE, (3, MIB, 2), dtype)
    assert x.shape == (3, MIB, 2) and x.dtype == dtype and x.is_contiguous() and not x.untyped_storage().resizable()
    x.fill_(1)
    assert x.sum() == x.numel()
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.clone().share_memory_(), x.share_memory_()):
        assert torch.equal(other, x)


@linux
def test_what_one_left_is_used_by_the_next():
    x = held(16)
    place, view = x.data_ptr(), x[1:5]
    del x, view
    assert held(12).data_ptr() == place


def test_a_result_outlives_the_cache_and_a_view_its_tensor():
    x = held(16).fill_(3)
    view = x[5:9]
    del x
    ops.empty_cache()
    held(16).fill_(4)
    ops.empty_cache()
    assert view.tolist() == [3] * 4


def test_results_never_share_memory():
    kept = []
    for size in (4, 6, 8, 4, 6, 8, 30, 2):
        kept.append(held(size).fill_(len(kept)))
        held(size + 1).fill_(-1)
    assert all((x == i).all() for i, x in enumerate(kept))


def test_small_results_and_other_dtypes_are_torchs():
    x = result(ONE, (4,))
    assert x.untyped_storage().resizable()
    assert result(ONE, (4 * MIB,), torch.int16).dtype == torch.int16
    assert result(torch.nn.Parameter(ONE), (4 * MIB,)).untyped_storage().resizable()


def test_shapes_that_are_none_are_refused():
    for shape in ((-1,), (2**40, 2**40), (2**62,)):
        with pytest.raises(ValueError, match="empty: shape: expected extents of a tensor, got"):
            _C.empty(shape, 0)
    with pytest.raises(ValueError, match="empty: dtype: expected 0 to 6"):
        _C.empty((1,), 7)
    assert _C.empty((0, 3), 0).shape == (0, 3)


def test_threads_take_and_give_back():
    wrong = []

    def work(number):
        for turn in range(200):
            mark = float(1000 * number + turn)
            x = held(2 + turn % 3)
            x.fill_(mark)
            if not (x == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKS = """
import os, threading, time
import torch
from tokcredit.ops.call import result

torch.set_num_threads(1)  # torch's own threads are not in a forked process

def held(megabytes):
    return result(torch.zeros(1), (megabytes << 18,))

own, stop = held(8).fill_(3), False

def churn():
    while not stop:
        held(4), held(6)

threads = [threading.Thread(target=churn) for _ in range(3)]
for thread in threads:
    thread.start()
codes = []
for _ in range(30):
    child = os.fork()
    if child == 0:
        ours = [held(4).fill_(i) for i in range(5)]
        os._exit(0 if all((x == i).all() for i, x in enumerate(ours)) and (own == 3).all() else 1)
    own.fill_(3)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop = True
print(set(codes) == {0})
"""


@linux
def test_forked_processes_have_their_own():
    run = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.split() == ["True"], run.stderr


@linux
def test_a_gradient_is_handed_over_without_a_copy():
    x = torch.zeros(MIB, requires_grad=True)
    values, _ = ops.policy_loss(x, tc.Spans.single(MIB), "clip", log_ratio=0)
    values.sum().backward()
    place = x.grad.data_ptr()
    assert (x.grad == -1).all()
    x.grad = None
    assert held(4).data_ptr() == place
