"""What an objective and the settings of a run need of each other, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import torch

from tokcredit import inputs
from tokcredit.mixing import mix
from tokcredit.preference import Preference
from tokcredit.rollouts import Rollouts
from tokcredit.stages import term
from tokcredit.stages.credit import Credit
from tokcredit.stages.token_weights import tis
from tokcredit.train import (
    adapter,
    collectors,
    fixed_collectors,
    tasks,
    teacher_scores,
)
from tokcredit.train import teacher as teaching
from tokcredit.train.conversations import Conversations
from tokcredit.train.episodes import Episodes
from tokcredit.train.problems import Problems
from tokcredit.train.ranks import check_launch
from tokcredit.train.replay import Replay
from tokcredit.train.rollout_collection import RolloutCollector, SingleTurn
from tokcredit.train.settings import CriticSettings, PrivilegedSettings, Settings
from tokcredit.train.trees import Trees
from tokcredit.train.virtual_tokens import VirtualPrompt


def _with_length(objective: Any, longest: int) -> Any:
    """Return the objective with the generation limit where its aggregation would use the longest row of each batch."""
    aggregation: Any = getattr(objective, "aggregation", None)
    if aggregation is not None and aggregation.reads_width:
        return mix(objective, aggregation=dataclasses.replace(aggregation, length=longest))
    return objective


def _sampler_differs(settings: Settings) -> bool:
    """Return whether a setting makes the probabilities of the sampler differ from those of the policy."""
    s = settings.sampling
    return s.sampler == "vllm" or s.staleness > 0 or settings.sampler_precision != settings.optimizer.precision


def _corrected(objective: Any) -> Any:
    """Return the objective with a token weight for a sampler whose probabilities differ, unless it already has one.

    Token weights of a preference method weigh its score, and its pairs may come from any policy.
    """
    if isinstance(objective, Preference):
        return objective
    corrections = (x for x in objective.stages() if x.kind in ("filter", "token_weight", "ratio", "scale"))
    if any("rollout_log_probs" in x.required_inputs for x in corrections):
        return objective
    return mix(objective, token_weights=(*objective.token_weights, tis()))


def _with_value_loss(objective: Any) -> Any:
    """Return the objective with the loss of a critic, unless it already has one."""
    if any(isinstance(x, term.value) for x in objective.terms):
        return objective
    return mix(objective, terms=(*objective.terms, term.value()))


def checked(settings: Settings) -> tuple[Any, Problems, type[RolloutCollector]]:
    """Return what the settings say before a model is loaded: the objective, the problems and the rollout collector.

    Args:
        settings: Settings without open defaults; see :func:`tokcredit.train.experiment.resolved`.

    Raises:
        TypeError: A setting of the method has the wrong type.
        ValueError: The objective requires an input that the trainer does not collect, or a setting is wrong.
    """
    check_launch()
    virtual = None if settings.adapter is None else adapter.config(settings.adapter)
    if settings.objective.method == "meet" or (isinstance(virtual, VirtualPrompt) and virtual.steps is not None):
        raise ValueError("completions: expected a file of pairs because of meet and its adapter, control, got None")
    objective = _with_length(settings.objective.build(), settings.sampling.max_tokens)
    if settings.sampling.sampler == "vllm":
        if find_spec("vllm") is None:
            raise ValueError("sampler: expected transformers because vllm is not installed, got vllm")
        if isinstance(virtual, VirtualPrompt):
            raise ValueError(f"adapter: expected lora because the sampler is vllm, got {settings.adapter}")
        if settings.sampling.adaptive:
            raise ValueError(f"adaptive: expected 0 because the sampler is vllm, got {settings.sampling.adaptive}")
    if _sampler_differs(settings) and settings.objective.token_weights is None:
        objective = _corrected(objective)
    check_collected(objective, settings.objective.method, ("user", "host", *fixed_collectors.OF_EXAMPLES))
    check_models(objective, settings)
    fixed_collectors.check(objective, settings)
    if settings.critic.critic is not None:
        objective = _with_value_loss(objective)
    _check_group(settings, objective)
    if isinstance(objective, Preference) and settings.sampling.group != 2:
        raise ValueError(
            f"group: expected 2 because of {settings.objective.method}, which compares the two responses to a prompt, "
            f"got {settings.sampling.group}"
        )
    if objective.couples_rows and settings.sampling.group > settings.optimizer.micro_batch:
        raise ValueError(
            f"micro_batch: expected at least {settings.sampling.group}, the size of a group, because the objective "
            f"compares the rows of a group, got {settings.optimizer.micro_batch}"
        )
    if (stage := length_stage(objective)) is not None and not hasattr(stage, "gamma"):
        raise ValueError(f"credit: expected a stage with a gamma because it reads length_values, got {stage}")
    problems = tasks.load(settings.tasks, settings.held_out, settings.reward, settings.seed)
    found = collector(settings, objective.required_inputs, problems)
    if isinstance(objective, Preference) and (issubclass(found, Episodes) or settings.tools.episode_rows != "one"):
        raise ValueError(
            f"tasks: expected tasks whose responses are one row because {settings.objective.method} compares pairs of "
            f"rows, got {', '.join(settings.tasks)}"
        )
    _check_privileged(settings, objective, found)
    return objective, problems, found


_MODELS = {"teacher": "teacher", "critic": "critic", "aligned": "aligned policy", "reward_model": "reward model"}
"""Settings of models beside the policy, and what the model is."""


def check_models(objective: Any, settings: Settings) -> None:
    """Check that there is each model beside the policy if, and only if, the objective needs it.

    Args:
        objective: The objective.
        settings: Settings of the run.

    Raises:
        ValueError: One is missing or superfluous, or a setting of one is out of range.
    """
    method, chosen = settings.objective.method, settings.critic
    for name, given, needed, expected in (
        ("teacher", settings.teacher, distils(objective), "a model"),
        ("critic", chosen.critic, _reads(objective, "critic"), "head, initial or a model"),
        ("aligned", settings.aligned, _reads(objective, "aligned"), "a model"),
        ("reward_model", settings.reward_model, _reads(objective, "reward_model"), "initial or a model"),
    ):
        if given is None and needed:
            raise ValueError(f"{name}: expected {expected} because of {method}, got None")
        if given is not None and not needed:
            raise ValueError(f"{name}: expected None because {method} has no {_MODELS[name]}, got {given}")
    if settings.teacher is not None and teaching.moves(settings.teacher) and _reads(objective, "teachers"):
        raise ValueError(f"teacher: expected initial or a model because of {method}, got {settings.teacher}")
    _check_engine(objective, settings)
    if chosen.critic is not None:
        if all(type(x).targets is Credit.targets for x in objective.credit.stages() if isinstance(x, Credit)):
            raise ValueError(
                f"credit: expected one that says what a critic learns, such as gae(), got {objective.credit!r}"
            )
        if chosen.critic_warmup >= settings.steps:
            raise ValueError(
                f"critic_warmup: expected fewer than the {settings.steps} steps, got {chosen.critic_warmup}"
            )


def _check_engine(objective: Any, settings: Settings) -> None:
    """Raise if the teacher cannot be in the engine that the settings say."""
    method = settings.objective.method
    if settings.teacher_engine == "transformers":
        return
    if settings.teacher is None:
        raise ValueError(f"teacher_engine: expected transformers because {method} has no teacher, got vllm")
    if find_spec("vllm") is None:
        raise ValueError("teacher_engine: expected transformers because vllm is not installed, got vllm")
    if teaching.moves(settings.teacher):
        raise ValueError(f"teacher: expected initial or a model because teacher_engine is vllm, got {settings.teacher}")
    if settings.sampling.temperature != 1:
        got = settings.sampling.temperature
        raise ValueError(f"temperature: expected 1, that of the teacher, because teacher_engine is vllm, got {got}")
    if settings.adapter is not None and isinstance(adapter.config(settings.adapter), VirtualPrompt):
        raise ValueError(f"adapter: expected lora because teacher_engine is vllm, got {settings.adapter}")
    names, top_k = teacher_scores.wanted(objective)
    read = objective.required_inputs & (inputs.names("teacher") | inputs.names("teachers"))
    read |= collectors.FROM_TEACHER & set(objective.variables) - ({objective.token_loss.variable} if top_k else set())
    if others := sorted(read - names):
        raise ValueError(
            f"teacher_engine: expected transformers because {method} reads {', '.join(others)}, got vllm, which gives "
            f"log-probs of tokens, and divergences of a token loss with top_k and top_of=teacher"
        )


def only_read(settings: Settings, objective: Any) -> Settings:
    """Return the settings without the models and prompts beside the policy that the objective does not read.

    Args:
        settings: Settings of a run.
        objective: Its objective.
    """
    rewarded = _reads(objective, "reward_model")
    return dataclasses.replace(
        settings,
        teacher=settings.teacher if distils(objective) else None,
        teacher_engine=settings.teacher_engine if distils(objective) else "transformers",
        critic=settings.critic if _reads(objective, "critic") else CriticSettings(),
        collectors=fixed_collectors.read(objective, settings.collectors),
        privileged=settings.privileged if distils(objective) else PrivilegedSettings(),
        aligned=settings.aligned if _reads(objective, "aligned") else None,
        reward_model=settings.reward_model if rewarded else None,
        reward_model_lr=settings.reward_model_lr if rewarded else 0.0,
    )


def _reads(objective: Any, collector: str) -> bool:
    return bool(inputs.names(collector) & objective.required_inputs)


def distils(objective: Any) -> bool:
    """Return whether an objective reads or differentiates what a teacher gives.

    Args:
        objective: The objective.
    """
    found = inputs.names("teacher") & objective.required_inputs | collectors.FROM_TEACHER & set(objective.variables)
    return bool(found)


def _check_privileged(settings: Settings, objective: Any, collector: type[RolloutCollector]) -> None:
    told = settings.privileged.privileged
    if told == "nothing":
        if "teacher_mask" in objective.required_inputs:
            raise ValueError(
                f"privileged: expected answer or attempt because of {settings.objective.method}, whose teacher is told "
                f"more than the student, got nothing"
            )
    elif not distils(objective):
        raise ValueError(f"privileged: expected nothing because {settings.objective.method} has no teacher, got {told}")
    elif not issubclass(collector, SingleTurn):
        raise ValueError(f"privileged: expected nothing because rows are not whole responses to a prompt, got {told}")
    elif told == "attempt" and settings.sampling.group == 1:
        raise ValueError("group: expected at least 2 because the teacher is told another response of the group, got 1")
    if settings.privileged.feedback is not None:
        teaching.feedback(settings.privileged.feedback)


def _check_group(settings: Settings, objective: Any) -> None:
    """Raise if the credit compares the responses to a prompt, and there is one response."""
    if settings.sampling.group > 1 or objective.required_inputs & inputs.names("tree_sampler"):
        return

    def compares(credit: Credit) -> bool:
        rows, rewards = torch.arange(2), torch.tensor([0.0, 1.0])
        together, apart = (
            credit(Rollouts(rows, torch.arange(3), group_ids, rewards)) for group_ids in (torch.zeros_like(rows), rows)
        )
        return not together.equal(apart)

    credits = (x for x in objective.stages() if isinstance(x, Credit) and not x.required_inputs)
    if any(map(compares, credits)):
        raise ValueError(
            f"group: expected at least 2 because the credit of {settings.objective.method} compares the responses to a "
            f"prompt, got {settings.sampling.group}"
        )


def length_stage(objective: Any) -> Any:
    """Return the first stage that reads predictions of the length head, or None.

    Args:
        objective: The objective.
    """
    return next((x for x in objective.stages() if x.reads & inputs.names("length_head")), None)


def collector(settings: Settings, wanted: frozenset[str], problems: Problems) -> type[RolloutCollector]:
    """Return the class that collects rollouts.

    Args:
        settings: Settings of the run.
        wanted: Names of the inputs that the objective requires.
        problems: The problems.

    Raises:
        ValueError: The inputs cannot be collected with tools.
    """
    with_tools = any(p.calls is not None for p in problems.held_out)
    in_worlds = any(p.world is not None for p in problems.held_out)
    method, chosen = settings.objective.method, ", ".join(settings.tasks)
    single = ["continuations", "probes", "tree_sampler", "replay", "length_head"]
    if in_worlds:  # which have no true answer
        single += ["turn_answers", "ref_turn_answers"]
    if (with_tools or in_worlds) and (others := wanted & frozenset().union(*map(inputs.names, single))):
        kind = "tools" if with_tools else "an environment"
        raise ValueError(
            f"tasks: expected tasks without {kind} because {method} requires {', '.join(sorted(others))}, got {chosen}"
        )
    if wanted & inputs.names("tree_sampler"):
        return Trees
    if in_worlds:
        return Episodes
    if others := wanted & inputs.names("environment") - {"turn_rewards", "turn_ids"}:
        raise ValueError(
            f"tasks: expected tasks with an environment, such as minigrid(), because {method} requires "
            f"{', '.join(sorted(others))}, got {chosen}"
        )
    if with_tools or wanted & inputs.names("environment"):
        return Conversations
    return Replay if wanted & inputs.names("replay") else SingleTurn


def check_collected(objective: Any, method: str, others: Collection[str]) -> None:
    """Check that the trainer collects what an objective requires and computes what it differentiates.

    Args:
        objective: The objective.
        method: Name of its method, for errors.
        others: Collectors that the trainer does not have.

    Raises:
        ValueError: It does not.
    """
    by_forward = collectors.collected()
    wanted = objective.required_inputs
    missing = wanted & frozenset().union(*map(inputs.names, others)) | {
        x for x in wanted & by_forward if not collectors.computes(x)
    }
    if missing:
        raise ValueError(
            f"method: expected an objective whose inputs the trainer collects, got {method}, "
            f"which requires {', '.join(sorted(missing))}"
        )
    if unknown := [name for name in objective.variables if not collectors.computes(name)]:
        raise ValueError(
            f"method: expected an objective of variables that a forward pass computes, got {method}, "
            f"which differentiates {', '.join(unknown)}"
        )
