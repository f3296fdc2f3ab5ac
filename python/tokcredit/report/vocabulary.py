"""What a token looks like: text for every id, with nothing in it that could act on the reader's screen."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

LONGEST = 200


def load_tokenizer(name: str) -> Any:
    """A ``transformers`` tokenizer from a folder or by name; code that comes with it is not run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def visible(text: str, longest: int = LONGEST) -> str:
    """The text with every character that controls instead of showing written out.

    Line feeds and tabs stay; other control characters, marks that turn the writing direction, invisible characters,
    lone surrogates and unassigned code points become ``\\u{...}``. A very long text is cut, and says so.
    """
    if len(text) > longest:
        text = f"{text[:longest]}… ({len(text)} characters)"
    return "".join(c if c in "\n\t\u200d" or not unicodedata.category(c).startswith("C") else _named(c) for c in text)


def _named(character: str) -> str:
    return f"\\u{{{ord(character):x}}}"


class Vocabulary:
    """Text of token ids by a tokenizer, or the ids themselves without one."""

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer

    def texts(self, ids: Iterable[int]) -> list[str]:
        """Visible text of each id on its own.

        A token that is part of a character only is shown as its bytes, ``⟨f0 9f⟩``, and an id the tokenizer does not
        know as ``⟨id⟩``.
        """
        ids = list(ids)
        if self.tokenizer is None:
            return [f"⟨{i}⟩" for i in ids]
        known = len(self.tokenizer)
        return [self._text(i) if 0 <= i < known else f"⟨{i}⟩" for i in ids]

    def _text(self, token: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" in text and isinstance(piece, str) and (raw := _bytes(piece)) is not None:
            return f"⟨{raw.hex(' ')}⟩"
        # SentencePiece drops the space that begins a word when the word stands alone.
        if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
            text = " " + text
        return visible(text) if text else f"⟨{visible(piece) if isinstance(piece, str) else token}⟩"


def _printable_bytes() -> dict[str, int]:
    """Byte-level BPE writes every byte as a printable character: itself, or the next free one from 256 on."""
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _printable_bytes()


def _bytes(piece: str) -> bytes | None:
    if piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:-1])
    return bytes(_BYTES[c] for c in piece) if all(c in _BYTES for c in piece) else None
