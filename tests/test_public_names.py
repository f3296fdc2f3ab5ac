"""Every public name that the design fixes exists, and is documented by a docstring."""

import inspect

import pytest
import tokcredit as tc

NAMES = {
    "data": [
        "Spans",
        "Spans.from_cu_seqlens",
        "Spans.from_padded",
        "Rollouts",
        "Rollouts.from_padded",
        "Rollouts.from_pairs",
    ],
    "inputs": ["inputs.register", "inputs.get", "inputs.names", "inputs.COLLECTORS"],
    "objectives": [
        *("Objective", "Preference", "Supervised", "Prepared", "Prepared.select", "Loss", "mix"),
        *(
            f"{o}.{m}"
            for o in ("Objective", "Preference", "Supervised")
            for m in ("prepare", "loss", "loss_from_hidden", "required_inputs")
        ),
    ],
    "blocks": [
        *(
            "tree.build",
            "tree.context_keys",
            "tree.PrefixTree.expand",
            "values.monte_carlo",
            "head.log_probs_and_entropies",
            "values.mean_of_children",
            "values.leave_one_out",
        ),
        *("scan.cumulative", "scan.returns", "scan.generalized_advantages", "scan.positions", "scan.following"),
        *(f"segment.{name}" for name in ("sum", "mean", "var", "minimum", "maximum", "count", "logsumexp", "keys")),
        *(
            f"select.{name}"
            for name in (
                "top_k",
                "top_share",
                "diverse",
                "sensitivity",
                "quantile",
                "kth",
                "maximum_variance",
                "within_mean",
            )
        ),
        *("log_probs.from_logits", "log_probs.with_entropies", "log_probs.squared_probs"),
        *(f"divergence.{name}" for name in ("between", "with_entropies", "Mixture", "Top", "kl", "js")),
        *("length.remaining", "length.targets"),
    ],
    "stages": [
        *(f"filters.{name}" for name in ("mixed_groups", "nonzero_advantage", "improbable", "top_share", "within")),
        *(
            f"credit.{name}"
            for name in ("group_normalized", "leave_one_out", "constant", "sum", "whitened", "value_changes")
        ),
        *(f"token_weights.{name}" for name in ("importance", "tis", "mis", "icepop", "within", "raised")),
        *(f"ratio.{name}" for name in ("token", "sequence", "cumulative", "one")),
        *(f"clip.{name}" for name in ("ppo", "growing", "gated", "soft", "unclipped")),
        *("scale.Scale", "scale.within", "term.kl", "term.entropy", "term.nll", "link.logistic"),
        *("pair.f_divergence", "pair.sequential_kl"),
        *(f"aggregation.{name}" for name in ("token_mean", "token_sum", "sequence_mean", "sequence_sum")),
        *(f"token_score.{name}" for name in ("given", "scaled", "either", "but_not")),
    ],
    "schedules": [
        *(
            "schedule.linear",
            "schedule.cosine",
            "schedule.cosine_restarts",
            "schedule.Schedule",
            "schedule.Controller",
            "schedule.State",
        ),
        *("schedule.target_entropy", "schedule.target_kl", "schedule.State.observe", "schedule.State.state_dict"),
    ],
    "others": [
        *("decoding.temperature.AdaptiveTemperature", "decoding.length.LengthTilt", "decoding.length.LengthLimit"),
        *("rewards.matching.rewards", "num_threads", "set_num_threads", "build_info"),
    ],
    "packing": [
        *(f"packing.{name}" for name in ("pack", "forward", "log_probs", "attention", "check", "TreePack.for_rank")),
    ],
    "methods": [
        f"methods.{name}" for name in ("grpo", "tempo", "ctpo", "ba", "dpo", "sft", "tip", "gspo", "dapo", "rloo")
    ],
}


def resolve(path):
    found = tc
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("kind", NAMES)
def test_public_names_exist_and_are_documented(kind):
    for path in NAMES[kind]:
        found = resolve(path)
        if callable(found) or isinstance(found, property):
            assert inspect.getdoc(found), path


def test_everything_that_is_exported_exists():
    assert len(set(tc.__all__)) == len(tc.__all__) and tc.__all__ == sorted(tc.__all__)
    for name in tc.__all__:
        assert getattr(tc, name) is not None
    public = {name for name in vars(tc) if not name.startswith("_") and not inspect.ismodule(getattr(tc, name))}
    public -= {"annotations"}
    assert public <= set(tc.__all__)


def test_every_stage_module_exports_what_it_defines():
    for name in (
        "filters",
        "credit",
        "token_weights",
        "ratio",
        "clip",
        "scale",
        "aggregation",
        "term",
        "token_score",
        "link",
        "pair",
    ):
        module = getattr(tc, name)
        defined = {
            key
            for key, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__ and not key.startswith("_")
        }
        assert defined <= set(module.__all__), name


@pytest.mark.parametrize("objective", [tc.Objective, tc.Preference, tc.Supervised])
def test_the_three_objectives_share_one_protocol(objective):
    prepare = inspect.signature(objective.prepare).parameters
    assert list(prepare) == [
        *("self", "batch", "batch_num_tokens", "global_batch_size", "global_num_groups", "dp_size", "progress", "state")
    ]
    assert all(p.kind is p.KEYWORD_ONLY for name, p in prepare.items() if name not in ("self", "batch"))
    loss = list(inspect.signature(objective.loss).parameters.values())
    assert len(loss) == 4 and loss[-1].kind is loss[-1].VAR_KEYWORD
    for name in ("required_inputs", "variables", "compares_groups", "couples_rows", "adjustables", "is_scheduled"):
        assert isinstance(inspect.getattr_static(objective, name), property) or hasattr(objective, name)
