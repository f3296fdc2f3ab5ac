"""What each method's defaults come to, stage by stage: no value moves without a line here."""

import math

import pytest
import tokcredit as tc
from tokcredit import aggregation, clip, credit, gain, ratio, sampling, schedule, score, weights

GRPO = {
    "credit": credit.group_normalized(scale=True, epsilon=1e-6),
    "weights": (),
    "ratio": ratio.token(bound=20.0),
    "clip": clip.ppo(low=0.2, high=0.2, cap=None),
    "aggregation": aggregation.sequence_mean(),
    "kl": None,
    "gain": None,
    "sampling": None,
    "variable": "log_probs",
}
HIGHER = clip.ppo(low=0.2, high=0.28, cap=None)
TOKENS = aggregation.token_mean()
SEQUENCE = {"ratio": ratio.sequence(bound=20.0, high=10.0), "clip": clip.ppo(low=3e-4, high=4e-4, cap=None)}
DAPO = {"clip": HIGHER, "aggregation": TOKENS}
DEVIATION = score.entropy_deviation(pivot=0.8, literal_sign=False)
SEGMENTS = {"ratio": ratio.token(bound=10.0), "aggregation": TOKENS}

DIFFERENCES = {
    "grpo": {},
    "dr_grpo": {"credit": credit.group_normalized(scale=False), "aggregation": aggregation.sequence_sum(None)},
    "dapo": DAPO,
    "rloo": {"credit": credit.leave_one_out(), "aggregation": TOKENS},
    "otb": {"credit": credit.least_variance(by_turn=False, epsilon=1e-8), "aggregation": TOKENS},
    "gspo": SEQUENCE,
    "cispo": {"clip": clip.weighted(low=10.0, high=0.2), "aggregation": TOKENS},
    "sapo": {"clip": clip.soft(tau_positive=1.0, tau_negative=1.05)},
    "tempo": {
        "credit": credit.tempo_like(scale=True, epsilon=1e-6),
        "clip": clip.ppo(low=0.2, high=0.28, cap=3.0),
        "aggregation": TOKENS,
    },
    "ctpo": {
        "ratio": ratio.cumulative(bound=20.0, high=10.0),
        "clip": clip.growing(low=0.025, high=0.05, power=0.5, cap=0.05),
        "aggregation": TOKENS,
    },
    "ba": {"clip": HIGHER, "aggregation": aggregation.balanced()},
    "grpo_n": {"credit": credit.negative_part(credit.group_normalized())},
    "gspo_n": {"credit": credit.negative_part(credit.group_normalized()), **SEQUENCE},
    "psr": {
        "credit": credit.thresholded(above=1.0, below=0.0, threshold=0.5),
        "weights": (weights.with_credit(),),
        "aggregation": TOKENS,
    },
    "nsr": {
        "credit": credit.thresholded(above=0.0, below=-1.0, threshold=0.5),
        "weights": (weights.with_credit(),),
        "aggregation": TOKENS,
    },
    "w_reinforce": {"credit": credit.thresholded(above=0.1, below=-1.0, threshold=0.5), "aggregation": TOKENS},
    "pods": {"sampling": sampling.most_varied(count=16)},
    "d3s": {
        "weights": (
            weights.varied_rows(schedule.linear(0.25, 1.0)),
            weights.with_credit(),
            weights.top_share(schedule.linear(0.2, 1.0), score.given("entropies"), paid=True),
        ),
        "aggregation": TOKENS,
    },
    "canon": {
        "credit": credit.halves(credit.mean_entropy(), between=credit.by_mean_reward()),
        "clip": HIGHER,
        "aggregation": aggregation.sequence_sum(None),
    },
    "hapo": {
        "credit": credit.token_normalized(limit=5.0, epsilon=1e-6, otherwise=credit.group_normalized(epsilon=1e-6)),
        "clip": clip.widened(DEVIATION, low=0.2, high=0.28, widen=1.0, cap=10.0),
        "aggregation": TOKENS,
        "gain": gain.outside_center(DEVIATION, strength=1.0),
    },
    "divergence_weighted": {**DAPO, "gain": gain.divergence(strength=1.0, slope=10.0)},
    "thr": {"credit": credit.influential(credit.group_normalized(), favour=0.1, beta=1.0, threshold=0.5)},
    "nthr": {"credit": credit.sparing(credit.group_normalized(), beta=1.0, threshold=0.5)},
    "tw_grpo": {
        "credit": credit.group_normalized(epsilon=1e-4),
        "weights": (weights.raised(score.given("disagreement"), strength=pytest.approx(0.7)),),
        **DAPO,
    },
    "tip": {
        "credit": credit.constant(-1.0),
        "weights": (
            weights.top_share(
                0.5,
                score.either(
                    score.scaled(score.given("entropies"), quantile=0.98), score.scaled(score.given("reverse_kl"))
                ),
                per_row=True,
                round_up=False,
            ),
        ),
        "ratio": ratio.one(),
        "clip": clip.weighted(low=math.inf, high=math.inf),
        "aggregation": TOKENS,
        "variable": "reverse_kl",
    },
    "spo_chain": {"credit": credit.value_changes(), "weights": (weights.improbable(0.9),), **SEGMENTS},
    "spo_tree": {
        "credit": credit.edges(scale=False),
        "weights": (weights.with_credit(), weights.improbable(0.9)),
        **SEGMENTS,
    },
    "vineppo": {"credit": credit.value_changes("step_values"), "aggregation": TOKENS},
    "spae": {
        "credit": credit.whitened(credit.saturating(alpha=0.5, bonus=0.5, saturated=0.9)),
        "sampling": sampling.mixed(),
        **DAPO,
    },
    "match_tir": {"credit": credit.turns(discount=0.9, epsilon=1e-6, halve=False, centre_alone=False)},
    "r3": {
        "credit": credit.pooled(
            (credit.brevity(limit=32768, threshold=0.5), credit.dominance(share=0.2, best=0.5, threshold=0.5)),
            scale=1.0,
            epsilon=1e-6,
        )
    },
    "lenvm": {"credit": credit.shortening(credit.group_normalized(), scale=0.1, gamma=0.997, trace=1.0)},
}


@pytest.mark.parametrize("name", tc.methods.names())
def test_defaults(name):
    assert name in DIFFERENCES, f"{name}: expected a line for its stages"
    objective = tc.methods.load(name)
    for stage, expected in (GRPO | DIFFERENCES[name]).items():
        assert getattr(objective, stage) == expected, stage


def test_defaults_of_stages_that_methods_leave_alone():
    assert (weights.importance_truncated().high, weights.importance_truncated().whole_rows) == (2.0, False)
    masked = weights.importance_masked()
    assert (masked.low, masked.high, masked.whole_rows) == (0.0, 3.0, True)
    assert credit.improbable_cuts.__defaults__ == (0.9, 5)
    assert tc.temperature.AdaptiveTemperature().strength == 0.05
