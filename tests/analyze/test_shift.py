import dataclasses
import functools
import json
import math

import pyarrow.parquet as pq
import pytest
from bigrams import TOKENIZER
from tokcredit.analyze import Divergent, Shift, StudySettings, run
from tokcredit.analyze.crossing import Rule
from tokcredit.analyze.divergent import Labeller
from tokcredit.analyze.shift import rules, summarize
from tokcredit.analyze.study import load_pair, resolved
from tokcredit.cli import main
from tokcredit.train import models, tasks, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def digits(prompt, response, answer):
    return sum(c.isdigit() for c in response) / max(len(response), 1)


def settings(folder, resume=False, **changes):
    study = StudySettings(
        tasks=("addition(digits=1)",),
        reward="test_shift:digits",
        problems=3,
        max_tokens=6,
        output=folder,
        resume=resume,
    )
    defaults = {"rollouts": 2, "thresholds": (0.05, 0.0), "threshold": 0.05, "caps": (1,)}
    return Shift(base="tiny(steps=0)", tuned="tiny(steps=0, seed=1)", study=study, **(defaults | changes))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_findings(apart, save, tmp_path):
    """Both models write 7 or 8 first; then the base writes digits and the tuned model letters."""
    base, tuned = save(*apart[:2])
    s = dataclasses.replace(settings(tmp_path / "run"), base=base, tuned=tuned)
    summary = run(s)
    files = sorted(contents(s.study.output))
    assert files == [*(f"problem-00000{i}.parquet" for i in range(3)), "settings.json", "summary.json", "summary.png"]
    assert json.loads((s.study.output / "summary.json").read_text()) == summary
    found = [row for i in range(3) for row in pq.read_table(s.study.output / files[i]).to_pylist()]
    assert len(found) == 3 * 8 * 2
    asked = tasks.load(s.study.tasks, 0.2).measured(3)
    for row in found:
        assert row["prompt"] == asked[row["problem"]].question == TOKENIZER.decode(row["prompt_tokens"])
        assert row["completion"] == TOKENIZER.decode(row["tokens"], skip_special_tokens=True)
        assert row["reward"] == pytest.approx(digits(None, row["completion"], None))
        assert all(len(row[name]) == len(row["tokens"]) for name in ("js", "swapped", "changed", "ranks"))
    # The models agree on the first of six tokens, and have none in common at the others.
    assert summary["tokens"] == 36 and summary["responses"] == 6
    assert summary["share_above"] == {"0.0": pytest.approx(5 / 6), "0.05": pytest.approx(5 / 6)}
    assert summary["js_mean"] == pytest.approx(5 / 6 * math.log(2)) and summary["js_median"] == pytest.approx(
        math.log(2)
    )
    assert summary["shifted"] == {
        "threshold": 0.05,
        "tokens": 30,
        "share": pytest.approx(5 / 6),
        "likeliest_of_base": 0.0,
        "in_first_3_of_base": 1.0,
    }
    lines = {(line["primary"], line["threshold"], line["cap"]): line for line in summary["rules"]}
    accuracy = {
        ("base", None, None): 1,
        ("base", 0.0, None): 1 / 6,
        ("base", 0.05, None): 1 / 6,
        ("base", 0.05, 1): 5 / 6,
        ("tuned", None, None): 1 / 6,
        ("tuned", 0.0, None): 1,
        ("tuned", 0.05, None): 1,
        ("tuned", 0.05, 1): 2 / 6,
    }
    assert {rule: line["accuracy"] for rule, line in lines.items()} == pytest.approx(accuracy)
    assert [lines["base", 0.05, cap]["changed_per_response"] for cap in (None, 1)] == [5, 1]
    assert {line["length"] for line in summary["rules"]} == {6}


def test_a_summary_by_hand():
    s = settings(None, thresholds=(0.2,), threshold=0.2, caps=())
    assert rules(s) == [Rule(0), Rule(0, 0.2), Rule(1), Rule(1, 0.2)]

    def row(problem, primary, threshold, reward, js, changed=(), ranks=()):
        swapped = [x > threshold for x in js]
        return {
            **{"problem": problem, "primary": primary, "threshold": threshold, "cap": None, "reward": reward},
            **{"js": js, "swapped": swapped, "changed": changed or swapped, "ranks": ranks or [9] * len(js)},
        }

    found = [
        row(0, "tuned", math.inf, 1.0, [0.0, 0.3, 0.6], ranks=[0, 0, 2]),
        row(1, "tuned", math.inf, 0.0, [0.1, 0.5], ranks=[0, 3]),
        row(0, "tuned", 0.2, 0.0, [0.0, 0.3, 0.6], changed=[False, False, True]),
        row(1, "tuned", 0.2, 0.0, [0.1]),
        row(0, "base", math.inf, 0.0, [0.0]),
        row(1, "base", math.inf, 0.0, [0.0]),
        row(0, "base", 0.2, 1.0, [0.4]),
        row(1, "base", 0.2, 1.0, [0.4]),
    ]
    summary = summarize(found, s)
    assert summary["js_mean"] == pytest.approx(0.3) and summary["js_median"] == pytest.approx(0.3)
    assert summary["shifted"] == {
        "threshold": 0.2,
        "tokens": 3,
        "share": pytest.approx(0.6),
        "likeliest_of_base": pytest.approx(1 / 3),
        "in_first_3_of_base": pytest.approx(2 / 3),
    }
    base, forward, tuned, reverse = summary["rules"]
    assert [x["accuracy"] for x in (base, forward, tuned, reverse)] == [0.0, 1.0, 0.5, 0.0]
    assert tuned["error"] == pytest.approx(0.5) and tuned["threshold"] is None
    assert reverse["swapped_share"] == pytest.approx(2 / 4) and reverse["changed_share"] == pytest.approx(1 / 4)
    assert reverse["changed_per_response"] == pytest.approx(1 / 2) and reverse["length"] == 2.0
    alone = summarize([x for x in found if x["problem"] == 0 or x["reward"]], s)
    assert alone["rules"][0]["error"] is None, "one problem has no spread"


def test_an_interrupted_analysis_goes_on(tmp_path, monkeypatch):
    whole, cut = settings(tmp_path / "whole"), settings(tmp_path / "cut")
    run(whole)
    load, asked = tasks.load, []

    def failing(*arguments):
        problems = load(*arguments)

        def reward(problem, response):
            asked.append(problem.question)
            if len(asked) > 20:
                raise RuntimeError("interrupted")
            return problem.reward(response)

        held_out = [p._replace(reward=functools.partial(reward, p)) for p in problems.held_out]
        return problems._replace(held_out=held_out)

    monkeypatch.setattr(tasks, "load", failing)
    with pytest.raises(RuntimeError, match="interrupted"):
        run(cut)
    assert sorted(contents(cut.study.output)) == ["problem-000000.parquet", "settings.json"]
    asked.clear()
    monkeypatch.setattr(tasks, "load", load)
    with pytest.raises(ValueError, match="output: expected a folder without a run, or --resume"):
        run(cut)
    with pytest.raises(ValueError, match=r"top_p: expected 0\.7 as in the run in .*, got 0.5"):
        run(settings(tmp_path / "cut", resume=True, top_p=0.5))
    run(settings(tmp_path / "cut", resume=True))
    ours, theirs = contents(cut.study.output), contents(whole.study.output)
    del ours["settings.json"], theirs["settings.json"]
    assert ours == theirs


def test_found_problems_are_not_made_again(tmp_path, monkeypatch):
    summary = run(settings(tmp_path / "run"))
    monkeypatch.setattr("tokcredit.analyze.shift.cross", None)
    assert run(settings(tmp_path / "run", resume=True)) == summary


def test_on_the_command_line(tmp_path, capsys):
    arguments = "analyze shift --base tiny(steps=0) --tuned tiny(steps=0,seed=1) --temperature 0 --rollouts 1"
    main([*arguments.split(), "--problems", "1", "--max-tokens", "3", "--output", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "tokens of tiny(steps=0,seed=1)" in out and "accuracy" in out and "summary.png" in out.replace("\n", "")
    with pytest.raises(SystemExit) as error:
        main(["analyze", "shift", "--base", "tiny"])
    assert error.value.code == 2 and "--tuned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": 0}, "rollouts: expected a whole number at least 1, got 0"),
        ({"temperature": 0.0}, "rollouts: expected 1 because of temperature 0, where all are alike, got 2"),
        ({"temperature": -1.0}, "temperature: expected a number at least 0, got -1"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0"),
        ({"thresholds": (0.1, -0.1)}, r"thresholds: expected numbers at least 0, got \(0.1, -0.1\)"),
        ({"threshold": math.nan}, "threshold: expected a number at least 0, got nan"),
        ({"caps": (-1,)}, "caps: expected whole numbers at least 0"),
    ],
)
def test_errors(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_errors_of_the_study(tmp_path):
    def with_study(**changes):
        s = settings(tmp_path / "run")
        return Shift(s.base, s.tuned, StudySettings(output=tmp_path / "run", **changes))

    with pytest.raises(ValueError, match="problems: expected a whole number at least 1, got 0"):
        run(with_study(problems=0))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"tasks: expected at least two different problems of jsonl\(.*, got 0"):
        run(with_study(tasks=(f"jsonl('{tmp_path / 'empty.jsonl'}')",)))
    with pytest.raises(ValueError, match="tasks: expected at least one because neither a nor b has a recipe, got none"):
        run(Shift("a", "b"))


def test_models_must_share_their_tokens(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<another>"])
    for thing in (tiny.model(tokenizer), tokenizer):
        thing.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"tuned: expected the tokens of tiny\(steps=0\), got .*other"):
        run(Shift("tiny(steps=0)", str(tmp_path / "other"), StudySettings(output=tmp_path / "run")))


def test_padding_of_the_vocabulary_is_not_drawn(tmp_path):
    wide = tiny.model(TOKENIZER)
    wide.resize_token_embeddings(len(TOKENIZER) + 29, mean_resizing=False)
    wide.get_output_embeddings().weight.data[len(TOKENIZER) :] = wide.get_output_embeddings().weight.data[5:6] * 50
    for thing in (wide, TOKENIZER):
        thing.save_pretrained(tmp_path / "wide")
    s = settings(tmp_path / "run")
    run(Shift(s.base, str(tmp_path / "wide"), s.study, rollouts=2))
    rows = pq.read_table(tmp_path / "run" / "problem-000000.parquet").to_pylist()
    assert max(t for row in rows for t in row["tokens"]) < len(TOKENIZER)


def test_models_without_an_end_token(tmp_path):
    words, model = tiny.tokenizer(), tiny.model(TOKENIZER)
    words.eos_token = model.generation_config.eos_token_id = model.config.eos_token_id = None
    for thing in (model, words):
        thing.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"eos_token_id: expected a token .*, got none"):
        load_pair(*((name, str(tmp_path / "endless")) for name in ("base", "tuned")))


def test_ids_above_the_length_of_the_tokenizer(tmp_path):
    """A vocabulary with gaps, as reserved ids leave them: its last token can be drawn, and ends a sentence."""
    inner = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "<end>": 2, "b.": 40}, unk_token="<unk>"))
    words = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    for thing in (tiny.model(TOKENIZER), words):
        thing.save_pretrained(tmp_path / "model")
    pair = load_pair(*((name, str(tmp_path / "model")) for name in ("small", "large")))
    assert len(pair.tokenizer) == 4 and pair.vocabulary == 41 <= pair.first.config.vocab_size
    assert Labeller(Divergent("", "", verifier=""), pair, list)._stops == {40}


def test_the_recipe_of_either_model(tmp_path):
    found = resolved(StudySettings(), "shift", "some/model", "tiny(steps=0)")
    recipe = models.recipe("tiny")
    assert (found.tasks, found.max_tokens, found.precision) == (recipe.tasks, recipe.max_tokens, recipe.precision)
    assert str(found.output) == "runs/shift-model-tiny"
