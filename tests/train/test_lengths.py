import copy
import dataclasses

import pytest
import tokcredit as tc
import torch
from accelerate import Accelerator
from tokcredit.train import run, tiny
from tokcredit.train.experiment import resolved
from tokcredit.train.lengths import LengthHead, LengthLearner, candidates_head
from tokcredit.train.ranks import Ranks
from tokcredit.train.record import read_metrics
from tokcredit.train.trainer import Trainer

GAMMA = 0.9


def counting_batch(lengths):
    """Rows whose hidden state tells how many tokens are left."""
    total = sum(lengths)
    left = torch.tensor([float(n - i) for n in lengths for i in range(n)])
    hidden = torch.stack([left / 10, torch.ones(total), (left / 10) ** 2], 1)
    return tc.Rollouts(
        torch.zeros(total, dtype=torch.long),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.zeros(len(lengths), dtype=torch.long),
        torch.zeros(len(lengths)),
        extras={"hidden_states": hidden},
    )


def made(passes, lr=1e-3):
    torch.manual_seed(0)
    return LengthLearner(LengthHead(3), GAMMA, Ranks(Accelerator(mixed_precision="no")), lr=lr, passes=passes)


def test_the_loss_and_its_gradient_are_the_formulas():
    learner, batch = made(passes=1), counting_batch([3, 8, 1, 12])
    head = copy.deepcopy(learner.head).double()
    found = learner.update(batch, torch.tensor([True] * 4))
    left = torch.tensor([float(n - i) for n in (3, 8, 1, 12) for i in range(n)]).double()
    loss = (-head(batch.extras["hidden_states"].double()).sigmoid() - (GAMMA**left - 1)).square().mean()
    loss.backward()
    assert found == pytest.approx(loss.item(), rel=1e-5)
    for ours, exact in zip(learner.head.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, atol=1e-6, rtol=1e-4)


def test_every_pass_lowers_the_loss():
    """A small step along the gradient of a fixed batch."""
    learner, batch = made(passes=1), counting_batch([3, 8, 1, 12])
    losses = [learner.update(batch, torch.tensor([True] * 4)) for _ in range(20)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1] > 0
    many = made(passes=20)
    assert many.update(batch, torch.tensor([True] * 4)) == losses[0]
    torch.testing.assert_close(many.values(batch), learner.values(batch))


def test_values_are_minus_the_sigmoid():
    learner, batch = made(passes=1), counting_batch([3, 8])
    torch.testing.assert_close(learner.values(batch), -torch.sigmoid(learner.head(batch.extras["hidden_states"])))


def test_cut_rows_teach_nothing():
    learner, batch = made(passes=30), counting_batch([3, 8])
    start = copy.deepcopy(learner.state_dict())
    assert learner.update(batch, torch.tensor([False, False])) == 0
    for name, p in learner.head.state_dict().items():
        assert torch.equal(p, start["head"][name])
    twin = made(passes=30)
    learner.update(batch, torch.tensor([True, False]))
    twin.update(batch.select([0]), torch.tensor([True]))
    for a, b in zip(learner.head.parameters(), twin.head.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_state_is_restored():
    learner, batch, all_rows = made(passes=30), counting_batch([3, 8]), torch.tensor([True, True])
    learner.update(batch, all_rows)
    twin = made(passes=30)
    twin.load_state_dict(copy.deepcopy(learner.state_dict()))
    learner.update(batch, all_rows)
    twin.update(batch, all_rows)
    assert torch.equal(learner.values(batch), twin.values(batch))


def test_candidates():
    words = tiny.tokenizer()
    model = tiny.model(words).eval()
    head = LengthHead(96)
    ids = torch.tensor([words("1+2=").input_ids, words("3+4=").input_ids])
    candidates = torch.tensor([[5, words.eos_token_id, 9], [7, 8, 5]])
    z = candidates_head(model, head, torch.tensor([words.eos_token_id]))(ids, candidates)
    assert z[0, 1] == -torch.inf
    for row in range(2):
        for k in range(3):
            if (row, k) == (0, 1):
                continue
            text = torch.cat([ids[row], candidates[row, k : k + 1]])[None]
            hidden = model(text, output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(z[row, k], head(hidden), atol=1e-5, rtol=1e-4)


def test_decoding_is_steered():
    """With a head that expects fewer tokens after some tokens, a negative tilt draws those."""
    words = tiny.tokenizer()
    model = tiny.model(words).eval()
    short = torch.arange(3, 40)

    def head(input_ids, candidates):
        return torch.where(torch.isin(candidates, short), -3.0, 3.0)

    ids = torch.tensor([words("1+2=").input_ids] * 64)
    shares = {}
    for beta in (-20.0, 20.0):
        torch.manual_seed(0)
        tilt = tc.decoding.length.LengthTilt(head, beta, candidates=99, top_p=1.0)
        out = model.generate(ids, max_new_tokens=3, do_sample=True, top_k=0, logits_processor=[tilt])
        shares[beta] = torch.isin(out[:, ids.shape[1] :], short).float().mean().item()
    # The tilt changes the odds by exp(18), far more than the logits of any random model.
    assert shares[-20.0] > 0.99 and shares[20.0] < 0.01


def test_a_run_learns_and_resumes(settings, uniform, tmp_path):
    whole = settings("lenvm", steps=4, save_every=2, output=tmp_path / "whole")
    parts = dataclasses.replace(whole, output=tmp_path / "parts", steps=2)
    run(whole)
    run(parts)
    run(dataclasses.replace(parts, steps=4, resume=True))
    lines = [read_metrics(s.output) for s in (whole, parts)]
    for name in ("reward_mean", "loss", "length_loss"):
        assert [line.get(name) for line in lines[0]] == [line.get(name) for line in lines[1]]
    assert all(line["length_loss"] > 0 for line in lines[0][1:])


def test_the_values_reach_the_objective(settings, uniform):
    trainer = Trainer(resolved(settings("lenvm")))
    step = trainer.step(1)
    batch = step.update.prepared.batch
    value = batch.input("length_values")
    assert ((value < 0) & (value > -1)).all()
    plain = tc.methods.grpo().prepare(dataclasses.replace(batch, extras={})).advantages
    cut = batch.input("truncated")
    assert cut.any() and not cut.all()
    expected = plain + 0.1 * tc.length.advantages(value, batch.spans, 0.997, truncated=cut)
    torch.testing.assert_close(step.update.prepared.advantages, expected)
