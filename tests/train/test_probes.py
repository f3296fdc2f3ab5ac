import math
import zlib

import pytest
import tokcredit as tc
import torch
from tokcredit.train import ProbeSettings, tiny
from tokcredit.train.experiment import resolved
from tokcredit.train.probes import _Rows
from tokcredit.train.scoring import left_padded
from tokcredit.train.tasks import Problem
from tokcredit.train.trainer import Trainer

WORDS = tiny.tokenizer()
ROWS = ["a;b;", "xy", "a;c;;d", ""]


def worth(response):
    """A reward that differs between different responses, whatever the model says."""
    return zlib.crc32(response.encode()) / 2**32


def problem(answer):
    return Problem("test", "2+3=", answer, worth)


@pytest.fixture
def trainer(settings):
    probes = ProbeSettings(continuations=3, interval=2, step_end=";", text=">", answers=4, answer_tokens=3)
    return Trainer(resolved(settings("spae", probes=probes)))


@pytest.fixture
def batch():
    lengths = torch.tensor([len(text) for text in ROWS])
    return tc.Rollouts(
        torch.tensor([t for text in ROWS for t in WORDS(text).input_ids]),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        torch.zeros(4, dtype=torch.long),
        torch.zeros(4),
        extras={"prompt_tokens": torch.tensor([[-1, *WORDS("2+3=").input_ids]] * 4)},
    )


def test_steps_end_with_the_text(trainer, batch):
    rows = _Rows(trainer.context, batch)
    assert rows.step_ends(";") == [1, 3, 7, 9, 10]
    assert rows.step_ends(";;") == [10] and rows.step_ends("?") == []
    assert rows.before(7) == WORDS("a").input_ids and rows.through(7) == WORDS("a;").input_ids
    assert rows.before(6) == [] and rows.before(4) == []


def test_steps_end_with_the_thought(trainer):
    text = "a;</think>b;"
    batch = tc.Rollouts(
        torch.tensor(WORDS(text).input_ids),
        torch.tensor([0, len(text)]),
        torch.zeros(1, dtype=torch.long),
        torch.zeros(1),
        extras={"prompt_tokens": torch.tensor([[5]])},
    )
    assert _Rows(trainer.context, batch).step_ends(";") == [1]


def test_values_are_means_over_continuations_from_the_state(trainer, batch, monkeypatch):
    states_sampled = []
    sample = trainer.context.sampler.sample

    def recorded(prompts, count, max_tokens, temperature, stop):
        made = sample(prompts, count, max_tokens, temperature, stop)
        rows = made.tokens.split(made.cu_seqlens.diff().tolist())
        states_sampled.append({tuple(p): rows[i * count : (i + 1) * count] for i, p in enumerate(prompts)})
        return made

    monkeypatch.setattr(trainer.context.sampler, "sample", recorded)
    problems = [problem("5")] * 4
    value = trainer.prober.probe(frozenset({"step_values"}), batch, problems, 1)["step_values"]
    # Steps begin at the first token of a row and behind every end but the last.
    begins = [0, 2, 4, 6, 8, 10, 11]
    assert (~value.isnan()).nonzero()[:, 0].tolist() == begins
    (states,) = states_sampled
    prompt = WORDS("2+3=").input_ids
    # The bare prompt is sampled once for three rows, "a;" once for two.
    assert len(states) == 4
    for t in begins:
        before = _Rows(trainer.context, batch).before(t)
        rows = states[(*prompt, *before)]
        limit = trainer.settings.sampling.max_tokens
        texts = [WORDS.decode((before + row.tolist())[:limit], skip_special_tokens=True) for row in rows]
        assert len(rows) == 3
        assert value[t].item() == pytest.approx(sum(map(worth, texts)) / 3)
    assert value[0] == value[4] == value[6]


def test_improbable_states_are_valued(trainer, batch):
    # Of the improbable tokens of a row every second one: in "a;b;" the first and third, in "a;c;;d" three of five.
    probable = [[], [1], [1]]
    old = torch.cat([torch.full((len(text),), -1.0) for text in ROWS])
    for begin, places in zip(batch.begin.tolist(), probable, strict=False):
        old[[begin + i for i in places]] = -0.01
    batch = batch.with_inputs(old_log_probs=old)
    value = trainer.prober.probe(frozenset({"state_values"}), batch, [problem("5")] * 4, 1)["state_values"]
    assert (~value.isnan()).nonzero()[:, 0].tolist() == [0, 2, 4, 6, 9, 11]
    assert torch.equal(~value.isnan(), tc.credit.improbable_cuts(batch, interval=2))


def test_answers(trainer, batch, monkeypatch):
    answers = []
    sample = trainer.context.sampler.sample

    def recorded(prompts, count, max_tokens, temperature, stop):
        assert (count, max_tokens, temperature) == (4, 3, 0.6)
        answers.append((prompts, sample(prompts, count, max_tokens, temperature, stop)))
        return answers[-1][1]

    monkeypatch.setattr(trainer.context.sampler, "sample", recorded)
    required_inputs = frozenset({"answer_probs", "answer_confidences"})
    found = trainer.prober.probe(required_inputs, batch, [problem("51")] * 4, 1)
    ends = [1, 3, 7, 9, 10]
    model, truth = trainer.model.double(), WORDS("51").input_ids
    ((states, made),) = answers
    rows = made.tokens.split(made.cu_seqlens.diff().tolist())
    with torch.no_grad():
        for k, t in enumerate(ends):
            state = WORDS("2+3=").input_ids + _Rows(trainer.context, batch).through(t) + WORDS(">").input_ids
            assert states[k] == state
            p = model(torch.tensor([[*state, *truth]])).logits[0, len(state) - 1 : -1].softmax(-1)
            probs = [p[i, token].item() for i, token in enumerate(truth)]
            assert found["answer_probs"][t].item() == pytest.approx(sum(probs) / 2, rel=1e-4)
            sure = []
            for row in rows[4 * k : 4 * k + 4]:
                p = model(torch.tensor([[*state, *row.tolist()]])).logits[0, len(state) - 1 : -1].softmax(-1)
                entropies = -(p * p.log()).sum(-1)
                sure.append(math.exp(-entropies.mean().item()))
            assert found["answer_confidences"][t].item() == pytest.approx(sum(sure) / 4, rel=1e-4)
    for x in found.values():
        assert (~x.isnan()).nonzero()[:, 0].tolist() == ends


def test_probing_leaves_the_generator_alone(trainer, batch):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    values = [trainer.prober.probe(frozenset({"step_values"}), batch, [problem("5")] * 4, n) for n in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = (v["step_values"].nan_to_num() for v in values)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_answers_after_turns(trainer):
    """Turns "ab", "c" and "d" of one row, with the reply ";;" of a tool; "ef" has one turn, and one row has none."""
    texts, masks = ["ab;;c>d", "ef", ";"], ["1100101", "11", "0"]
    batch = tc.Rollouts(
        torch.tensor([t for text in texts for t in WORDS(text).input_ids]),
        torch.tensor([0, 7, 9, 10]),
        torch.zeros(3, dtype=torch.long),
        torch.zeros(3),
        torch.tensor([x == "1" for mask in masks for x in mask]),
        extras={"prompt_tokens": torch.tensor([[-1, *WORDS("2+3=").input_ids]] * 3)},
    )
    problems = [problem("51"), problem("7"), problem("51")]
    score = trainer.learner.score
    after, first = trainer.prober.answers_of_turns(batch, problems, lambda forced: score(forced)[0])
    model = trainer.model.double()

    def expected(state, answer):
        state, truth = WORDS(state + ">").input_ids, WORDS(answer).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*state, *truth]])).logits[0, len(state) - 1 : -1].log_softmax(-1)
        return sum(logits[i, t].item() for i, t in enumerate(truth)) / len(truth)

    assert (~after.isnan()).nonzero()[:, 0].tolist() == [1, 4]
    assert after[1].item() == pytest.approx(expected("2+3=ab;;", "51"), rel=1e-4)
    assert after[4].item() == pytest.approx(expected("2+3=ab;;c>", "51"), rel=1e-4)
    assert first.tolist() == pytest.approx([expected("2+3=", a) for a in ("51", "7", "51")], rel=1e-4)
    # The same turns in rows of their own, each with what came before it as its prompt.
    prompts = [WORDS(text).input_ids for text in ("2+3=", "2+3=ab;;", "2+3=ab;;c>")]
    cut = tc.Rollouts(
        torch.tensor(WORDS("abcd").input_ids),
        torch.tensor([0, 2, 3, 4]),
        torch.zeros(3, dtype=torch.long),
        torch.zeros(3),
        trajectory_ids=torch.zeros(3, dtype=torch.long),
        extras={
            "prompt_tokens": left_padded(prompts, -1, torch.device("cpu"))[0],
            "turn_ids": torch.tensor([0, 0, 1, 2]),
        },
    )
    trainer.model.float()
    rows, initial = trainer.prober.answers_of_turns(cut, [problem("51")] * 3, lambda forced: score(forced)[0])
    assert (~rows.isnan()).nonzero()[:, 0].tolist() == [1, 2]
    torch.testing.assert_close(rows[[1, 2]], after[[1, 4]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(initial, first[[0, 0, 0]], rtol=1e-4, atol=1e-5)
