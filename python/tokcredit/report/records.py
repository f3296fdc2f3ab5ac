"""Records of a file: one mapping of names to values for each rollout, as the file has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokcredit import files

Record = Mapping[str, Any]


def load(file: Path) -> tuple[list[Record], dict[str, str]]:
    """Return the records of a file, and what a trainer of this package wrote about itself into it.

    Args:
        file: A ``.parquet`` or ``.jsonl`` file.

    Raises:
        ValueError: The file cannot be read as what its name says.
    """
    return _parquet(file) if file.suffix == ".parquet" else (_jsonl(file), {})


def parsed(text: str | bytes, where: str) -> dict[str, Any]:
    """Return a JSON object.

    Args:
        text: The text.
        where: Where it stands, for errors.

    Raises:
        ValueError: The text is not JSON, or not an object.
    """
    found = files.parsed(text, where, "path")
    if not isinstance(found, dict):
        raise ValueError(f"path: expected an object in {where}, got {type(found).__name__}")
    return found


def _parquet(file: Path) -> tuple[list[Record], dict[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"path: expected a Parquet file, got {file}: {error}") from None
    settings = parsed((table.schema.metadata or {}).get(b"tokcredit", b"{}"), f"the metadata of {file}")
    columns = [_cells(column.combine_chunks()) for column in table.columns]
    records: list[Record] = [dict(zip(table.column_names, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return records, {key: str(value) for key, value in settings.items() if value is not None}


def _cells(column: Any) -> list[Any]:
    """Return the cells of an Arrow column; lists of numbers stay arrays."""
    from pyarrow import types

    if not types.is_list(column.type) or not (
        types.is_primitive(column.type.value_type) or types.is_boolean(column.type.value_type)
    ):
        return column.to_pylist()
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    return [values[a:b] if there else None for a, b, there in zip(offsets[:-1], offsets[1:], present, strict=True)]


def _jsonl(file: Path) -> list[Record]:
    # Bytes that are not UTF-8 become lone surrogates, which are shown escaped in prompts and refused in responses.
    with file.open(encoding="utf-8", errors="surrogateescape") as lines:
        return [parsed(line, f"line {number} of {file}") for number, line in enumerate(lines, 1) if line.strip()]
