"""Pairs and completions in files: forms, tokens and errors."""

import json

import pytest
from tokcredit.train import examples
from tokcredit.train.examples import PAIRS
from tokcredit.train.settings import ChatSettings
from tokcredit.train.tiny import tokenizer

WORDS = tokenizer()
CHAT = tokenizer()
CHAT.chat_template = (
    "{% for m in messages %}({{ m.role[0] }}){{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}(a){% endif %}"
)
ASKED = {"role": "user", "content": "2+2="}


def said(text):
    return {"role": "assistant", "content": text}


def load(tmp_path, *rows, names=PAIRS, words=WORDS, chat=None, max_tokens=0):
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return examples.load(path, names, words, chat or ChatSettings(), max_tokens)


def texts(example, words=WORDS):
    return [words.decode(example.prompt), *(words.decode(x.tokens) for x in example.responses)]


FORMS = {
    "texts": ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, ["2+2=", "4<end>", "5<end>"]),
    "ended texts": ({"prompt": "2+2=", "chosen": "4<end>", "rejected": "5"}, ["2+2=", "4<end>", "5<end>"]),
    "implicit prompt": ({"chosen": "2+2=4", "rejected": "2+2=5"}, ["2+2=", "4<end>", "5<end>"]),
    "space": ({"chosen": "so it is 4", "rejected": "so it is 5"}, ["so it is", " 4<end>", " 5<end>"]),
    "empty response": ({"prompt": "2+2=", "chosen": "4", "rejected": ""}, ["2+2=", "4<end>", "<end>"]),
    "null prompt": ({"prompt": None, "chosen": "2+2=4", "rejected": "2+2=5"}, ["2+2=", "4<end>", "5<end>"]),
}
CHATS = {
    "chat": {"prompt": [ASKED], "chosen": [said("4")], "rejected": [said("5")]},
    "implicit": {"chosen": [ASKED, said("4")], "rejected": [ASKED, said("5")]},
    "repeated as a text": {"prompt": "2+2=", "chosen": [ASKED, said("4")], "rejected": [ASKED, said("5")]},
    "nulls": {"prompt": [{**ASKED, "name": None}], "chosen": [said("4")], "rejected": [said("5")]},
}


@pytest.mark.parametrize("form", FORMS)
def test_texts(form, tmp_path):
    row, expected = FORMS[form]
    (example,), notes = load(tmp_path, row)
    assert texts(example) == expected and not notes
    assert example.question == expected[0] and all(all(x.mask) for x in example.responses)


@pytest.mark.parametrize("form", CHATS)
def test_chats(form, tmp_path):
    (example,), notes = load(tmp_path, CHATS[form], words=CHAT)
    assert texts(example, CHAT) == ["(u)2+2=<end>(a)", "4<end>", "5<end>"] and not notes
    assert example.question == "2+2=" and [x.text for x in example.responses] == ["4", "5"]


def test_a_system_prompt_is_for_chats(tmp_path):
    brief = ChatSettings("Be brief.")
    (example,), _ = load(tmp_path, CHATS["chat"], words=CHAT, chat=brief)
    assert texts(example, CHAT)[0] == "(s)Be brief.<end>(u)2+2=<end>(a)"
    with pytest.raises(ValueError, match=r"system_prompt, .*: .*:1: expected messages of chats, got a text"):
        load(tmp_path, FORMS["texts"][0], words=CHAT, chat=brief)
    with pytest.raises(ValueError, match="pairs: expected a model with a chat template for '2\\+2=', got none"):
        load(tmp_path, CHATS["chat"])


def test_completions(tmp_path):
    (example,), _ = load(tmp_path, {"prompt": "2+2=", "completion": "4"}, names=("completion",))
    assert texts(example) == ["2+2=", "4<end>"]
    (example,), _ = load(tmp_path, {"prompt": [ASKED], "completion": [said("4")]}, names=("completion",), words=CHAT)
    assert texts(example, CHAT) == ["(u)2+2=<end>(a)", "4<end>"]


def ids(**changes):
    return {
        **{"prompt": "2", "chosen": "34", "rejected": "5", "prompt_ids": [3, 4], "chosen_ids": [6, 7, 1]},
        **{"rejected_ids": [8], "rejected_mask": [True], **changes},
    }


def test_token_ids_of_the_file_are_taken(tmp_path):
    (example,), _ = load(tmp_path, ids(chosen_mask=[True, False, True]))
    assert example.prompt == [3, 4] and [x.tokens for x in example.responses] == [[6, 7, 1], [8]]
    assert [x.mask for x in example.responses] == [[True, False, True], [True]]
    (example,), _ = load(tmp_path, ids(prompt_ids=None, rejected_mask=None))
    assert texts(example) == ["2", "34<end>", "5<end>"]


def test_what_is_left_out_is_said(tmp_path):
    same, long = {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "bcd", "rejected": "b"}
    kept, notes = load(tmp_path, same, long, FORMS["texts"][0], max_tokens=3)
    assert len(kept) == 1
    assert notes == [
        "pairs left out because their responses are the same: 1",
        "pairs left out because a response has more than 3 tokens: 1",
    ]
    with pytest.raises(ValueError, match=r"pairs: expected at least one example in .*, got 1 that are left out"):
        load(tmp_path, same)


def test_prompts_whose_end_merges_are_counted(tmp_path):
    """The chat template of a whole chat may lack what it puts at the end of a prompt alone."""
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<end>{% endif %}"
    )
    (example,), notes = load(tmp_path, CHATS["chat"], words=words)
    assert texts(example, words) == ["2+2=", "4", "5"] and notes[0].startswith("pairs with a prompt whose last")


ERRORS = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, r"expected a JSON object \{'chosen', 'rejected'\}"),
    "a number": ({"prompt": "a", "chosen": 4, "rejected": "b"}, "expected chosen that is a text, or messages"),
    "null": ({"prompt": "a", "chosen": "b", "rejected": None}, "expected rejected that is a text, or messages"),
    "one of each": (
        {"prompt": "a", "chosen": "b", "rejected": [said("5")]},
        "expected texts or chats as chosen and rejected, got one of each",
    ),
    "prompt of a chat": ({"prompt": [ASKED], "chosen": "b", "rejected": "c"}, "expected a prompt of the same kind"),
    "tool": (
        {"prompt": [ASKED], "chosen": [{**said("4"), "tool_calls": []}], "rejected": [said("5")]},
        "expected chosen that is a text, or messages",
    ),
    "nothing shared": ({"chosen": "ab", "rejected": "cd"}, "expected a prompt of at least one token"),
    "no message": ({"chosen": [said("4")], "rejected": [said("5")]}, "expected a message in the prompt and in every"),
    "ids of other words": (
        ids(chosen_ids=[8, 1]),
        "expected chosen_ids that are the text of chosen .*, got ids of '5'",
    ),
    "ids that are none": (ids(chosen_ids=[10**6]), "expected chosen_ids that are token ids of the model"),
    "ids that are texts": (ids(prompt_ids=["a"]), "expected prompt_ids that are token ids of the model"),
    "no ids": (ids(rejected="", rejected_ids=[]), "expected at least one token in rejected_ids, got none"),
    "short mask": (ids(chosen_mask=[True]), "expected chosen_mask of 3 values true or false, one of them true"),
    "mask of nothing": (ids(rejected_mask=[False]), "expected rejected_mask of 1 values true or false, one of them"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_line_and_the_field(name, tmp_path):
    row, message = ERRORS[name]
    words = CHAT if name in ("tool", "no message", "prompt of a chat", "one of each") else WORDS
    with pytest.raises(ValueError, match=rf"^pairs: .*file\.jsonl:2: {message}"):
        load(tmp_path, FORMS["texts"][0], row, words=words)


def test_a_broken_line_is_named_with_its_column(tmp_path):
    with pytest.raises(
        ValueError, match=r"^pairs: expected JSON in .*file\.jsonl:2, got Expecting property .* at column 2"
    ):
        load(tmp_path, FORMS["texts"][0], "{")


def test_completions_need_a_prompt(tmp_path):
    with pytest.raises(ValueError, match=r"completions: .*:1: expected a JSON object \{'prompt', 'completion'\}"):
        load(tmp_path, {"completion": "a"}, names=("completion",))
    with pytest.raises(ValueError, match=r"completions: .*:1: expected a prompt that is a chat"):
        load(tmp_path, {"prompt": "a", "completion": [said("4")]}, names=("completion",), words=CHAT)
    with pytest.raises(ValueError, match="completions: expected a JSONL file in UTF-8, got"):
        examples.load(tmp_path / "nothing.jsonl", ("completion",), WORDS, ChatSettings())


def test_a_folder_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [FORMS["texts"][0], FORMS["empty response"][0]]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "data")
    kept, _ = examples.load(tmp_path / "data", PAIRS, WORDS, ChatSettings())
    assert list(map(texts, kept)) == [FORMS["texts"][1], FORMS["empty response"][1]]
    chats = datasets.Dataset.from_list([CHATS["nulls"], CHATS["chat"]])
    chats.save_to_disk(tmp_path / "chats")
    kept, _ = examples.load(tmp_path / "chats", PAIRS, CHAT, ChatSettings())
    assert [texts(x, CHAT)[0] for x in kept] == ["(u)2+2=<end>(a)"] * 2
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "splits")
    for folder, message in (
        ("splits", "pairs: expected the folder of a split, one of train, test in"),
        ("nothing", "pairs: expected a folder of save_to_disk, got"),
    ):
        (tmp_path / "nothing").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            examples.load(tmp_path / folder, PAIRS, WORDS, ChatSettings())
    with pytest.raises(
        ValueError, match=r"completions: .*: expected the columns prompt, completion, got .* without comp"
    ):
        examples.load(tmp_path / "data", ("completion",), WORDS, ChatSettings())
