"""What a response says: the text inside of ``<answer>``, its last number, the options of a multiple-choice question.

All functions take time proportional to the length of the text.
"""

from __future__ import annotations

import re

_MINUS = str.maketrans("\u2212\ufe63\uff0d", "---")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# Digits that commas, a slash or an exponent connect are one token, which may be no number: 13,4 or 3/4.
_TOKEN = re.compile(r"(?:(?<![\w)])-)?\d+(?:,\d+)*(?:\.\d+)?(?:[eE][+-]?\d+|/\d+(?:\.\d+)?)?")
_WORD = re.compile(r"\w+|[^\w\s]")
_BETWEEN = frozenset([",", ";", "&", "and", "(", ")", "*"])


def tagged(response: str) -> str | None:
    """Return the content of the last ``<answer>`` of a response, or None without one.

    Args:
        response: Text of the response.
    """
    before, end, _ = response.rpartition("</answer>")
    if not end:
        return None
    _, begin, content = before.rpartition("<answer>")
    return content.partition("</answer>")[0].strip() if begin else None


def judged(response: str) -> str:
    """Return the text that is judged: the content of the last ``<answer>``, or the whole response without one.

    Args:
        response: Text of the response.
    """
    answer = tagged(response)
    return response.strip() if answer is None else answer


def is_number(text: str) -> bool:
    """Return whether a text is a decimal number, with or without commas between thousands.

    Args:
        text: The text.
    """
    text = text.strip().translate(_MINUS)
    return bool(_NUMBER.fullmatch(text) or _THOUSANDS.fullmatch(text))


def last_number(text: str) -> str | None:
    """Return the last number of a text without the commas between its thousands, or None.

    It is None also where the last digits are no decimal number, for example ``13,4``, ``3/4`` or ``1e5``.

    Args:
        text: The text.
    """
    tokens = _TOKEN.findall(text.translate(_MINUS))
    return tokens[-1].replace(",", "") if tokens and is_number(tokens[-1]) else None


def last_options(text: str) -> frozenset[str]:
    """Return the capital letters that a text ends with, for example A and C of ``A and C.``.

    Args:
        text: The text.
    """
    words = _WORD.findall(text.rstrip(" \n\t.!"))
    found = set()
    for word in reversed(words):
        if len(word) == 1 and "A" <= word <= "Z":
            found.add(word)
        elif word not in _BETWEEN:
            break
    return frozenset(found)
