import dataclasses
import math

import naive
import pytest
import tokcredit as tc


def test_formula():
    def formula(batch, log_probs):
        advantages, losses, dropped = naive.group_advantages(batch), [], 0
        for r, tokens in enumerate(naive.rows_of(batch)):
            fall = [(batch.rollout_log_probs[t] - log_probs[t]).item() for t in tokens]
            out = advantages[r] < 0 and sum(fall) / len(fall) > -0.2
            dropped += out
            q = [(log_probs[t] - batch.old_log_probs[t]).exp() for t in tokens]
            u = [log_probs[t] - batch.ref_log_probs[t] for t in tokens]
            # The value is q k3; its gradient, with the sampling of tokens, is q u.
            value = [(y * ((-v).exp() + v - 1)).detach() for y, v in zip(q, u, strict=True)]
            pull = [y.detach() * v**2 / 2 for y, v in zip(q, u, strict=True)]
            kl = [a + b - b.detach() for a, b in zip(value, pull, strict=True)]
            losses.append(
                [
                    (0 if out else naive.clipped(advantages[r], y, 0.8, 1.2)) + 0.1 * k
                    for y, k in zip(q, kl, strict=True)
                ]
            )
        assert 0 < dropped < 6
        return naive.sequence_mean(batch, losses)

    batch, current = naive.random_batch()
    batch = naive.with_inputs(batch, {"rollout_log_probs", "ref_log_probs"})
    naive.check(tc.methods.deepseek_v32(delta=-0.2, beta=0.1), batch, current, formula)


def test_by_hand():
    # The mean log-prob of the second row fell by 0.68 from the old policy and by 1.16 from the engine.
    plain = dataclasses.replace(tc.methods.deepseek_v32(), terms=())
    ppo = [-1.1, 0, -0.777778, -1, 0, 0, 1.077778]
    assert naive.slopes(plain) == pytest.approx([*ppo[:4], 0, 0, 0], abs=1e-6)
    kept = dataclasses.replace(tc.methods.deepseek_v32(delta=0.7, to="old_log_probs"), terms=())
    assert naive.slopes(kept) == pytest.approx(ppo, abs=1e-6)
    # The KL term acts on dropped rows too.
    pull = [0.350299, -0.911608, -0.103858, 0.693147, -0.306495, -0.460517, 0.517728]
    found = naive.slopes(tc.methods.deepseek_v32(beta=1.0))
    assert found == pytest.approx([a + b for a, b in zip([*ppo[:4], 0, 0, 0], pull, strict=True)], abs=1e-6)


def test_defaults():
    assert tc.methods.deepseek_v32() == tc.Objective(
        clip=tc.clip.ppo(0.2, 0.2),
        scales=(tc.scale.within("ratio", "mean", math.exp(-0.5), math.inf, "negative", "rollout_log_probs"),),
        aggregation=tc.aggregation.sequence_mean(),
        terms=(tc.term.kl(0.001, "k3_corrected"),),
    )
