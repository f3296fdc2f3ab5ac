"""What each method's defaults come to, stage by stage: no value moves without a line here."""

import math

import pytest
import tokcredit as tc
from tokcredit import schedule
from tokcredit.methods.ba import balanced
from tokcredit.methods.canon import by_mean_reward, conditional, mean_entropy
from tokcredit.methods.d3s import varied_rows
from tokcredit.methods.divergence_weighted import divergence
from tokcredit.methods.hapo import entropy_deviation, outside_center, token_group_average, widened
from tokcredit.methods.lenvm import length_advantage
from tokcredit.methods.match_tir import turns
from tokcredit.methods.nthr import negative_hidden_reward
from tokcredit.methods.otb import optimal_baseline
from tokcredit.methods.pods import most_varied
from tokcredit.methods.r3 import dominance, length_reward, pooled
from tokcredit.methods.spae import step_potential
from tokcredit.methods.spo_tree import edges
from tokcredit.methods.tempo import tempo_credit
from tokcredit.methods.thr import hidden_reward
from tokcredit.stages import aggregation, clip, credit, filters, link, ratio, token_score, token_weights
from tokcredit.supervised import reverse_kl

GRPO = {
    "credit": credit.group_normalized(scale=True, epsilon=1e-6),
    "filters": (),
    "token_weights": (),
    "ratio": ratio.token(bound=20.0),
    "clip": clip.ppo(low=0.2, high=0.2, cap=None),
    "aggregation": aggregation.sequence_mean(),
    "scales": (),
    "terms": (),
}
HIGHER = clip.ppo(low=0.2, high=0.28, cap=None)
TOKENS = aggregation.token_mean()
SEQUENCE = {"ratio": ratio.sequence(high=10.0), "clip": clip.ppo(low=3e-4, high=4e-4, cap=None)}
DAPO = {"clip": HIGHER, "aggregation": TOKENS}
DEVIATION = entropy_deviation(pivot=0.8, literal_sign=False)
SEGMENTS = {"ratio": ratio.token(bound=10.0), "aggregation": TOKENS}

DIFFERENCES = {
    "grpo": {},
    "dr_grpo": {"credit": credit.group_normalized(scale=False), "aggregation": aggregation.sequence_sum(None)},
    "dapo": DAPO,
    "rloo": {"credit": credit.leave_one_out(), "aggregation": TOKENS},
    "otb": {"credit": optimal_baseline(by_turn=False, epsilon=1e-8), "aggregation": TOKENS},
    "gspo": SEQUENCE,
    "cispo": {
        "clip": clip.gated(low=-math.inf, high=math.log(1 + 0.2), outside_low=1.0, outside_high=1.0, both_sides=True),
        "aggregation": TOKENS,
    },
    "sapo": {"clip": clip.soft(tau_positive=1.0, tau_negative=1.05)},
    "tempo": {
        "credit": tempo_credit(scale=True, epsilon=1e-6),
        "clip": clip.ppo(low=0.2, high=0.28, cap=3.0),
        "aggregation": TOKENS,
    },
    "ctpo": {
        "ratio": ratio.cumulative(bound=20.0, high=10.0),
        "clip": clip.growing(low=0.025, high=0.05, power=0.5, cap=0.05),
        "aggregation": TOKENS,
    },
    "ba": {"clip": HIGHER, "aggregation": balanced()},
    "grpo_n": {"credit": credit.negative_part(credit.group_normalized())},
    "gspo_n": {"credit": credit.negative_part(credit.group_normalized()), **SEQUENCE},
    "psr": {
        "credit": credit.thresholded(above=1.0, below=0.0, threshold=0.5),
        "filters": (filters.nonzero_advantage(),),
        "aggregation": TOKENS,
    },
    "nsr": {
        "credit": credit.thresholded(above=0.0, below=-1.0, threshold=0.5),
        "filters": (filters.nonzero_advantage(),),
        "aggregation": TOKENS,
    },
    "w_reinforce": {"credit": credit.thresholded(above=0.1, below=-1.0, threshold=0.5), "aggregation": TOKENS},
    "pods": {"credit": credit.group_normalized(epsilon=1e-4), "filters": (most_varied(count=16),)},
    "d3s": {
        "filters": (
            varied_rows(schedule.linear(0.25, 1.0)),
            filters.nonzero_advantage(),
            filters.top_share(schedule.linear(0.2, 1.0), token_score.given("entropies"), times_advantage=True),
        ),
        "aggregation": TOKENS,
    },
    "canon": {
        "credit": conditional(mean_entropy(), between=by_mean_reward()),
        "clip": HIGHER,
        "aggregation": aggregation.sequence_sum(None),
    },
    "hapo": {
        "credit": token_group_average(
            limit=5.0, epsilon=1e-6, otherwise=credit.group_normalized(epsilon=1e-6), limit_padding=False
        ),
        "clip": widened(DEVIATION, low=0.2, high=0.28, widen=1.0, cap=10.0),
        "aggregation": TOKENS,
        "scales": (outside_center(DEVIATION, strength=1.0),),
    },
    "divergence_weighted": {**DAPO, "scales": (divergence(strength=1.0, slope=10.0),)},
    "thr": {"credit": hidden_reward(credit.group_normalized(), favour=0.1, beta=1.0, threshold=0.5)},
    "nthr": {"credit": negative_hidden_reward(credit.group_normalized(), beta=1.0, threshold=0.5)},
    "tw_grpo": {
        "credit": credit.group_normalized(epsilon=1e-4),
        "token_weights": (token_weights.raised(token_score.given("disagreement"), strength=1.7 - 1),),
        **DAPO,
    },
    "spo_chain": {"credit": credit.value_changes(), "filters": (filters.improbable(0.9),), **SEGMENTS},
    "spo_tree": {
        "credit": edges(scale=False, epsilon=1e-8, tolerance=1e-12),
        "filters": (filters.nonzero_advantage(), filters.improbable(0.9)),
        **SEGMENTS,
    },
    "vineppo": {"credit": credit.value_changes("step_values"), "aggregation": TOKENS},
    "spae": {
        "credit": credit.whitened(step_potential(alpha=0.5, bonus=0.5, saturated=0.9)),
        "filters": (filters.mixed_groups(),),
        **DAPO,
    },
    "match_tir": {"credit": turns(discount=0.9, epsilon=1e-6, halve=False, center_alone=False)},
    "r3": {
        "credit": pooled(
            (length_reward(limit=32768, threshold=0.5), dominance(share=0.2, best=0.5, threshold=0.5)),
            scale=1.0,
            epsilon=1e-6,
        )
    },
    "lenvm": {"credit": length_advantage(credit.group_normalized(), scale=0.1, gamma=0.997, trace=1.0)},
}


OTHERS = {
    "sft": tc.Supervised(),
    "dpo": tc.Preference(
        reference="ref_log_probs",
        normalization="sum",
        link=link.logistic(beta=0.1, margin=0.0, label_smoothing=0.0),
    ),
    "tip": tc.Supervised(
        reverse_kl(),
        filters=(
            filters.top_share(
                0.5,
                token_score.either(
                    token_score.scaled(token_score.given("entropies"), quantile=0.98),
                    token_score.scaled(token_score.given("reverse_kl")),
                ),
                per_row=True,
                round_up=False,
            ),
        ),
        aggregation=TOKENS,
    ),
}


@pytest.mark.parametrize("name", tc.methods.names())
def test_defaults(name):
    assert name in DIFFERENCES.keys() | OTHERS.keys(), f"{name}: expected a line for its stages"
    objective = tc.methods.load(name)
    if name in OTHERS:
        assert objective == OTHERS[name]
        return
    for stage, expected in (GRPO | DIFFERENCES[name]).items():
        assert getattr(objective, stage) == expected, stage


def test_defaults_of_stages_that_methods_leave_alone():
    assert (token_weights.importance_truncated().high, token_weights.importance_truncated().whole_rows) == (2.0, False)
    masked = token_weights.importance_masked()
    assert (masked.low, masked.high, masked.whole_rows) == (0.0, 3.0, True)
    assert credit.improbable_cuts.__defaults__ == (0.9, 5)
    assert tc.decoding.temperature.AdaptiveTemperature().strength == 0.05
