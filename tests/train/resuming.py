"""Training that is resumed from a checkpoint beside training that is not interrupted."""

from test_experiment import TIMES
from tokcredit.train import checkpoint
from tokcredit.train.trainer import Trainer


def check_resumed(settings, folder, make=Trainer, after=(3,)):
    """Resume after two steps, compare all metrics; return those of the whole training, and the interrupted trainer."""

    def steps(trainer, numbers):
        lines = [trainer.step(number).metrics for number in numbers]
        return [{name: x for name, x in line.items() if name not in TIMES} for line in lines]

    expected = steps(make(settings), (1, 2, *after))
    first, second = make(settings), make(settings)
    found = steps(first, (1, 2))
    checkpoint.save(first.accelerator, folder, 2)
    assert checkpoint.load(second.accelerator, folder) == 2
    assert found + steps(second, after) == expected
    return expected, first
