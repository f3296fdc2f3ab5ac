import pytest
from tokcredit.rewards import answers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("The answer is 12.", "12"), ("3 + 4 = 7", "7"), ("9-4", "4"), ("(2)-3", "3"), ("x=7", "7")),
        *(("It is -4", "-4"), ("It is \u22124", "-4"), ("It is \uff0d4", "-4"), ("1\u22124", "4")),
        *(("1,234.50", "1234.50"), ("12,345,678", "12345678"), ("1+2+0=3>132", "132"), ("12, and so on", "12")),
        *(("none", None), ("", None), ("\u2212", None)),
        # These are no decimal numbers. Their last digits are not the answer, and neither are all digits together.
        *(("13,4", None), ("1,23", None), ("1,2,3", None), ("1234,567", None), ("3/4", None), ("1e5", None)),
    ],
)
def test_last_number(text, number):
    assert answers.last_number(text) == number
    assert answers.last_number(answers.judged(f"<answer>{text}</answer>")) == number


def test_what_is_a_number():
    for text in ("0", "-1", "\u22121", "1.5", "1,000", "-1,000.25", " 7 "):
        assert answers.is_number(text)
    for text in ("", "13,4", "1,0000", ".", "1.", "x", "1/2", "1e5", "--1", "1 2"):
        assert not answers.is_number(text)


@pytest.mark.parametrize(
    ("response", "content"),
    [
        *(("<answer> 5 </answer> and 6", "5"), ("<answer>5</answer><answer>6</answer>", "6"), ("5", None)),
        *(("<answer>5<answer>6</answer>", "6"), ("<answer>5</answer> 6</answer>", "5"), ("<answer>5", None)),
        *(("5</answer>", None), ("<answer></answer>", ""), ("<answer>\n1\n2</answer>", "1\n2")),
    ],
)
def test_tagged(response, content):
    assert answers.tagged(response) == content
    assert answers.judged(response) == (response if content is None else content)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        *(("A and C", "AC"), ("I think A cat: C.", "C"), ("A, B & D!", "ABD"), ("**B**", "B"), ("(A), (C)", "AC")),
        *(("CA", ""), ("none", ""), ("", ""), ("A B C is wrong", ""), ("A;C\n", "AC"), ("not B", "B")),
    ],
)
def test_last_options(text, options):
    assert answers.last_options(text) == set(options)
