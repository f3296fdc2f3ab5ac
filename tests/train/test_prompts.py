import json

import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from tokcredit.cli import main
from tokcredit.train import ChatSettings, models, tiny
from tokcredit.train.problems import Message, Problem, Problems
from tokcredit.train.prompts import Prompts
from tokcredit.train.ranks import Ranks
from tokcredit.train.rollout_collection import SamplingContext
from transformers import AutoTokenizer

TEMPLATE = """\
{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}\
[no thoughts]{% endif %}{% if level is defined %}[{{ level }}]{% endif %}{% endif %}"""


def tokenizer(template=TEMPLATE):
    words = tiny.tokenizer()
    words.chat_template = template
    return words


def text(words, *arguments):
    return words.decode(Prompts(words, *arguments[:-1])(arguments[-1]))


def problem(*messages):
    return Problem("test", "the question", "7", float, None, tuple(Message(*m) for m in messages))


CHAT = problem(("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), ("user", "Sure?"))


def test_a_question_is_a_message_of_the_user():
    for question in ("3+4=", Problem("test", "3+4=", "7", float)):
        assert text(tokenizer(), question) == "<user>3+4=\n<assistant>"
        assert text(tokenizer(None), question) == "3+4="


def test_a_chat_is_asked_with_its_own_messages():
    said = "<system>Be brief.\n<user>1+1?\n<assistant>2\n<user>Sure?\n<assistant>"
    assert text(tokenizer(), CHAT) == said
    again = CHAT.again("Yes.", "Try once more.")
    assert text(tokenizer(), again) == f"{said}Yes.\n<user>Try once more.\n<assistant>"
    assert text(tokenizer(), Problem("test", "a", "7", float).again("b", "c")) == "<user>a\n\nb\n\nc\n<assistant>"


def test_a_chat_needs_a_template():
    with pytest.raises(ValueError, match="tasks: expected a model with a chat template for 'the question', got none"):
        Prompts(tokenizer(None))(CHAT)


def test_chats_that_cannot_be_asked_are_refused_before_the_first_step(settings):
    """Also if only a training problem that is asked late is one."""
    plain = Problem("test", "x", "7", float)
    problems = Problems([[plain, plain], [plain, CHAT]], [plain])
    own = settings(chat=ChatSettings(system_prompt="Think."))
    for chosen, template, message in (
        (settings(), None, "tasks: expected"),
        (own, TEMPLATE, "system_prompt: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingContext(chosen, problems, tokenizer(template), None, Ranks(Accelerator()))


def test_the_system_prompt():
    chat = ChatSettings(system_prompt="Think.")
    assert text(tokenizer(), chat, "3+4=") == "<system>Think.\n<user>3+4=\n<assistant>"
    assert text(tokenizer(), chat, problem(("user", "x"))) == "<system>Think.\n<user>x\n<assistant>"
    with pytest.raises(ValueError, match=r"system_prompt: expected none because a prompt has its own, 'Be brief"):
        Prompts(tokenizer(), chat)(CHAT)
    with pytest.raises(ValueError, match="system_prompt, chat_template_args: expected a model with a chat template"):
        Prompts(tokenizer(None), chat)


def test_arguments_of_the_template():
    chat = ChatSettings(chat_template_args=("enable_thinking=false", "level=high"))
    assert text(tokenizer(), chat, "x") == "<user>x\n<assistant>[no thoughts][high]"
    assert text(tokenizer(), ChatSettings(chat_template_args=("enable_thinking=true",)), "x") == "<user>x\n<assistant>"
    with pytest.raises(ValueError, match="chat_template_args: expected names that the template reads, got thinking"):
        Prompts(tokenizer(), ChatSettings(chat_template_args=("thinking=false",)))
    with pytest.raises(ValueError, match="expected a model with a chat template"):
        Prompts(tokenizer(None), ChatSettings(chat_template_args=("level=1",)))


@pytest.mark.parametrize("wrong", ["enable_thinking", "=1", "a b=1", "messages=1", "tokenize=true", "chat_template=x"])
def test_arguments_are_checked_before_anything_is_loaded(wrong):
    with pytest.raises(ValueError, match="chat_template_args: expected "):
        ChatSettings(chat_template_args=(wrong,))
    with pytest.raises(ValueError, match=r"chat_template_args: expected different names .*, got level, level"):
        ChatSettings(chat_template_args=("level=1", "level=2"))


COMPARING = TEMPLATE + "{% if level == 'high' or level == \"low\" %}{% endif %}"


@pytest.mark.parametrize(
    ("given", "read"),
    [("true", True), ("False", False), ("None", None), ("null", None), ("3", 3), ("high", "high"), ('"no"', "no")],
)
def test_values_of_arguments(given, read):
    assert ChatSettings(chat_template_args=(f"level={given}",)).arguments() == {"level": read}


@pytest.mark.parametrize("given", ["flase", "ture", "Flase", "no", "off", "Yes"])
def test_misspelled_values_of_arguments_are_named(given):
    message = f"chat_template_args: level: expected true or false, or a text in quotes, got {given}$"
    with pytest.raises(ValueError, match=message):
        ChatSettings(chat_template_args=(f"level={given}",))


def test_values_that_the_template_compares():
    with pytest.raises(ValueError, match=r"level: expected .*, such as high, low, got 'hihg'; did you mean high\?"):
        Prompts(tokenizer(COMPARING), ChatSettings(chat_template_args=("level=hihg",)))
    for value in ("high", "low", "medium", "3"):
        Prompts(tokenizer(COMPARING), ChatSettings(chat_template_args=(f"level={value}",)))


def test_a_template_that_refuses_the_messages_is_named():
    words = tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}")
    with pytest.raises(ValueError, match=r"tasks: expected messages .*, got \['system', 'user'\]: No system here"):
        Prompts(words, ChatSettings(system_prompt="x"))("y")


def test_on_the_command_line(settings, tmp_path, uniform):
    """The settings reach the prompts of a run, which its rollouts show."""
    folder = tmp_path / "chat model"
    model, _ = models.load("tiny(steps=0)")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    file = tmp_path / "chats.jsonl"
    lines = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": 7} for i in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["train", "--model", str(folder), "--tasks", f"jsonl({str(file)!r})", "--output", str(tmp_path / "run")]
    arguments += ["--system-prompt", "Be brief.", "--chat-template-args", "enable_thinking=false", "--steps", "1"]
    arguments += ["--prompts", "2", "--group", "2", "--max-tokens", "4", "--eval-problems", "1", "--method", "grpo"]
    main([*arguments, "--precision", "no", "--on-reward-error", "zero"])
    words = AutoTokenizer.from_pretrained(folder)
    rows = pq.read_table(tmp_path / "run/rollouts-000001.parquet").to_pylist()
    assert len(rows) == 4
    for row in rows:
        said = words.decode(row["prompt_tokens"])
        assert said == f"<system>Be brief.\n<user>{row['prompt']}\n<assistant>[no thoughts]"


def test_what_the_user_says_between_two_responses():
    words = tiny.tokenizer()
    plain = Prompts(words)
    line, word, end = words("\n").input_ids[0], words("a").input_ids[0], words.eos_token_id
    assert words.decode(plain.between("seen", line)) == "seen\n"
    assert words.decode(plain.between("seen", word)) == words.decode(plain.between("seen", end)) == "\nseen\n"
    words.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = Prompts(words, ChatSettings(system_prompt="be brief"))
    following = words("[user]seen<end>[assistant]").input_ids
    assert chat.between("seen", end) == following
    assert chat.between("seen", word) == [end, *following], "a response that was cut is ended"
    asked = chat(Problem("t", "q", "", float))
    whole = (Message("user", "q"), Message("assistant", "a"), Message("user", "seen"))
    assert [*asked, word, end, *chat.between("seen", end)] == chat.templated(whole)
