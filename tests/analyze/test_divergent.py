import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import torch
from bigrams import END, as_pair, ids, scripted
from tokcredit.analyze import Divergent, StudySettings, run
from tokcredit.analyze.divergent import Labeller, summarize
from tokcredit.analyze.verifier import Case, imported, judge, verdict
from tokcredit.cli import main
from tokcredit.train import tasks

STOPS = ("a", "b", "c", "d", "e", "f", "g", "+")


def letters(context, small, large):
    """Divergent where the continuations after the first tokens differ; not told where the small one's is a digit."""
    if small[2].isdigit():
        return -1
    return int(small.split(">>")[1] != large.split(">>")[1])


def settings(
    folder=None,
    resume=False,
    small="tiny(steps=0)",
    large="tiny(steps=0)",
    verifier="test_divergent:letters",
    **changes,
):
    study = StudySettings(tasks=("addition(digits=1)",), problems=4, max_tokens=9, output=folder, resume=resume)
    defaults = {"sentence_ends": STOPS, "continuation_tokens": 6, "verifier": verifier}
    return Divergent(small, large, study, **(defaults | changes))


def greedy(model, prefix, count, stops):
    """One token after another from the whole prefix, without cache or batch."""
    made = []
    while len(made) < count and not (made and made[-1] in stops):
        made.append(int(model(torch.tensor([[*prefix, *made]])).logits[0, -1].argmax()))
    return made


LARGE = {"=": ("x",), "x": ("a",), "a": ("y",), "y": ("q",), "q": ("z",), "z": (END,), "w": (END,), "2": ("a",)}
SMALL = {**LARGE, "=": ("y",), "a": ("2",), "q": ("w",)}


def scripted_pair():
    return scripted(SMALL, (END,)), scripted(LARGE, (END,))


@pytest.mark.parametrize("batch", [1, 32])
def test_by_hand(batch):
    """The large model responses xayqz; the small one would change the first, the third and the fifth token."""
    label = Labeller(settings(batch=batch), as_pair(*scripted_pair()), imported("test_divergent:letters"))
    row = label(0, tasks.load(("addition(digits=1)",), 0.2).measured(1)[0]).to_pylist()[0]
    assert row["tokens"] == ids(*"xayqz", END) and row["small_tokens"] == ids(*"ya2qw", END)
    assert row["completion"] == "xayqz" and row["finished"]
    # A continuation ends with a, which is among STOPS, or with the end of the text.
    assert [(case["position"], case["small"], case["large"]) for case in row["cases"]] == [
        (0, f"<<y>>qz{END}", "<<x>>a"),
        (2, "<<2>>a", f"<<y>>qz{END}"),
        (4, f"<<w>>{END}", f"<<z>>{END}"),
    ]
    assert row["labels"] == [1, 0, -1, 0, 0, 0]


def test_a_response_that_was_cut():
    """The continuation of the last token is not in the response, so the large model writes it."""
    s = settings()
    s = dataclasses.replace(s, study=dataclasses.replace(s.study, max_tokens=3))
    label = Labeller(s, as_pair(*scripted_pair()), imported("test_divergent:letters"))
    row = label(0, tasks.load(("addition(digits=1)",), 0.2).measured(1)[0]).to_pylist()[0]
    assert row["tokens"] == ids(*"xay") and not row["finished"]
    assert row["cases"][1]["large"] == f"<<y>>qz{END}" and row["labels"] == [1, 0, -1]


@pytest.mark.parametrize("batch", [1, 32])
@torch.no_grad()
def test_labels_by_a_loop(pair, batch):
    tokenizer, ends = pair.tokenizer, set(pair.ends.tolist())
    stops = {i for i in range(len(tokenizer)) if tokenizer.decode([i]) in STOPS} | ends
    s = settings(batch=batch)
    label = Labeller(s, pair, imported("test_divergent:letters"))
    for number, problem in enumerate(tasks.load(s.study.tasks, 0.2).measured(24)):
        row = label(number, problem).to_pylist()[0]
        prompt = tokenizer(problem.question).input_ids
        response = greedy(pair.second, prompt, 9, ends)
        small = [
            int(pair.first(torch.tensor([[*prompt, *response[:t]]])).logits[0, -1].argmax())
            for t in range(len(response))
        ]
        assert (row["prompt_tokens"], row["tokens"], row["small_tokens"]) == (prompt, response, small)
        labels, cases = [], []
        for t in range(len(response)):
            if small[t] == response[t]:
                labels.append(0)
                continue
            context, texts = [*prompt, *response[:t]], []
            for token in (small[t], response[t]):
                rest = [] if token in ends else greedy(pair.second, [*context, token], 6, stops)
                texts.append(f"<<{tokenizer.decode([token])}>>{tokenizer.decode(rest)}")
            labels.append(letters(None, *texts))
            cases.append({"position": t, "small": texts[0], "large": texts[1], "label": labels[-1]})
        assert row["labels"] == labels and row["cases"] == cases
        assert row["finished"] == (response[-1] in ends)


def test_router_features(pair):
    s = settings(top=3)
    problem = tasks.load(s.study.tasks, 0.2).measured(1)[0]
    row = Labeller(s, pair, imported("test_divergent:letters"))(0, problem).to_pylist()[0]
    for t in range(len(row["tokens"])):
        out = pair.first(torch.tensor([[*row["prompt_tokens"], *row["tokens"][:t]]]), output_hidden_states=True)
        logits, tokens = out.logits[0, -1].topk(3)
        assert row["top_tokens"][t] == tokens.tolist() and row["small_tokens"][t] == tokens[0]
        assert row["top_logits"][t] == pytest.approx(logits.tolist(), abs=1e-3)
        assert row["hidden_states"][t] == pytest.approx(out.hidden_states[-1][0, -1].tolist(), abs=1e-3)


def test_findings_and_resuming(save, tmp_path):
    models = dict(zip(("small", "large"), save(*scripted_pair()), strict=True))
    summary = run(settings(tmp_path / "run", **models))
    folder = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = sorted(folder.glob("problem-*.parquet"))
    assert len(files) == 4 and json.loads((folder / "summary.json").read_text()) == summary
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert summary == summarize(rows) and summary["responses"] == 4 and summary["tokens"] == 24
    assert summary["different"] == summary["identical"] == 1 / 2
    assert summary["divergent"] == summary["neutral"] == summary["unknown"] == pytest.approx(1 / 6)
    assert rows[0]["top_logits"] is None and rows[0]["hidden_states"] is None
    for name in (files[2].name, files[3].name, "summary.json", "summary.png"):
        (folder / name).unlink()
    run(settings(folder, resume=True, **models))
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after == before


def test_a_summary_by_hand():
    rows = [
        {"reward": 1.0, "tokens": [1, 2, 3, 4], "small_tokens": [1, 5, 5, 5], "labels": [0, 0, 1, -1]},
        {"reward": 0.0, "tokens": [7], "small_tokens": [7], "labels": [0]},
    ]
    assert summarize(rows) == {
        **{"responses": 2, "tokens": 5, "accuracy": 0.5, "different": 0.6},
        **{"identical": 0.4, "neutral": 0.2, "divergent": 0.2, "unknown": 0.2},
    }


def test_the_same_model_never_differs(save, tmp_path):
    (model,) = save(scripted(LARGE, (END,)))
    summary = run(settings(tmp_path / "run", small=model, large=model))
    assert summary["identical"] == 1 and summary["different"] == 0


def test_a_model_judges(pair):
    verify = judge("tiny(steps=0)", torch.device("cpu"), torch.float32, batch=2)
    cases = [Case("1+1=", "<<2>>.", "<<3>>."), Case("", "<<a>>", "<<b>>c"), Case("x", "<<0>>1", "<<1>>0")]
    verdicts = verify(cases)
    assert verdicts == [verify([case])[0] for case in cases] and set(verdicts) <= {-1, 0, 1}
    assert verify([]) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *(("1", 1), ("0", 0), ("The answer is 1.", 1), ("**0**\n", 0), ("0 because 12 > 7", 0)),
        *(("", -1), ("neither", -1), ("10", -1), ("7", -1), ("it is 1 because", 1), ("output", -1)),
        # The first number after "output", else the first number.
        *(("1. The results differ: 10 versus 0.", 1), ("0. Both give 1.", 0), ("1, no: 0", 1)),
        *(("Step 1: equal. Output: 0", 0), ("0 and 1 differ, so the output is **1**, not 0", 1), ("1 OUTPUT\n0", 0)),
        *(("1, outputs are equal", 1), ("10 versus 1", -1), ("Output: 10, not 1", -1), ("Output: -1", -1), ("0.5", -1)),
    ],
)
def test_verdicts(answer, expected):
    assert verdict(answer) == expected


def two(context, small, large):
    return 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifier": None}, "verifier, judge: expected one of them, got None, None"),
        ({"judge": "tiny"}, "verifier, judge: expected one of them, got test_divergent:letters, tiny"),
        ({"verifier": "nothing"}, "verifier: expected package.module:function, got 'nothing'"),
        ({"verifier": "test_divergent:nothing"}, "verifier: expected a function in test_divergent, got 'nothing'"),
        ({"batch": 0}, "batch: expected a whole number at least 1, got 0"),
        ({"continuation_tokens": -1}, "continuation_tokens: expected a whole number at least 0, got -1"),
        ({"top": -1}, "top: expected a whole number at least 0, got -1"),
    ],
)
def test_errors(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_verdict_is_one_of_three():
    with pytest.raises(ValueError, match="verifier: expected 1, 0 or -1 from test_divergent:two, got 2"):
        imported("test_divergent:two")([Case("", "<<1>>", "<<2>>")])


def test_on_the_command_line(tmp_path, capsys):
    arguments = "analyze divergent --small tiny(steps=0) --large tiny(steps=0,seed=1) --problems 1 --max-tokens 3"
    main([*arguments.split(), "--judge", "tiny(steps=0)", "--output", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "tiny(steps=0) along 1 responses" in out and "divergent" in out
    with pytest.raises(SystemExit, match="tokcredit: --verifier, --judge: expected one of them, got None, None"):
        main(["analyze", "divergent", "--small", "tiny", "--large", "tiny"])
