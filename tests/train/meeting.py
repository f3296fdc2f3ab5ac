"""Two processes of a run as two threads of a test, which exchange what accelerate would exchange."""

import threading
from types import SimpleNamespace

import torch
from tokcredit.train import ranks
from tokcredit.train.ranks import Ranks

_SECONDS = 20  # after which a thread that waits alone gives up


class _Meeting:
    def __init__(self):
        self._barrier, self._brought = threading.Barrier(2, timeout=_SECONDS), [None, None]

    def exchange(self, index, found):
        self._brought[index] = found
        self._barrier.wait()
        both = list(self._brought)
        self._barrier.wait()
        return both


class Accelerator:
    """What :class:`tokcredit.train.ranks.Ranks` and checkpoints use of an accelerator."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, index, meeting):
        self.process_index, self.is_main_process, self._meeting = index, index == 0, meeting

    def reduce(self, x, how):
        total = sum(self._meeting.exchange(self.process_index, x))
        return total / 2 if how == "mean" else total

    def gather_object(self, objects):
        return [x for part in self._meeting.exchange(self.process_index, objects) for x in part]

    def wait_for_everyone(self):
        self._meeting.exchange(self.process_index, None)


def in_both(monkeypatch, function):
    """Call a function of the ranks in two threads; return what it returns or raises in each."""
    meeting, here, found = _Meeting(), threading.local(), [None, None]
    monkeypatch.setattr(ranks, "gather_object", lambda objects: here.accelerator.gather_object(objects))
    monkeypatch.setattr(ranks, "processes", lambda: SimpleNamespace(num_processes=2))

    def run(index):
        here.accelerator = Accelerator(index, meeting)
        try:
            found[index] = function(Ranks(here.accelerator))
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=[index], name=f"rank {index}") for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
