"""``tokcredit analyze attribute`` and ``tokcredit compress``: what is found, written and refused."""

import json

import pytest
import tokcredit as tc
import torch
from bigrams import END, TOKENIZER, scripted
from tokcredit.analyze import Attribute, CompressSettings, ReagentSettings, ScoreSettings, compress, run
from tokcredit.cli import main
from tokcredit.train import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "small", "cat", "##s", "sat", "down", ".", "why", "?")


@pytest.fixture
def last(save):
    """A model whose next token depends on the last one alone: "7" is followed by "8", "8" by the end."""
    return save(scripted({"7": ("8", "1"), "8": (END, "1")}, ("7", "1")))[0]


@pytest.fixture
def encoder(tmp_path):
    words = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk")}
    config = BertConfig(
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=12,
        num_hidden_layers=2,
        vocab_size=len(WORDS),
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "encoder")
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder"), model.eval()


def test_only_the_last_token_matters(last, tmp_path, capsys):
    output = tmp_path / "scores.jsonl"
    main(["analyze", "attribute", "--model", last, "--prompt", "1+7", "--max-tokens", "3", "-o", str(output)])
    (found,) = map(json.loads, output.read_text().splitlines())
    assert found["prompt_texts"] == ["1", "+", "7"] and found["response_texts"] == ["8", END]
    first, second = found["scores"]
    assert first[:2] == [0, 0] and first[2] != 0
    assert second == [0, 0, 0]  # the end follows from the 8 alone
    assert found["importance"] == pytest.approx([0, 0, abs(first[2]) / 2])
    assert found["prompt_tokens"] == TOKENIZER("1+7").input_ids and found["class"] is None
    printed = capsys.readouterr().out
    assert "1+7" in printed and printed.index("'7'") < printed.index("'1'") and "100.0%" in printed


def test_the_scores_are_those_of_the_functions():
    model = tiny.model(TOKENIZER, 0).eval()
    prompt, response = (TOKENIZER(text).input_ids for text in ("12+3=", "15"))
    reagent = ReagentSettings(ratio=0.4, keep=0.5, tolerance=2, max_steps=3, runs=2)
    for method in ("gradient", "reagent"):
        score = ScoreSettings(method, reagent=reagent, seed=3)
        found = run(Attribute("tiny(steps=0)", score, prompt="12+3=", response="15"))
        generator, rows = torch.Generator().manual_seed(3), []
        tokens = [i for i in range(len(TOKENIZER)) if i not in TOKENIZER.all_special_ids]
        for place, target in enumerate(response):
            ids = torch.tensor(prompt + response[:place])
            if method == "gradient":
                rows.append(tc.attribution.gradient_times_input(model, ids, target, log_prob=True))
            else:
                sample = tc.attribution.uniform(tokens)
                rows.append(
                    tc.attribution.reagent(model, ids, target, sample, 0.4, 0.5, 2, 3, 2, generator=generator).mean
                )
        rows = torch.stack([row[: len(prompt)] for row in rows])
        torch.testing.assert_close(torch.tensor(found["scores"]), rows.float())
        torch.testing.assert_close(torch.tensor(found["importance"]), rows.float().abs().mean(0))
        assert found["response_tokens"] == response


def test_encoders(encoder):
    folder, model = encoder
    ids = torch.tensor([[1, 4, 6, 7, 8, 2]])
    found = run(Attribute(folder, ScoreSettings("globenc"), prompt="the cats sat"))
    assert found["prompt_tokens"] == ids[0].tolist() and found["response_tokens"] == []
    torch.testing.assert_close(torch.tensor(found["scores"]), tc.attribution.globenc(model, ids))
    found = run(Attribute(folder, ScoreSettings("decompx"), prompt="the cats sat"))
    logits = model(input_ids=ids).logits[0]
    assert found["class"] == logits.argmax()
    assert sum(found["scores"][0]) == pytest.approx(logits.max().item(), abs=1e-5)
    other = run(Attribute(folder, ScoreSettings("decompx", output_class=0), prompt="the cats sat"))
    torch.testing.assert_close(torch.tensor(other["scores"][0]), tc.attribution.decompx(model, ids)[0, :, 0])


def prompts(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_compress_keeps_what_matters_in_order(last, tmp_path, capsys):
    """Words of one letter: all but the last have the score 0, so the first of them stay."""
    path, output = prompts(tmp_path / "p.jsonl", {"prompt": " 3 + 2\n+ 1 7"}, {"prompt": " "}), tmp_path / "c.jsonl"
    main(["compress", str(path), "--model", last, "--max-tokens", "1", "--share", "0.5", "-o", str(output)])
    first, empty = map(json.loads, output.read_text().splitlines())
    assert first == {"prompt": "3 + 7", "original": " 3 + 2\n+ 1 7", "words": [0, 1, 5]}
    assert empty == {"prompt": "", "original": " ", "words": []}
    assert "words kept  3" in capsys.readouterr().out
    main(["compress", str(path), "--model", last, "--share", "0.1", "--protect", "1", "2", "-o", str(output)])
    assert json.loads(output.read_text().splitlines()[0])["prompt"] == "2 1"


def test_compress_counts_words_and_not_tokens(encoder, tmp_path):
    folder, model = encoder
    text = "the small cats sat down . why ?"
    path = prompts(tmp_path / "p.jsonl", {"prompt": text, "response": "x"} | {"note": 1})
    ids = torch.tensor([[1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 2]])
    score = tc.attribution.globenc(model, ids)[0].tolist()
    of_word = [score[1], score[2], score[3] + score[4], *score[5:10]]
    for share, by_sentence in ((0.5, False), (0.3, True), (1.0, False)):
        settings = CompressSettings(
            path, folder, ScoreSettings("globenc"), tmp_path / "c.jsonl", share, by_sentence=by_sentence
        )
        counts = compress(settings)
        u = of_word
        if by_sentence:
            u = [x for part in (u[:6], u[6:]) for x in [(y - min(part)) / (max(part) - min(part)) for y in part]]
        count = round(8 * share)
        best = sorted(sorted(range(8), key=lambda w: (-u[w], w))[:count])
        found = json.loads((tmp_path / "c.jsonl").read_text())
        assert found["words"] == best and found["prompt"] == " ".join(text.split()[w] for w in best)
        assert found["response"] == "x" and counts == {"prompts": 1, "words": 8, "words_kept": count}


def test_refusals(encoder, last, tmp_path, capsys):
    folder, _ = encoder
    empty, wrong = tmp_path / "empty.jsonl", prompts(tmp_path / "wrong.jsonl", {"prompt": 3})
    empty.write_text("\n")
    attribute = ["analyze", "attribute", "--model"]
    for command, message in (
        ([*attribute, last], "--prompt, --prompts: expected one of them"),
        ([*attribute, last, "--prompt", ""], "--prompt: expected at least one token, got none"),
        ([*attribute, last, "--prompt", "1", "--response", ""], "--response: expected at least one token"),
        ([*attribute, last, "--prompt", "1", "--output-class", "1"], "--output-class: expected none with method"),
        ([*attribute, last, "--prompt", "1", "--method", "globenc"], "--model: expected an encoder of the family"),
        ([*attribute, last, "--prompts", str(empty)], "--prompts: expected at least one line"),
        ([*attribute, last, "--prompts", str(wrong)], f'--prompts: {wrong}:1: expected a text as "prompt"'),
        ([*attribute, last, "--prompts", str(tmp_path / "none")], "--prompts: expected a JSONL file"),
        (
            [*attribute, folder, "--method", "globenc", "--prompt", "cat", "--response", "x"],
            "--response: expected none",
        ),
        (
            [*attribute, folder, "--method", "decompx", "--prompt", "cat", "--output-class", "2"],
            "--output-class: expected a number below 2, got 2",
        ),
        ([*attribute, str(tmp_path / "none"), "--method", "decompx", "--prompt", "cat"], "--model: expected a folder"),
        (["compress", str(wrong), "--model", last], f'path: {wrong}:1: expected a text as "prompt"'),
    ):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert f"tokcredit: {message}" in f"{caught.value}{capsys.readouterr().err}", command
