r"""What a text gives as its answer: the part that is the answer, and its formula, unit, percentage or choice.

The answer of a text is, in this order: its last ``\boxed``; what follows its last ``answer is``, ``answer:`` or
``####``; the whole text if it holds no prose; its last sentence without words such as ``so``, or what follows the last
``is`` or ``=`` of that sentence, if it holds no prose; its last formula or its last number.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_CHARACTERS = str.maketrans(
    {
        **{"\u2212": "-", "\ufe63": "-", "\uff0d": "-", "\u2010": "-", "\u2011": "-"},
        **{"\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": "/", "\u2044": "/", "\u2215": "/"},
        **{"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2208": r"\in ", "\u00b1": r"\pm "},
        **{"\u222a": r"\cup ", "\u2229": r"\cap ", "\u2205": r"\emptyset ", "\u221e": r"\infty ", "\u03c0": r"\pi "},
        **{"\u00b0": r"^\circ ", "\u211d": r"\mathbb{R}", "\uff0c": ",", "\uff08": "(", "\uff09": ")", "\uff0e": "."},
        **{"\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}"},
        **dict(zip("\u00a0\u2002\u2003\u2009\u200a\u202f\u3000", " " * 7, strict=True)),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
    }
)
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207f"
_SUPERSCRIPTS = str.maketrans(_RAISED, "0123456789-n")
_SUPERSCRIPT = re.compile(f"[{_RAISED}]+")
_ROOT = re.compile("\u221a\\s*(\\w+|\\([^()]*\\))")
_EMPHASIS = re.compile(r"(?<![\w)}*])\*\*(?=\S)|(?<=\S)\*\*(?![\w({*])")

_MARKER = re.compile(
    r"####|\banswers?\b\s*(?:(?:to|of|for)\b[^.\n]{0,80}?)?(?:\bis\b|\bare\b|\bwould be\b|\bmust be\b|:|=)\s*:?", re.I
)
_VERB = re.compile(r"\b(?:is|are|be|equals|get|gives|makes|was)\b:?|(?<![<>!\\=])=(?!=)", re.I)
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$]+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
_NUMBER = r"\d+(?:[,:]\d+)*(?:\.\d+)?|\.\d+"
_JOINT = re.compile(r"[\s$,;]*(?:and|or|\\text\{\s*(?:and|or)\s*\})?[\s$,;]*")
_OPENING = re.compile(r"(?:(?:so|thus|hence|therefore|then|finally|and|we (?:get|have|find|obtain))\b[,:]?\s*)+", re.I)
_FONT = r"\\(?:text|mathrm|textbf|mathbf|textit|mbox)"
_COMMAND = re.compile(rf"\\(?:begin|end)\s*\{{\w*\}}|(?:{_FONT}|\\operatorname)\s*\{{[^{{}}]*\}}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_SHORT_WORDS = set(re.findall(r"\w+", "is it in of to so we he be as at by an if no on us my do"))
_FUNCTIONS = "sqrt sin cos tan cot sec csc log ln exp arcsin arccos arctan sinh cosh tanh max min mod gcd lcm det"
_KNOWN = set(re.findall(r"\w+", f"{_FUNCTIONS} pi and or inf infinity oo"))
_UNITS = {
    alias: name
    for name, aliases in {
        "cm": "cm centimeter centimeters centimetre centimetres",
        "mm": "mm millimeter millimeters",
        "km": "km kilometer kilometers kilometre kilometres",
        "m": "m meter meters metre metres",
        "inch": "in inch inches",
        "ft": "ft foot feet",
        "mi": "mi mile miles",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "l": "l liter liters litre litres",
        "ml": "ml milliliter milliliters",
        "s": "s sec second seconds",
        "min": "min minute minutes",
        "h": "h hr hour hours",
        "day": "day days",
        "year": "year years",
        "dollar": "dollar dollars usd",
        "cent": "cent cents",
        "degree": "degree degrees",
        "radian": "rad radian radians",
    }.items()
    for alias in aliases.split()
}
_LAST_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])-\s*)?(?:{_NUMBER})(?:\s*/\s*(?:{_NUMBER}))?(?:\s*\\?%|\s+(?:{'|'.join(_UNITS)})\b)?"
)
_TEXT_UNIT = re.compile(rf"\s*{_FONT}\s*\{{\s*([A-Za-z][A-Za-z .]*?)\s*\}}(?:\^\{{?(\d)\}}?)?$")
_PLAIN_UNIT = re.compile(r"(?<=[\d)}])\s+([mghsl]|[A-Za-z]{2,}(?:[ /][A-Za-z]+)*)(?:\^\{?(\d)\}?)?$")


class Answer(NamedTuple):
    """An answer.

    Attributes:
        text: Text to compare.
        formula: Its formula, or None if it is words.
        unit: Its unit or the base of its number, or None.
        percent: Whether it is a percentage.
    """

    text: str
    formula: str | None
    unit: str | None = None
    percent: bool = False


def same_units(a: Answer, b: Answer) -> bool:
    """Return False if both answers have a known unit and these differ.

    Args:
        a: An answer.
        b: An answer.
    """
    units = {answer.unit for answer in (a, b) if answer.unit is not None}
    known = (unit.rstrip("23") in _UNITS.values() or unit.startswith("base ") for unit in units)
    return len(units) < 2 or not all(known)


def final(text: str) -> str:
    """Return the part of a text that is its answer.

    Args:
        text: Text without typographic characters.
    """
    text = text.rpartition("</think>")[2].strip() or text.strip()
    if boxes := _boxes(text):
        return ", ".join(boxes)
    if markers := list(_MARKER.finditer(text)):
        tail = text[markers[-1].end() :].strip()
        if tail:
            return _first_answer(tail)
    if not _prose(_without_unit(text)[0]):
        return text
    return _answer_in_prose(text)


def _answer_in_prose(text: str) -> str:
    sentences = [x.strip() for x in _SENTENCE_END.split(text) if x.strip()]
    last = sentences[-1] if sentences else text
    opening = _OPENING.match(last)
    if opening and not _prose(_without_unit(rest := last[opening.end() :])[0]):
        return rest
    formulas, numbers = list(_FORMULA.finditer(text)), list(_LAST_NUMBER.finditer(text))
    if numbers and formulas and numbers[-1].start() >= formulas[-1].end():
        formulas = []
    if not (formulas and "$" in last):
        verbs = list(_VERB.finditer(last))
        if verbs and (tail := last[verbs[-1].end() :].strip()) and not _prose(_without_unit(tail)[0]):
            return tail
    if formulas:
        return ", ".join(_last_joined(text, [(x.start(), x.end(), _content(x)) for x in formulas]))
    return numbers[-1].group() if numbers else text


def _content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group)


def _last_joined(text: str, found: list[tuple[int, int, str]]) -> list[str]:
    """Return the last of some pieces of a text, after those before it that only commas and conjunctions separate."""
    joined = found[-1:]
    for piece in reversed(found[:-1]):
        between = text[piece[1] : joined[0][0]]
        if not _JOINT.fullmatch(between) or "\n\n" in between:
            break
        joined.insert(0, piece)
    return list(dict.fromkeys(content for _, _, content in joined))


def translated(text: str) -> str:
    """Return a text with ASCII and LaTeX in place of typographic characters, and without bold print.

    Args:
        text: The text.
    """
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1]}}}", text)
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    return _EMPHASIS.sub("", text.translate(_CHARACTERS))


def _boxes(text: str) -> list[str]:
    """Return the contents of the last box, and of boxes before it that only commas and conjunctions separate."""
    found: list[tuple[int, int, str]] = []
    closings = _closings(text)
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        if found and match.start() < found[-1][1]:
            continue  # a box inside of a box
        end = closings.get(match.end() - 1)
        if end is not None:
            found.append((match.start(), end + 1, text[match.end() : end]))
    return _last_joined(text, found)


def _closings(text: str) -> dict[int, int]:
    """Return the place of the closing brace of each opening brace that has one."""
    found, open_braces = {}, []
    for i, character in enumerate(text):
        if character == "{":
            open_braces.append(i)
        elif character == "}" and open_braces:
            found[open_braces.pop()] = i
    return found


def _first_answer(tail: str) -> str:
    """Return the answer that stands at the beginning of a text."""
    formula = _FORMULA.match(tail)
    if formula is not None:
        rest = tail[formula.end() :]
        more = re.match(r"(?:\s*(?:,|and|or)+\s*(?:\$[^$]+\$))+", rest)
        return formula.group() + (more.group() if more else "")
    line = tail.split("\n")[0]
    return _SENTENCE_END.split(line)[0]


def _prose(text: str) -> bool:
    words = _WORD.findall(_COMMAND.sub(" ", text))
    if len(words) == 1 and words[0] == text.strip().rstrip("."):
        return False
    return any(word.lower() in _SHORT_WORDS or (len(word) > 2 and word.lower() not in _KNOWN) for word in words)


_LONE_LETTER = re.compile(r"\(?\s*([A-Z])\s*\)?\.?")
_CHOICE = re.compile(
    r"\W*(?:(?:option|choice|letter|answer)\s+)?([A-Z])\s*(?:[).:\]]|,(?!\s*[A-Z]\b)|\s*$|\s+(?=because|since|as\b))",
    re.I,
)
_OTHER_CHOICE = re.compile(r"\W*(?:and|or|&)?\W*\(?[A-Z]\b(?!')")
_ANY_CHOICE = re.compile(
    r"(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s+\(?([A-Z])\b|\(([A-Z])\)|(?<![\w'$\\])([A-Z])(?![\w'])"
    r"(?!\s+(?!is (?:the )?(?:right|correct|true|best))[a-z])"
)


def chosen(text: str) -> str | None:
    """Return the capital letter that a response to a multiple-choice question chooses, or None.

    Args:
        text: Text of the response.
    """
    answer = _unwrapped(final(text))
    match = _CHOICE.match(answer)
    if match is not None and not _OTHER_CHOICE.match(answer[match.end() :]):
        return match[1].upper()
    if match is not None or not _prose(text) or _boxes(text) or _MARKER.search(text):
        return None
    named = [_ANY_CHOICE.findall(sentence) for sentence in _SENTENCE_END.split(text)]
    last = {letter for groups in next(filter(None, reversed(named)), []) for letter in groups if letter}
    return last.pop() if len(last) == 1 else None


def choice(text: str) -> str | None:
    """Return the capital letter that a gold answer consists of, or None if it is no choice.

    Args:
        text: Text of the gold answer.
    """
    letter = _LONE_LETTER.fullmatch(_unwrapped(final(text)))
    return letter[1] if letter else None


def _unwrapped(text: str) -> str:
    """Return a text without the signs of a formula, and without commands that only set a font."""
    text = text.strip()
    for _ in range(4):
        text = re.sub(rf"^{_FONT}\s*\{{([^{{}}]*)\}}", r"\1", text.strip())
        text = re.sub(r"^(?:\$+|\\\(|\\\[)|(?:(?<!\\)\$+|\\\)|\\\])$", "", text.strip()).rstrip(".,;:").strip(" `*")
    return text


def read(text: str) -> Answer:
    """Return the answer of a text.

    Args:
        text: Text from :func:`final`.
    """
    text = _FORMULA.sub(_content, _unwrapped(text))
    text = re.sub(r"\\(?:left|right|displaystyle|[!])(?![A-Za-z])", "", text)
    text = re.sub(r"(?<=\d)(?:\\[,; ]|\{,\}|~)(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"~|(?<!\\)\\(?:[,;: ]|quad)", " ", text)
    text = re.sub(r"^=\s*|^\\?\$\s*(?=[\d.-])|^[€£¥]\s*|^(-)\\?\$", r"\1", text).strip()
    text = re.sub(r"\\(?:text|mathrm|rm)\s*\{\s*([A-Za-z]|[\d.]+)\s*\}", r"\1", text)
    text, unit = _without_unit(text)
    bare = re.sub(r"\s*(?:\\?%|\bpercent\b|\\text\{\s*percent\s*\})$", "", text)
    percent = bare != text
    words = re.sub(rf"{_FONT}\s*\{{([^{{}}]*)\}}", r"\1", text)
    plain = re.sub(r"\s+", " ", words).strip(" .").casefold()
    if re.fullmatch(r"[a-z][a-z '\-]+", plain) and plain not in _KNOWN:
        return Answer(plain, text if words == text and len(plain) < 5 and " " not in plain else None)
    return Answer(re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text), bare, unit, percent)


def _without_unit(text: str) -> tuple[str, str | None]:
    text = text.strip().rstrip(".,;")
    based = re.fullmatch(r"([\dA-F]+)_\{?(?:\\text\{)?(\w+)\}*", text)
    if based is not None:
        return based[1], f"base {based[2]}"
    degree = re.sub(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)$", "", text)
    if degree != text:
        return degree, "degree"
    for pattern in (_TEXT_UNIT, _PLAIN_UNIT):
        match = pattern.search(text)
        rest = text[: match.start()].strip() if match else ""
        is_unit = match is not None and match[1].lower() not in _KNOWN | {"percent"}
        if match and is_unit and re.search(r"\d", rest) and not _prose(rest):
            name = match[1].strip().lower()
            return rest, _UNITS.get(name, name) + (match[2] or "")
    return text, None
