"""Tables that TRL writes with ``log_completions``, from the rollouts of ``scripted``.

As a script it writes them anew where the tests of reports read them: ``python tests/adapters/completions.py``.
"""

from pathlib import Path

import scripted
import tiny
import trl
from datasets import Dataset

FILES = Path(__file__).parents[1] / "report/files"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SETTINGS = {"max_steps": 1, "num_iterations": 1, "log_completions": True, "num_completions_to_print": 0}


def right(completion_ids, log_extra, **columns):
    """A reward beside which TRL writes columns of floats, whole numbers and text that are no rewards."""
    log_extra("confidence", [100.0 + len(ids) for ids in completion_ids])
    log_extra("tokens", [len(ids) for ids in completion_ids])
    log_extra("extracted", [f"{ids[0]}" for ids in completion_ids])
    return [len(ids) / 8 for ids in completion_ids]


def reward(completion_ids, **columns):
    """A reward function with the name of our own column, that leaves out some rows."""
    return [None if len(ids) == 2 else 0.25 * (len(ids) % 3) for ids in completion_ids]


def of_messages(prompts, trainer):
    """The scripted rollout for prompts that are chat messages."""
    return scripted.rollout([prompt[0]["content"] for prompt in prompts], trainer)


def write(folder, name, reward_funcs, chat=False, kind=trl.GRPOTrainer, **keywords):
    """The table of a step in ``folder``, under this name."""
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    prompts = [[{"role": "user", "content": text}] if chat else text for text in scripted.PROMPTS]
    trainer = kind(
        tiny.model(),
        reward_funcs,
        scripted.arguments(folder / "run", **SETTINGS),
        train_dataset=Dataset.from_dict({"prompt": prompts * 8}),
        processing_class=words,
        rollout_func=of_messages if chat else scripted.rollout,
        **keywords,
    )
    trainer.train()
    (written,) = (folder / "run/completions").glob("*.parquet")
    return written.rename(folder / name)


TABLES = {"trl-text.parquet": ([right], False), "trl-chat.parquet": ([right, reward], True)}


if __name__ == "__main__":
    import tempfile

    FILES.mkdir(exist_ok=True)
    for name, (functions, chat) in TABLES.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), name, functions, chat).rename(FILES / name)
