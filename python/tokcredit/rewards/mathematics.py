r"""Whether a response and a gold answer are the same mathematics.

Both texts are read by the same rule. The answer of a text is, in this order: its last ``\boxed``, what follows its last
``answer is``, ``answer:`` or ``####``, the whole text if it holds no prose, what follows its last ``is`` or ``=``, its
last formula, its last number. Only this one answer is compared.

This file runs in the worker of :class:`tokcredit.rewards.bounded.BoundedCalls` and imports nothing of the package.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.matrices import MatrixBase

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


class _Answer(NamedTuple):
    """An answer: its text to compare, its formula if it may have a value, its unit, whether it is a percentage."""

    text: str
    formula: str | None
    unit: str | None = None
    percent: bool = False

    @property
    def value(self) -> Any:
        """Value of sympy, or None."""
        return None if self.formula is None else _sympy(self.formula)


def reward(gold: str, response: str) -> float:
    """Return 1 if the answer of a response is the gold answer, and 0 otherwise.

    Args:
        gold: Text of the gold answer.
        response: Text of the response.
    """
    gold, response = _translated(gold), _translated(response)
    letter = _LONE_LETTER.fullmatch(_unwrapped(final(gold)))
    if letter is not None:
        return float(_chosen(response) == letter[1].upper())
    return float(_same(_read(final(gold)), _read(final(response))))


def prepare() -> None:
    """Fill the caches of the parsers, so that the first judged responses need no more time than later ones."""
    for gold, response in (
        ("3/4", r"\boxed{\frac{1}{2}}"),
        ("x^2+1", "The answer is $2x = 4$."),
        ("(1,2)", r"\{1,2\}"),
    ):
        reward(gold, response)


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


def _translated(text: str) -> str:
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


def _chosen(text: str) -> str | None:
    """Return the capital letter that a response to a multiple-choice question chooses."""
    answer = _unwrapped(final(text))
    match = _CHOICE.match(answer)
    if match is not None and not _OTHER_CHOICE.match(answer[match.end() :]):
        return match[1].upper()
    if match is not None or not _prose(text) or _boxes(text) or _MARKER.search(text):
        return None
    named = [_ANY_CHOICE.findall(sentence) for sentence in _SENTENCE_END.split(text)]
    last = {letter for groups in next(filter(None, reversed(named)), []) for letter in groups if letter}
    return last.pop() if len(last) == 1 else None


def _unwrapped(text: str) -> str:
    """Return a text without the signs of a formula, and without commands that only set a font."""
    text = text.strip()
    for _ in range(4):
        text = re.sub(rf"^{_FONT}\s*\{{([^{{}}]*)\}}", r"\1", text.strip())
        text = re.sub(r"^(?:\$+|\\\(|\\\[)|(?:(?<!\\)\$+|\\\)|\\\])$", "", text.strip()).rstrip(".,;:").strip(" `*")
    return text


def _read(text: str) -> _Answer:
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
        return _Answer(plain, text if words == text and len(plain) < 5 and " " not in plain else None)
    return _Answer(re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text), bare, unit, percent)


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


def _latex(text: str) -> str:
    text = re.sub(r"\*\*", "^", text)
    text = re.sub(r"m?\\angle\s*(\w+)", r"a_{\1}", text)
    text = re.sub(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}", _repeating, text)
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)", r"\1\\cdot 10^{\2}", text)
    text = re.sub(r"(?<![\w.}])(-?)(\d+)\s+(\d+)/(\d+)(?![\w.])", r"\1(\2+\\frac{\3}{\4})", text)
    text = re.sub(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty ", text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|ln|exp)(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"(?<!\\)sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<!\\)sqrt\s*(\{|\d)", r"\\sqrt\1", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{(\1)}", text)
    text = re.sub(r"\^\s*-\s*(\w+)", r"^{-\1}", text)
    text = re.sub(r"\^\s*(\d\d+)", r"^{\1}", text)
    for plain, command in (("<=", r"\\le "), (">=", r"\\ge "), ("!=", r"\\ne ")):
        text = re.sub(plain, command, text)
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup ", text)
    return text.replace("*", r"\cdot ")


_CONFIGURATION = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        )
    )
]


def _repeating(match: re.Match[str]) -> str:
    """Return a repeating decimal as a fraction."""
    whole, before, again = match.groups()
    numerator = int(f"{whole}{before}{again}") - int(f"{whole}{before}" or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(again)}{'0' * len(before)}}}"


@functools.lru_cache(maxsize=4096)
def _sympy(text: str) -> Any:
    """Return the value of a formula, or None if it cannot be parsed or is longer than any answer."""
    if len(text) > _LONGEST:
        return None
    if r"\pm" in text:
        both = [_sympy(text.replace(r"\pm", sign)) for sign in "+-"]
        return None if None in both else sympy.FiniteSet(*both)
    latex = _latex(text)
    if not re.search(r"[(\[{]", latex):
        latex = re.sub(r"(?<![\d,.])(\d{1,3})((?:,\d{3})+)(?![\d,])", lambda m: m[1] + m[2].replace(",", ""), latex)
    else:
        latex = re.sub(r",(?!\s)", ", ", latex)  # 100,200 in brackets are two numbers
    found = parse(f"${latex}$", _CONFIGURATION, "no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _same(gold: _Answer, response: _Answer) -> bool:
    units = {gold.unit, response.unit} - {None}
    known = (unit.rstrip("23") in _UNITS.values() or unit.startswith("base ") for unit in units if unit)
    if len(units) == 2 and all(known):
        return False
    if gold.text == response.text:
        return bool(gold.text)
    ratios = [x.text.split(":") for x in (gold, response)]
    if max(map(len, ratios)) > 1:
        return len(ratios[0]) == len(ratios[1]) and all(_same(_read(a), _read(b)) for a, b in zip(*ratios, strict=True))
    if re.fullmatch(r"[a-z]{2,}", gold.text) and re.fullmatch(r"[a-z]{2,}", response.text):
        return False
    own, theirs = gold.value, response.value
    if own is None or theirs is None:
        return False
    if gold.percent == response.percent:
        return _equal(own, theirs)
    numbers = [isinstance(x, sympy.Expr) and x.is_number for x in (own, theirs)]
    if not all(numbers):
        return False
    hundredth = sympy.Rational(1, 100)
    if _equal(own * hundredth if gold.percent else own, theirs * hundredth if response.percent else theirs):
        return True
    # Fifty percent may be written as 50, but half a percent is not 0.5.
    return bool(abs(theirs if gold.percent else own) > 1 and _equal(own, theirs))


def _equal(gold: Any, response: Any) -> bool:
    gold, response = _chain(gold), _chain(response)
    if isinstance(gold, sympy.Eq) != isinstance(response, sympy.Eq):
        gold, response = _value_of(gold), _value_of(response)
    if isinstance(gold, Relational | sympy.And) and isinstance(response, Relational | sympy.And):
        return _equal_relations(gold, response)
    if isinstance(gold, MatrixBase) or isinstance(response, MatrixBase):
        same_shape = isinstance(gold, MatrixBase) and isinstance(response, MatrixBase) and gold.shape == response.shape
        return same_shape and all(map(_equal, gold.flat(), response.flat()))
    collections = (sympy.Set, sympy.Tuple)
    if any(isinstance(x, (*collections, Relational, sympy.And)) for x in (gold, response)):
        return _equal_collections(gold, response)
    return _equal_expressions(gold, response)


def _chain(value: Any) -> Any:
    """Return ``a = c`` for ``a = b = c``."""
    parts = _written(value) if isinstance(value, sympy.And) else ()
    if parts and all(isinstance(part, sympy.Eq) for part in parts):
        return sympy.Eq(parts[0].lhs, parts[-1].rhs, evaluate=False)
    return value


def _written(value: Any) -> tuple[Any, ...]:
    """Return the elements in the order in which they were written."""
    return tuple(getattr(value, "_unsorted_args", value.args))


def _value_of(value: Any) -> Any:
    """Return what an equation says that a variable, or a formula without variables, is."""
    if isinstance(value, sympy.Eq):
        named = isinstance(value.lhs, sympy.Symbol | AppliedUndef) or not getattr(value.lhs, "free_symbols", ())
        return value.rhs if named else value.lhs if isinstance(value.rhs, sympy.Symbol) else value
    return value


def _items(value: Any) -> tuple[tuple[Any, ...], bool] | None:
    """Return the elements of a set, a list, a tuple or a pair, and whether their order matters."""
    if isinstance(value, sympy.Interval) and value.left_open and value.right_open:
        return (value.start, value.end), True
    if isinstance(value, sympy.Tuple):
        return tuple(value.args), True
    if isinstance(value, sympy.FiniteSet):
        return _written(value), False
    return None


def _equal_collections(gold: Any, response: Any) -> bool:
    interval = isinstance(gold, sympy.Interval) and isinstance(response, sympy.Interval)
    if interval:
        sides = gold.left_open == response.left_open and gold.right_open == response.right_open
        return sides and _equal(gold.start, response.start) and _equal(gold.end, response.end)
    own, theirs = _items(gold), _items(response)
    if own is not None and theirs is not None:
        a, b = own[0], theirs[0]
        if len(a) != len(b):
            return False
        if own[1] or theirs[1]:
            return all(map(_equal, a, b))
        return _equal_unordered(list(a), list(b))
    for items, other in ((own, response), (theirs, gold)):
        if items is not None and len(items[0]) == 1 and not isinstance(other, sympy.Set | sympy.Tuple | Relational):
            return _equal(items[0][0], other)
    sets = [_set(x) for x in (gold, response)]
    if any(x is None for x in sets):
        return False
    return bool(sets[0] == sets[1] or sets[0].symmetric_difference(sets[1]) == sympy.S.EmptySet)


def _equal_unordered(a: list[Any], b: list[Any]) -> bool:
    for x in a:
        match = next((i for i, y in enumerate(b) if _equal(x, y)), None)
        if match is None:
            return False
        del b[match]
    return True


def _set(value: Any) -> Any:
    """Return the set of a set, of an inequality, or of inequalities of which one holds; else None."""
    if isinstance(value, sympy.FiniteSet) and value.args and all(isinstance(x, Relational) for x in value.args):
        return sympy.Union(*(x.as_set() for x in value.args)) if len(value.free_symbols) == 1 else None
    if isinstance(value, sympy.Set):
        return value
    if isinstance(value, Relational | sympy.And) and len(value.free_symbols) == 1:
        return sympy.And(*_written(value)).as_set() if isinstance(value, sympy.And) else value.as_set()
    return None


def _equal_relations(gold: Any, response: Any) -> bool:
    if isinstance(gold, sympy.Eq) and isinstance(response, sympy.Eq):
        a, b = _value_of(gold), _value_of(response)
        same_name = gold.lhs == response.lhs or gold.lhs.free_symbols == response.lhs.free_symbols == set()
        if a is not gold and b is not response and same_name and _equal(a, b):
            return True
        return _proportional(gold, response, signed=False)
    single = isinstance(gold, Relational) and isinstance(response, Relational)
    if single and _proportional(gold, response, signed=True):
        return True
    sets = [_set(x) for x in (gold, response)]
    same_variable = gold.free_symbols == response.free_symbols and len(gold.free_symbols) == 1
    return same_variable and None not in sets and bool(sets[0] == sets[1])


def _proportional(gold: Any, response: Any, signed: bool) -> bool:
    """Return whether both relations say the same of multiples of one expression."""
    if not all(isinstance(side, sympy.Expr) for relation in (gold, response) for side in relation.args):
        return False
    (left, kind), (right, other) = _difference(gold), _difference(response)
    if kind is not other or left.free_symbols != right.free_symbols or not left.free_symbols:
        return False
    ratio = sympy.simplify(left / right)
    return bool(ratio.is_number and ratio.is_finite and ratio != 0 and (not signed or ratio.is_positive))


def _difference(relation: Any) -> tuple[Any, Any]:
    """Return ``d`` and the kind of the relation ``d > 0``, ``d >= 0``, ``d = 0`` or ``d != 0``."""
    flipped = {sympy.StrictLessThan: sympy.StrictGreaterThan, sympy.LessThan: sympy.GreaterThan}
    kind = type(relation)
    if kind in flipped:
        return relation.rhs - relation.lhs, flipped[kind]
    return relation.lhs - relation.rhs, kind


_LONGEST = 2000
_DIGITS = 6
_PRECISION = 40
_TINY = sympy.Float(10) ** (5 - _PRECISION)
_SAMPLES = tuple(sympy.Rational(*pair) for pair in ((7, 5), (-3, 7), (11, 3), (1, 9), (-13, 6), (23, 4), (2, 17)))


def _equal_expressions(gold: Any, response: Any) -> bool:
    if not (isinstance(gold, sympy.Expr) and isinstance(response, sympy.Expr)):
        return bool(gold == response)
    if sympy.nan in (gold, response) or sympy.zoo in (gold, response):
        return False
    if gold.free_symbols != response.free_symbols:
        return False
    if not gold.free_symbols:
        return _equal_numbers(gold, response)
    return _equal_functions(_exact(gold), _exact(response))


def _exact(value: Any) -> Any:
    return value.replace(lambda x: x.is_Float, lambda x: sympy.Rational(str(x))).doit()


def _equal_numbers(gold: Any, response: Any) -> bool:
    a, b = _exact(gold), _exact(response)
    if a == b:
        return True
    for decimal, x, y in ((gold, a, b), (response, b, a)):
        if decimal.is_Float and (places := _places(x)) is not None and abs(y - x) < sympy.Rational(1, 10**places):
            return True
    if a.is_Rational and b.is_Rational:
        return False
    x, y = a.evalf(_PRECISION), b.evalf(_PRECISION)
    # A number that is 0 is not evaluated to 0, but to a small number.
    return _close(x, y) or bool(0 in (a, b) and max(abs(x), abs(y)) < _TINY and sympy.simplify(a - b) == 0)


def _places(decimal: Any) -> int | None:
    """Return the number of decimal places of a number with at least six significant digits, else None."""
    places = next((n for n in range(60) if (decimal * 10**n).is_Integer), None)
    return places if places is not None and len(str(abs(decimal * 10**places))) >= _DIGITS else None


def _close(a: Any, b: Any) -> bool:
    """Return whether two numbers agree in almost all digits that were computed; small numbers are no zeros."""
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return False
    scale = max(abs(a), abs(b))
    return bool(abs(a - b) <= scale * sympy.Float(10) ** (10 - _PRECISION))


def _equal_functions(a: Any, b: Any) -> bool:
    """Return whether two formulas agree at all sample points where both are real numbers, at least three."""
    if a == b:
        return True
    symbols = sorted(a.free_symbols, key=str)
    real = 0
    for shift in range(len(_SAMPLES)):
        values = itertools.islice(itertools.cycle(_SAMPLES), shift, None)
        at = {symbol: value + i for i, (symbol, value) in enumerate(zip(symbols, values, strict=False))}
        x, y = (side.subs(at).evalf(_PRECISION) for side in (a, b))
        if not (x.is_real and y.is_real and x.is_finite and y.is_finite):
            continue
        if not _close(x, y) and max(abs(x), abs(y)) > _TINY:
            return False
        real += 1
    return real >= 3 or sympy.simplify(a - b) == 0
