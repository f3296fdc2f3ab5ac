import io
import json
import math
from dataclasses import replace

import derivations
import naive
import numpy as np
import pytest
import tokcredit as tc
from tokcredit import report
from tokcredit.report.recorded import as_recorded
from tokcredit.report.summary import summarize

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    derivations.write(path, groups=3, rollouts=6, length=60)
    return path


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_text_that_would_act_is_written_out():
    from tokcredit.report.vocabulary import Vocabulary, visible

    assert visible("a\u202eb\u2066\x1b[1m\x00") == r"a\u{202e}b\u{2066}\u{1b}[1m\u{0}"
    assert visible("\ud800\u200b\ufeff\u2028") == r"\u{d800}\u{200b}\u{feff}" + "\u2028"
    assert visible("line\n\tnext é 👩\u200d🔬") == "line\n\tnext é 👩\u200d🔬"
    assert visible("x" * 300) == "x" * 200 + "… (300 characters)"

    class SentencePiece:
        pieces = ("▁the", "the", "<0xF0>", "", "\u202e")

        def get_vocab(self):
            return {piece: i for i, piece in enumerate(self.pieces)}

        def convert_ids_to_tokens(self, i):
            return self.pieces[i]

        def decode(self, ids, **settings):
            return {"▁the": "the", "<0xF0>": "\ufffd"}.get(self.pieces[ids[0]], self.pieces[ids[0]])

    assert Vocabulary(SentencePiece()).texts([0, 1, 2, 3, 4, 5, -1]) == [
        " the",
        "the",
        "⟨f0⟩",
        "⟨⟩",
        r"\u{202e}",
        "⟨5⟩",
        "⟨-1⟩",
    ]


# -- tables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def four(tmp_path):
    """The rollouts of the README, with log-probs that move both ways, and a group of one between them."""
    shared = {"group": 5, "prompt": "p"}
    rows = [
        {
            "tokens": [5, 8, 2],
            "reward": 1.0,
            "old_log_probs": [-1.0, -1, -1],
            "log_probs": [-0.5, -1.0, -1.4],
            **shared,
        },
        {
            "tokens": [5, 9, 2],
            "reward": 0.0,
            "old_log_probs": [-1.0, -1, -1],
            "log_probs": [-0.5, -1.0, -1.4],
            **shared,
        },
        {"tokens": [6], "reward": 3.0, "old_log_probs": [-1.0], "log_probs": [-1.0], "group": 6, "prompt": "q"},
        {"tokens": [7, 2], "reward": 0.0, "old_log_probs": [-1.0, -1], "log_probs": [-1.5, -0.9], **shared},
        {
            "tokens": [5, 8, 2],
            "reward": 1.0,
            "old_log_probs": [-1.0, -1, -1],
            "log_probs": [-1.0, -1.0, -1.0],
            **shared,
        },
    ]
    path = lines(tmp_path / "x.jsonl", rows)
    run = report.read(path)
    # Plain JSONL has no settings, but both kinds of log-probs were given.
    assert run.log_probs is not None
    return run


def test_tables_by_hand(four):
    data = report.compute(four, ["tempo", "ctpo", "gspo", "cispo"])
    nodes = data.nodes
    # "" of group 5; 5; 8 2; 9 2; then 6 of group 6; then 7 2.
    order = np.argsort(nodes["group"] * 100 + nodes["depth"] * 10 + np.arange(len(nodes["depth"])))
    assert nodes["count"][order].tolist() == [4, 3, 1, 2, 1, 1]
    assert nodes["value"][order].tolist() == pytest.approx([0.5, 2 / 3, 0, 1, 0, 3])
    assert nodes["before"][order].tolist() == pytest.approx([0.5, 0.5, 0.5, 2 / 3, 2 / 3, 3])
    assert data.tokens["branch"].tolist() == [
        True,
        True,
        False,
        True,
        True,
        False,
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    assert data.groups["differ"].tolist() == [True, False]
    advantages = data.methods["tempo"]["advantage"]
    assert advantages[:6] == pytest.approx([1.1547, 1.4434, 0.8660, -0.5773, -2.0207, -0.8660], abs=1e-4)

    ratio, log = {m: t["ratio"] for m, t in data.methods.items()}, np.log
    assert log(ratio["tempo"][:3]) == pytest.approx([0.5, 0, -0.4], abs=1e-6)
    assert log(ratio["ctpo"][:3]) == pytest.approx([0.5, 0.5, 0.1], abs=1e-6)
    assert log(ratio["gspo"][:3]) == pytest.approx([0.1 / 3] * 3, abs=1e-6)
    ctpo = data.methods["ctpo"]
    assert log(ctpo["high"][:3]) == pytest.approx(0.05 * np.sqrt([1, 2, 3]))
    assert log(ctpo["low"][:3]) == pytest.approx(-0.025 * np.sqrt([1, 2, 3]))
    # Clipped: a positive advantage above the bounds, or a negative one below them (or above the cap).
    assert data.methods["tempo"]["clipped"][:8].tolist() == [1, 0, 0, 0, 0, 1, 0, 1]
    assert ctpo["clipped"][:6].tolist() == [1, 1, 1, 1, 1, 1]
    assert data.methods["cispo"]["clipped"].max() == 2 and data.methods["cispo"]["gradient"][0] != 0


def test_tables_are_the_stages_own(folder):
    run = report.read(folder)
    carried = {"old_log_probs", "rollout_log_probs", "entropies"}
    names = [m for m in naive.OF_GROUPS if tc.methods.load(m).required_inputs <= carried]
    assert {"tempo", "ctpo", "hapo", "divergence_weighted", "pods"} <= set(names)
    data = report.compute(replace(run, progress=0.5), names)
    tree = tc.tree.build(run.batch)
    assert np.array_equal(data.tokens["node"], tree.node.numpy())
    assert np.array_equal(data.tokens["branch"], tree.is_branch.numpy())
    for name, table in data.methods.items():
        objective = tc.methods.load(name)
        prepared = objective.prepare(run.batch, progress=0.5)
        assert np.array_equal(table["advantage"], prepared.advantages.numpy()), name
        # Weights, ratios and flags must explain the gradient that the loss itself has.
        if name in data.with_ratio and prepared.window.surrogate == "clip":
            free = table["trains"] & (table["clipped"] == 0)
            explained = np.where(free, -table["weight"] * table["advantage"] * table["ratio"], 0)
            assert table["gradient"] == pytest.approx(np.nan_to_num(explained), rel=1e-4, abs=1e-6), name
    assert data.notes == []


PAIR = [
    {
        "group": 0,
        "tokens": [5, 8, 2],
        "reward": 0.0,
        "ref_log_probs": [-1.0, -1.0, -1.0],
        "old_log_probs": [-1.0, -1.0, -1.0],
        "log_probs": [-0.5, -1.0, -2.0],
        "response_mask": [True, True, True],
    },
    {
        "group": 0,
        "tokens": [5, 9],
        "reward": 1.0,
        "ref_log_probs": [-1.0, -1.0],
        "old_log_probs": [-1.0, -1.0],
        "log_probs": [-0.8, -0.7],
        "response_mask": [False, True],
    },
]


def test_preference_and_supervised_objectives(tmp_path):
    run = report.read(lines(tmp_path / "x.jsonl", PAIR))
    data = report.compute(run, ["dpo", "sft", "grpo"])
    assert data.with_ratio == {"grpo"}
    dpo, sft = data.methods["dpo"], data.methods["sft"]
    for table in (dpo, sft):
        assert table["trains"].tolist() == [True, True, True, False, True]
        assert np.isnan(table["ratio"]).all() and np.isnan(table["low"]).all() and not table["clipped"].any()
    # One pair: the rejected row has the score -0.5, the chosen row 0.3; loss = -log sigmoid(0.1 * 0.8).
    assert dpo["advantage"].tolist() == [-1, -1, -1, 0, 1] and dpo["median"].tolist() == [-1, 1]
    slope = 0.1 / (1 + math.exp(0.1 * 0.8))
    assert dpo["gradient"] == pytest.approx(np.array([slope, slope, slope, 0, -slope]) * 4)
    assert dpo["weight"] == pytest.approx([4, 4, 4, 0, 4])
    assert sft["advantage"].tolist() == [1, 1, 1, 0, 1]
    assert sft["weight"] == pytest.approx([1, 1, 1, 0, 1])
    assert sft["gradient"] == pytest.approx([-1, -1, -1, 0, -1])
    figures = summarize(data)["methods"]
    assert figures["dpo"]["clipped"] is figures["sft"]["ratios"] is figures["dpo"]["effective"] is None
    assert figures["dpo"]["signs"]["tokens"] == pytest.approx([1 / 4, 3 / 4])
    assert '"with_ratio": ["grpo"]' in render(data)
    with pytest.raises(ValueError, match="group_ids: expected pairs"):
        report.compute(report.read(lines(tmp_path / "y.jsonl", PAIR[:1])), ["dpo"])


def test_every_registered_input_is_read(tmp_path):
    rows = [{**row, "turn_rewards": [0.0] * len(row["tokens"]), "truncated": row["reward"] == 0} for row in PAIR]
    batch = report.read(lines(tmp_path / "x.jsonl", rows)).batch
    assert batch.input("ref_log_probs").tolist() == [-1.0] * 5 and batch.input("turn_rewards").tolist() == [0.0] * 5
    assert batch.input("truncated").tolist() == [True, False]


def test_masked_empty_and_alone(tmp_path):
    rows = [
        {
            "group": 0,
            "tokens": [1, 2, 9, 3],
            "reward": 1,
            "old_log_probs": [-1, -1, None, -1],
            "log_probs": [-1, -1, None, -0.9],
            "response_mask": [1, 1, 0, 1],
        },
        {"group": 1, "tokens": [4], "reward": 2, "old_log_probs": [-1], "log_probs": [-1], "response_mask": [1]},
        {"group": 0, "tokens": [], "reward": 0, "old_log_probs": [], "log_probs": [], "response_mask": []},
        {
            "group": 2,
            "tokens": [5, 6],
            "reward": 1,
            "old_log_probs": [-1, -1],
            "log_probs": [-1, -1],
            "response_mask": [0, 0],
        },
    ]
    data = report.compute(report.read(lines(tmp_path / "x.jsonl", rows)), ["tempo", "ctpo"])
    for table in data.methods.values():
        assert table["trains"].tolist() == [True, True, False, True, True, False, False]
        assert np.isfinite(table["advantage"]).all() and np.isfinite(table["gradient"]).all()
        assert table["weight"][[2, 5, 6]].tolist() == [0, 0, 0] and np.isnan(table["ratio"][2])
    assert np.log(data.methods["ctpo"]["ratio"][3]) == pytest.approx(0.1, abs=1e-6)
    figures = summarize(data)
    assert figures["equal_rewards"] == 3 and figures["tokens"] == 7
    assert render(data)


def test_without_the_updated_policy(four):
    data = report.compute(replace(four, log_probs=None), ["grpo"])
    assert np.isnan(data.methods["grpo"]["ratio"]).all() and not data.methods["grpo"]["clipped"].any()
    assert ["no log-probs of the updated policy" in note for note in data.notes] == [True]
    assert summarize(data)["methods"]["grpo"]["ratios"] is None


def test_a_missing_input_is_named(four):
    strict = replace(tc.methods.grpo(), terms=(tc.term.kl(estimator="k3"),))
    with pytest.raises(ValueError, match=r"ref_log_probs: expected in .*x.jsonl because strict reads it, got none"):
        report.compute(four, {"strict": strict})
    with pytest.raises(ValueError, match="name: expected one of"):
        report.compute(four, ["grpoo"])
    with pytest.raises(ValueError, match="objectives: expected at least one method"):
        report.compute(four, [])


def test_other_advantages_than_the_trainers_are_told(folder):
    run = report.read(folder)
    other = run.advantages.clone()
    other[3] += 0.5
    notes = report.compute(replace(run, advantages=other), ["tempo"]).notes
    assert notes == [
        f"The advantages that the trainer wrote differ from those of tempo at 1 of {other.numel()} tokens."
    ]


def test_summary_by_hand(four):
    figures = summarize(report.compute(four, ["tempo", "grpo"]))
    tempo, grpo = figures["methods"]["tempo"], figures["methods"]["grpo"]
    assert (figures["groups"], figures["equal_rewards"], figures["rollouts"], figures["tokens"]) == (2, 1, 5, 12)
    assert figures["branch_fraction"] == pytest.approx(7 / 12) and figures["distinct"] == 8
    assert grpo["token_level"] == 0 and grpo["token_level_advantage"] == 0
    # The advantages of rollout 0 are 1.15, 1.44, 0.87: the median is the first, so its other two tokens differ.
    assert tempo["token_level"] == pytest.approx((2 + 2 + 0 + 2 + 2) / 12)
    q = np.exp([0.5, 0, -0.4, 0.5, 0, -0.4, 0, -0.5, 0.1, 0, 0, 0])
    assert grpo["effective"] == pytest.approx(q.sum() ** 2 / (12 * (q**2).sum()))
    assert figures["lengths"]["mean_above"] == 3 and figures["lengths"]["mean_below"] == 2.5
    assert sum(figures["lengths"]["above"]) == 2 and sum(figures["lengths"]["below"]) == 2
    assert grpo["signs"]["rollouts"] == pytest.approx([3 / 5, 2 / 5])
    assert grpo["signs"]["tokens"] == pytest.approx([7 / 12, 5 / 12])


# -- entry points --------------------------------------------------------------------------------------------------


def render(data, **settings):
    pytest.importorskip("jinja2")
    from tokcredit.report.page import render

    return render(data, **settings)


def test_report_of_a_run_folder(folder):
    pytest.importorskip("jinja2")
    path = report.report(folder, "tempo")
    assert path == folder / "report.html" and '"methods": {"tempo"' in path.read_text()
    report.report(folder, tc.methods.tempo(clip_high=0.5))
    assert "high=0.5" in path.read_text()


def test_methods_whose_inputs_are_not_in_the_file(folder):
    pytest.importorskip("jinja2")
    text = report.report(folder, "vineppo").read_text()
    (lacking,) = tc.methods.load("vineppo").required_inputs
    assert f"vineppo reads {lacking}, which the file does not have" in text and "credit=recorded()" in text
    run = report.read(folder)
    objective, notes = as_recorded("vineppo", tc.methods.load("vineppo"), run)
    table = report.compute(run, {"vineppo": objective}).methods["vineppo"]
    assert np.array_equal(table["advantage"], run.advantages.numpy()) and len(notes) == 1
    with pytest.raises(ValueError, match=rf"{lacking}: expected in .* because vineppo reads it"):
        report.run(folder, ["vineppo"])


def test_other_stages_whose_inputs_are_not_in_the_file(folder):
    run = report.read(folder)
    bare = replace(run, batch=run.batch.with_inputs(entropies=None))
    objective, (note,) = as_recorded("tip", tc.methods.tip(), bare)
    assert note.endswith("that the trainer wrote, and without its own filters.")
    assert np.array_equal(
        report.compute(bare, {"tip": objective}).methods["tip"]["advantage"], run.advantages.abs().numpy()
    )
    objective, (note,) = as_recorded("dpo", tc.methods.dpo(), run)
    assert objective.reference is None and "dpo reads ref_log_probs, which the file does not have" in note
    assert as_recorded("grpo", tc.methods.grpo(), run) == (tc.methods.grpo(), [])


def test_settings_that_change_during_training(folder, tmp_path):
    run = report.read(folder)
    assert run.progress is None
    assert "d3s is shown with its settings of the last step" in report.compute(run, ["d3s"]).notes[0]
    derivations.write(tmp_path, step=3, groups=2, rollouts=4, length=40)
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 9}))
    run = report.read(tmp_path)
    assert run.progress == 0.25
    data = report.compute(run, ["d3s"])
    expected = tc.methods.load("d3s").prepare(run.batch, progress=0.25).mask
    assert data.notes == [] and np.array_equal(data.methods["d3s"]["trains"], expected.numpy())


def test_command(folder, tmp_path, capsys):
    pytest.importorskip("jinja2")
    pytest.importorskip("rich")
    from tokcredit.cli import main

    main(["inspect", str(folder), "--method", "ctpo", "-o", str(tmp_path / "r.html")])
    assert capsys.readouterr().out == f"report  {tmp_path / 'r.html'}\n"
    main(["inspect", str(folder), "--prompt", "2"])
    out = capsys.readouterr().out
    assert "prompt 2 of 3" in out and "tempo" in out and "grpo" in out and "underlined: branch" in out
    with pytest.raises(SystemExit, match="--prompt: expected a number from 1 to 3, got 4"):
        main(["inspect", str(folder), "--prompt", "4"])


def test_terminal_shows_text_as_text(tmp_path, folder):
    rich = pytest.importorskip("rich.console")
    from tokcredit.report.terminal import show

    words = report.read(folder).vocabulary.tokenizer
    said = "[bold]a[/bold] \x1b[31m \u202e"
    rows = [
        {"group": 0, "prompt": said, "tokens": words.encode(said + end), "reward": r} for end, r in (("1", 1), ("2", 0))
    ]
    path = lines(tmp_path / "x.jsonl", rows)
    data = report.compute(report.read(path, tokenizer=str(folder / "tokenizer")), ["tempo"])
    console = rich.Console(width=200, record=True, color_system="truecolor", file=io.StringIO())
    show(data, console=console)
    styled = console.export_text(styles=True, clear=False)
    out = console.export_text()
    assert "[bold]a[/bold] \\u{1b}[31m \\u{202e}" in out
    assert "\x1b[31m" not in styled and "\u202e" not in styled
    assert "48;2;" in styled  # a coloured ground
