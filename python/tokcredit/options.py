"""Settings as options of the command line: tyro reads their names, and their declarations read their values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, get_args, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from tokcredit.settings import Declared, Range, nearest, rules

registry = ConstructorRegistry()
"""Rules for ``tyro.cli``."""


class RejectedError(Exception):
    """Settings refuse what was typed. It is no ``ValueError``, which tyro would print in a form of its own.

    Args:
        message: Error of the settings.
        settings: Class of the settings.
    """

    def __init__(self, message: str, settings: type) -> None:
        super().__init__(message)
        self.settings = settings


def named(message: str, settings: Iterable[type], typed: Sequence[str]) -> str:
    """Return an error whose settings are named as options, in the spelling of the command line.

    Args:
        message: The error, which begins with names of settings.
        settings: Classes of the settings of the command.
        typed: Arguments of the command line.
    """
    head, colon, rest = message.partition(": ")
    known = frozenset().union(*map(_names, settings))
    if not set(head.split(", ")) <= known:
        return message
    spelled = {t.partition("=")[0].replace("_", "-"): t.partition("=")[0] for t in typed if t.startswith("--")}
    options = ("--" + name.replace("_", "-") for name in head.split(", "))
    return ", ".join(spelled.get(x, x) for x in options) + colon + rest


def meant(typed: Sequence[str], command: Any) -> list[str]:
    """Return a sentence for each option that a command does not have, where another one was probably meant.

    Args:
        typed: Arguments of the command line.
        command: Function whose annotations are the settings of the command.
    """
    known = {x.replace("_", "-") for hint in get_type_hints(command, include_extras=True).values() for x in _all(hint)}
    sentences = []
    for word in (x.partition("=")[0] for x in typed if x.startswith("--")):
        name = word[2:].replace("_", "-")
        if name in known | {"help", "debug"}:
            continue
        if name in _OF_TRL:
            sentences.append(f"{word} of TRL is {_OF_TRL[name]} here")
        elif near := nearest(name, known):
            sentences.append(f"{word}: expected an option of the command{near.replace('mean ', 'mean --')}")
    return sentences


def _all(annotation: Any) -> frozenset[str]:
    """Return the names of the settings of all classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Declared):
        return _names(annotation)
    return frozenset().union(*map(_all, get_args(annotation)))


_OF_TRL = {
    "num-generations": "--group",
    "max-completion-length": "--max-tokens",
    "learning-rate": "--lr",
    "lr-scheduler-type": "--schedule",
    "warmup-steps": "--warmup",
    "beta": "--terms 'kl(0.04)', or --set beta=0.1 for dpo,",
    "epsilon": "--set clip_low=0.2",
    "epsilon-high": "--set clip_high=0.28",
    "delta": "--set cap=3",
    "loss-type": "--method, or --aggregation,",
    "scale-rewards": "--set scale=false",
    "importance-sampling-level": "--ratio",
    "mask-truncated-completions": "--filters 'marked(truncated, inverted=true)'",
    "num-iterations": "--epochs",
    "max-steps": "--steps",
    "num-train-epochs": "--steps",
    "per-device-train-batch-size": "--micro-batch, and --prompts for the number of prompts per step,",
    "gradient-accumulation-steps": "--micro-batch, which changes no result,",
    "model-name-or-path": "--model",
    "dataset-name": "--tasks",
    "reward-funcs": "--reward",
    "output-dir": "--output",
    "resume-from-checkpoint": "--resume",
    "eval-steps": "--eval-every",
    "save-steps": "--save-every",
    "bf16": "--precision bf16",
    "use-vllm": "--sampler vllm",
    "chat-template-kwargs": "--chat-template-args",
}
"""Options of TRL's GRPOConfig and its scripts, and what they are here."""


def _names(settings: type) -> frozenset[str]:
    """Return the names of the settings that are options, those of settings among the settings included."""
    found: frozenset[str] = frozenset()
    for name, annotation in get_type_hints(settings, include_extras=True).items():
        if isinstance(annotation, type) and issubclass(annotation, Declared):
            found |= _names(annotation)
        elif tyro.conf.Positional not in getattr(annotation, "__metadata__", ()):
            found |= {name}
    return found


_TYPES = {"number": "FLOAT", "whole number": "INT", "option": "WORD"}
_asked: list[Any] = []


@registry.struct_rule
def _declared(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Return tyro's own description of settings, with numbers and options read by their declarations.

    A text that is no number is kept, so that the settings refuse it as they do when they are made in Python.
    """
    if info.type in _asked or not (isinstance(info.type, type) and issubclass(info.type, Declared)):
        return None
    _asked.append(info.type)
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _asked.remove(info.type)
    assert isinstance(spec, StructConstructorSpec)
    known = rules(info.type)
    fields = tuple(_field(f, known.get(f.name)) for f in spec.fields)
    return StructConstructorSpec(functools.partial(_made, info.type), fields)


def _made(settings: type, **values: Any) -> Any:
    try:
        return settings(**values)
    except (TypeError, ValueError) as error:
        raise RejectedError(str(error), settings) from error


def _field(f: StructFieldSpec, rule: Range | None) -> StructFieldSpec:
    if rule is None or rule.kind not in _TYPES:
        return f
    several, optional = rule.several, rule.optional

    def read(texts: list[str]) -> Any:
        return tuple(map(rule.read, texts)) if several else rule.read(texts[0])

    def written(value: Any) -> list[str]:
        return list(map(str, value)) if several else [str(value)]

    metavar = _TYPES[rule.kind]
    spec: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar=f"[{metavar} ...]" if several else f"{metavar}|None" if optional else metavar,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=written,
    )

    def helptext() -> str:
        text = f.helptext() if callable(f.helptext) else f.helptext
        return f"{text} Expected: {rule}."

    words = rule.kind == "option" and several  # texts, which tyro reads, also from an option that is repeated
    annotated: Any = f.type if words else Annotated[f.type, spec]
    return dataclasses.replace(f, type=annotated, helptext=helptext)
