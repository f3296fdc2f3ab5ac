import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokcredit as tc
from tokcredit import options
from tokcredit.cli import main
from tokcredit.train import Settings


def test_info(capsys):
    main(["info"])
    out = capsys.readouterr().out
    for word in (
        tc.__version__,
        "CPU kernels",
        "CUDA kernels",
        "compiler",
        "torch",
        "threads",
        "trl",
        "verl",
        "vllm",
        *tc.methods.names(),
    ):
        assert word in out


def test_methods_come_with_a_line_each():
    run = subprocess.run([sys.executable, "-m", "tokcredit", "methods"], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in run.stdout.splitlines()] == list(tc.methods.names())
    assert all(len(line.split()) > 4 for line in run.stdout.splitlines())


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as error:
        main(["infos"])
    assert error.value.code == 2
    assert "infos" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit, match=r"tokcredit: --tasks: expected jsonl, .*, got 'nothing'"):
        main(["train", "--model", "tiny(steps=0)", "--tasks", "nothing", "--output", str(tmp_path / "run")])


def test_commands_start_quickly():
    code = "import sys, tokcredit.cli; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "accelerate", "reasoning_gym", "matplotlib"} & set(out)


def test_stages_are_options_by_method_name_or_expression(monkeypatch):
    given = []
    monkeypatch.setattr("tokcredit.train.run", lambda settings: given.append(settings) or {})
    options = "--method dapo --set clip_high=0.3 --credit tempo --ratio ctpo --clip ppo(0.1,high=0.3) --aggregation ba"
    options += " --filters --token-weights importance(high=2.0) --terms kl(0.01) entropy --scales"
    main(["train", *options.split(), "divergence_weighted"])
    assert given[0].objective.build() == tc.mix(
        "dapo(clip_high=0.3)",
        credit="tempo",
        ratio="ctpo",
        clip=tc.clip.ppo(0.1, 0.3),
        aggregation="ba",
        filters=(),
        token_weights=tc.token_weights.importance(high=2.0),
        terms=(tc.term.kl(0.01), tc.term.entropy()),
        scales="divergence_weighted",
    )


def test_methods_of_a_report_add_up(monkeypatch):
    given = []
    monkeypatch.setattr("tokcredit.report.run", lambda *settings: given.append(settings))
    main(["inspect", "runs/a", "--method", "grpo", "--method", "tempo", "-o", "a.html", "--step", "3"])
    main(["inspect", "runs/a", "--step", "none"])
    path = Path("runs/a")
    assert given == [(path, ("grpo", "tempo"), Path("a.html"), None, 3, 1, None), (path, (), None, None, None, 1, None)]


def test_mistakes_in_stages_are_one_line(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit, match=r"tokcredit: --credit: expected a stage or a method, one of .*, got 'temp'"):
        main(["train", "--model", "tiny(steps=0)", "--credit", "temp", "--output", str(tmp_path / "run")])


def test_one_method_is_no_comparison():
    message = "--method: expected --methods and the names of all methods to compare, got --method grpo"
    with pytest.raises(SystemExit, match=message):
        main(["compare", "--method", "grpo"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--num_generations", "4"], "--num_generations of TRL is --group here"),
        (["train", "--learning-rate=1e-6"], "--learning-rate of TRL is --lr here"),
        (["compare", "--beta", "0.1"], "--beta of TRL is --terms 'kl(0.04)', or --set beta=0.1 for dpo, here"),
        (["train", "--max_completion_length", "9"], "--max_completion_length of TRL is --max-tokens here"),
        (["train", "--group_siz", "4"], "--group_siz: expected an option of the command; did you mean --group?"),
        (["analyze", "shift", "--base", "a", "--tuned", "b", "--temprature", "1"], "did you mean --temperature?"),
        (["inspect", "run", "--methd", "grpo"], "--methd: expected an option of the command; did you mean --method?"),
    ],
)
def test_options_that_do_not_exist_are_answered_with_those_that_do(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.split("\n") if x.startswith("tokcredit: ")]
    assert line.endswith(sentence)


def test_the_options_that_are_offered_exist():
    known = {x.replace("_", "-") for x in options._names(Settings)}
    offered = {x for text in options._OF_TRL.values() for x in re.findall(r"--([\w-]+)", text)}
    assert offered <= known and not options._OF_TRL.keys() & known
    for text in options._OF_TRL.values():
        for setting in re.findall(r"--set (\w+)=", text):
            methods = (tc.methods.grpo, tc.methods.tempo, tc.methods.dpo)
            assert any(setting in inspect.signature(method).parameters for method in methods)
    for stage in ("terms", "filters"):
        texts = [m[1] for t in options._OF_TRL.values() if (m := re.search(rf"--{stage} '(.+?)'", t))]
        assert texts and tc.mix("grpo", **{stage: texts})


def test_modules_of_the_user_are_found_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x])
    main(["methods"])
    assert sys.path[-1] == str(tmp_path)
