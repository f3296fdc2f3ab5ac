"""The text of every token id, free of characters that control a terminal or a browser."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

LONGEST = 200


def load_tokenizer(name: str) -> Any:
    """Return a ``transformers`` tokenizer. Code that comes with it is not run.

    Args:
        name: Folder, or name on the hub.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def visible(text: str, longest: int = LONGEST) -> str:
    r"""Return a text in which control characters are written out as ``\u{...}``.

    Line feeds and tabs stay. Other control characters, marks that turn the writing direction, invisible characters,
    lone surrogates and unassigned code points are written out. A longer text is cut and ends with its length.

    Args:
        text: The text.
        longest: Characters to keep.
    """
    if len(text) > longest:
        text = f"{text[:longest]}… ({len(text)} characters)"
    return "".join(c if c in "\n\t\u200d" or not unicodedata.category(c).startswith("C") else _named(c) for c in text)


def _named(character: str) -> str:
    return f"\\u{{{ord(character):x}}}"


class Vocabulary:
    """Texts of token ids.

    Args:
        tokenizer: A ``transformers`` tokenizer, or None to show the ids themselves.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        # Not up to len(tokenizer): ids of added and reserved tokens may lie above it.
        self._known = frozenset(tokenizer.get_vocab().values()) if tokenizer is not None else frozenset()

    def texts(self, ids: Iterable[int]) -> list[str]:
        """Return the visible text of each id.

        A token that is only a part of a character is shown as its bytes, ``⟨f0 9f⟩``, and an id that the tokenizer does
        not know as ``⟨id⟩``.

        Args:
            ids: Token ids.
        """
        return [self._text(i) if i in self._known else f"⟨{i}⟩" for i in ids]

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
    """Return the byte of each character of byte-level BPE, which writes unprintable bytes as characters from 256 on."""
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _printable_bytes()


def _bytes(piece: str) -> bytes | None:
    if piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:-1])
    return bytes(_BYTES[c] for c in piece) if all(c in _BYTES for c in piece) else None
