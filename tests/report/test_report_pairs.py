import io
import json
import math

import derivations
import numpy as np
import pytest
import tokcredit as tc
from tokcredit import report
from tokcredit.report.summary import summarize

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

PAIR = {
    "prompt": "p",
    "chosen": "a",
    "rejected": "b",
    "chosen_ids": [5, 8, 2, 3],
    "chosen_mask": [True, True, True, False],
    "chosen_ref_log_probs": [-1.0, -1.0, -1.0, -1.0],
    "chosen_log_probs": [-0.5, -0.1, -2.0, -9.0],
    "rejected_ids": [5, 9],
    "rejected_ref_log_probs": [-1.0, -1.0],
    "rejected_log_probs": [-0.5, -0.9],
    "rejected_mask": [True, True],
}
OTHER = {
    "prompt": "q",
    "chosen": "b",
    "rejected": "a",
    **{
        f"{mine}_{name}": PAIR[f"{theirs}_{name}"]
        for mine, theirs in (("chosen", "rejected"), ("rejected", "chosen"))
        for name in ("ids", "mask", "ref_log_probs", "log_probs")
    },
}


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_a_file_of_pairs(tmp_path):
    run = report.read(lines(tmp_path / "x.jsonl", [PAIR, OTHER]))
    assert run.batch.rewards.tolist() == [1, 0, 1, 0] and run.batch.group_ids.tolist() == [0, 0, 1, 1]
    assert run.batch.tokens.tolist() == [5, 8, 2, 3, 5, 9, 5, 9, 5, 8, 2, 3]
    assert run.batch.response_mask.tolist() == [True, True, True, False] + [True] * 7 + [False]
    assert run.prompts == ["p", "q"] and run.of_pairs
    with pytest.raises(ValueError, match=r"rewards: expected none because .* holds pairs, got accuracy"):
        report.read(tmp_path / "x.jsonl", rewards={"accuracy": 1.0})
    with pytest.raises(ValueError, match="ref_log_probs: expected 4 values in chosen of row 0 of "):
        report.read(lines(tmp_path / "y.jsonl", [{**PAIR, "chosen_ref_log_probs": [-1.0]}]))
    with pytest.raises(ValueError, match="ref_log_probs: expected in every row of the file or in none"):
        report.read(lines(tmp_path / "y.jsonl", [{k: v for k, v in PAIR.items() if k != "rejected_ref_log_probs"}]))


def test_pairs_of_texts_and_chats(tmp_path):
    words = derivations.tokenizer(["yes", "no"])
    words.save_pretrained(tmp_path / "tokenizer")
    said = {"role": "user", "content": "Really?"}
    chats = {name: [said, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    for record, context in (({"prompt": "p", "chosen": "chosen", "rejected": "rejected"}, ""), (chats, "Really?")):
        run = report.read(lines(tmp_path / "x.jsonl", [record]))
        sizes = [run.batch.all_spans.lengths[r].item() for r in (0, 1)]
        texts = [words.decode(ids) for ids in run.batch.tokens.split(sizes)]
        assert texts == [context + "chosen", context + "rejected"]
        expected = [len(words.encode(text)) for text in ("chosen", "rejected")]
        assert run.batch.lengths.tolist() == expected


def test_numbers_by_hand(tmp_path):
    data = report.compute(report.read(lines(tmp_path / "x.jsonl", [PAIR, OTHER])), ["dpo", "tab_po", "grpo"])
    assert data.with_margin == {"dpo", "tab_po"} and "margin" not in data.methods["grpo"]
    dpo, tab_po = data.methods["dpo"], data.methods["tab_po"]
    chosen, rejected = [0.5, 0.9, -1.0, math.nan], [0.5, 0.1]
    expected = pytest.approx([*chosen, *rejected, *rejected, *chosen], nan_ok=True)
    assert dpo["log_ratio"].tolist() == expected
    assert dpo["score"].tolist() == pytest.approx([0.4, 0.6, 0.6, 0.4])
    assert dpo["margin"].tolist() == pytest.approx([-0.2, 0.2]) and not dpo["barrier"].any()
    # Chosen tokens of a probability below 0.66, whose logarithm is -0.42.
    assert np.flatnonzero(tab_po["barrier"]).tolist() == [0, 2, 6, 7]
    figures = summarize(data)["methods"]
    assert figures["dpo"]["margin"] == pytest.approx(0, abs=1e-6) and figures["dpo"]["accuracy"] == 0.5
    assert figures["tab_po"]["barrier"] == pytest.approx(4 / 10) and "margin" not in figures["grpo"]
    none = report.compute(data.run, {"mine": tc.methods.tab_po(barrier_weight=0.0)})
    assert not none.methods["mine"]["barrier"].any()


def test_the_score_is_that_of_the_loss(tmp_path):
    run = report.read(lines(tmp_path / "x.jsonl", [PAIR, OTHER]))
    for name in ("dpo", "simpo", "tab_po"):
        objective = tc.methods.load(name)
        loss = objective.loss(objective.prepare(run.batch), run.batch.old_log_probs)
        data = report.compute(run, {name: objective})
        assert data.methods[name]["margin"].mean() == pytest.approx(loss.metrics["margin_mean"].item())
        assert summarize(data)["methods"][name]["accuracy"] == pytest.approx(loss.metrics["accuracy_mean"].item())


def test_without_log_probs(tmp_path):
    bare = {name: x for name, x in PAIR.items() if not name.endswith("log_probs")}
    data = report._usual(report.read(lines(tmp_path / "x.jsonl", [bare])))
    assert list(data.methods) == ["simpo"]
    simpo = data.methods["simpo"]
    assert np.isnan(simpo["log_ratio"]).all() and np.isnan(simpo["margin"]).all()
    assert simpo["advantage"].tolist() == [1, 1, 1, 0, -1, -1]
    assert data.notes == ["The file has no log-probs of the updated policy, so log-ratios and margins are unknown."]
    assert summarize(data)["methods"]["simpo"]["margin"] is None


def test_the_method_of_pairs(tmp_path):
    data = report._usual(report.read(lines(tmp_path / "x.jsonl", [PAIR])))
    assert list(data.methods) == ["dpo"]
    (note,) = data.notes
    assert note.endswith("so log-ratios and margins are those of the policy before it.")
    with pytest.raises(ValueError, match=r"ref_log_probs: expected in .* because dpo reads it"):
        report.run(lines(tmp_path / "y.jsonl", [{k: v for k, v in PAIR.items() if "ref" not in k}]), ["dpo"])


def test_pairs_of_the_trainer(tmp_path):
    """Columns of a run on pairs, whose log-probs are those of the updated policy."""
    rows = [
        {
            "group": 0,
            "prompt": "p",
            "tokens": PAIR[f"{name}_ids"],
            "reward": reward,
            "response_mask": PAIR[f"{name}_mask"],
            "ref_log_probs": PAIR[f"{name}_ref_log_probs"],
            "old_log_probs": PAIR[f"{name}_ref_log_probs"],
            "log_probs": PAIR[f"{name}_log_probs"],
        }
        for name, reward in (("rejected", 0.0), ("chosen", 1.0))
    ]
    data = report.compute(report.read(lines(tmp_path / "x.jsonl", rows)), ["dpo"])
    assert data.methods["dpo"]["score"].tolist() == pytest.approx([0.6, 0.4])
    assert data.methods["dpo"]["margin"].tolist() == pytest.approx([-0.2]) and data.notes == []


def test_terminal(tmp_path):
    rich = pytest.importorskip("rich.console")
    from tokcredit.report.terminal import show

    console = rich.Console(width=200, record=True, file=io.StringIO())
    show(report.compute(report.read(lines(tmp_path / "x.jsonl", [PAIR])), ["dpo", "grpo"]), console=console)
    head, dpo, grpo = [
        line.split() for line in console.export_text().splitlines() if line.startswith(("met", "dpo", "g"))
    ]
    assert head[-2:] == ["mean", "margin"] and dpo[-1] == "-0.200" and grpo[-2:] == ["not", "applicable"]
