"""Whether a response and a gold answer are the same mathematics.

Both texts are read by the same rule, see :mod:`tokcredit.rewards.reading`, and parsed by math-verify.

This file runs in the worker of :class:`tokcredit.rewards.bounded.BoundedCalls`, so it does not import torch.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.matrices import MatrixBase

from tokcredit.rewards.reading import Answer, choice, chosen, final, read, same_units, translated

_LONGEST = 2000
_DIGITS = 6
_PRECISION = 40
_TINY = sympy.Float(10) ** (5 - _PRECISION)
_SAMPLES = tuple(sympy.Rational(*pair) for pair in ((7, 5), (-3, 7), (11, 3), (1, 9), (-13, 6), (23, 4), (2, 17)))
_IN_PARENTHESES = re.compile(r"\([^()]*\)")
_CONFIGURATION = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        )
    )
]


def reward(gold: str, response: str) -> float:
    """Return 1 if the answer of a response is the gold answer, and 0 otherwise.

    Args:
        gold: Text of the gold answer.
        response: Text of the response.
    """
    gold, response = translated(gold), translated(response)
    letter = choice(gold)
    if letter is not None:
        return float(chosen(response) == letter)
    return float(_same(read(final(gold)), read(final(response))))


def prepare() -> None:
    """Fill the caches of the parsers, so that the first judged responses need no more time than later ones."""
    for gold, response in (
        ("3/4", r"\boxed{\frac{1}{2}}"),
        ("x^2+1", "The answer is $2x = 4$."),
        ("(1,2)", r"\{1,2\}"),
    ):
        reward(gold, response)


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


def _same(gold: Answer, response: Answer) -> bool:
    if not same_units(gold, response):
        return False
    if gold.text == response.text:
        return bool(gold.text)
    for a, b in ((gold.text, response.text), (response.text, gold.text)):
        if a.startswith(r"\{") and _IN_PARENTHESES.fullmatch(b):
            return False  # a set is neither a point nor an interval
    ratios = [x.text.split(":") for x in (gold, response)]
    if max(map(len, ratios)) > 1:
        return len(ratios[0]) == len(ratios[1]) and all(_same(read(a), read(b)) for a, b in zip(*ratios, strict=True))
    if re.fullmatch(r"[a-z]{2,}", gold.text) and re.fullmatch(r"[a-z]{2,}", response.text):
        return False
    if gold.formula is None or response.formula is None:
        return False
    own, theirs = _sympy(gold.formula), _sympy(response.formula)
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
