"""Rows of text from the user's files and from data sets, each knowing where it stands.

Files: JSON lines, a JSON list of objects, CSV, TSV and parquet. Data sets: a hub id or a folder
that ``datasets.load_dataset`` reads. Whatever cannot be read is refused with its file and line
(parquet and data sets: the row, counted from 0).
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stockpot.errors import StockpotError, first_line, nearest
from stockpot.streams.source import cannot_load, resolve_source

__all__ = ["FILES", "MISSING", "Rows", "is_file", "open_data_set", "read_file", "rows_of_split"]

FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""The endings by which a file is told from a data set."""


MISSING: Any = object()
"""Stands where a row of JSON lacks a column that other rows have."""


@dataclass(frozen=True)
class Rows:
    """Rows by column."""

    source: str
    """The file or data set, as the user wrote it."""
    columns: tuple[str, ...]
    count: int
    column: Callable[[str], list[Any]]
    """The values of one column, :data:`MISSING` where a row lacks it."""
    place: Callable[[int], str]
    """Where a row stands, for an error: ``file:line``."""

    def __len__(self) -> int:
        return self.count


def is_file(source: str) -> bool:
    """Whether ``source`` means a file (by its ending) and not a data set."""
    return Path(source).suffix.lower() in FILES and not Path(source).is_dir()


# Files.


def read_file(source: str) -> Rows:
    """The rows of a file, read by its ending.

    Raises:
        StockpotError: if it cannot be read, has no rows, or a row is not what the format allows.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in FILES:
        raise StockpotError(f"{source}: give a file that ends in {', '.join(FILES)}")
    if not path.is_file():
        raise StockpotError(f"{source}: there is no such file")
    if suffix == ".parquet":
        rows = _parquet(source, path)
    elif suffix in (".csv", ".tsv"):
        rows = _table(source, _text(source, path), "," if suffix == ".csv" else "\t")
    else:
        text = _text(source, path)
        a_list = suffix == ".json" and text.lstrip().startswith("[")
        rows = _objects(source, _listed(source, text) if a_list else _lines(source, text))
    if not len(rows):
        raise StockpotError(f"{source} has no rows")
    return rows


def _text(source: str, path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StockpotError(f"cannot read {source}: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")  # a byte order mark is no part of the first column
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StockpotError(
            f"{source}:{line}: byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from error


def _objects(source: str, records: Iterator[tuple[int, Any]]) -> Rows:
    """Rows of numbered JSON objects."""
    objects: list[dict[str, Any]] = []
    lines: list[int] = []
    columns: dict[str, None] = {}
    for line, record in records:
        if not isinstance(record, dict):
            raise StockpotError(
                f"{source}:{line}: expected an object, such as "
                '{"prompt": "...", "response": "..."}, not ' + json.dumps(record)[:40]
            )
        objects.append(record)
        lines.append(line)
        columns.update(dict.fromkeys(record))
    return Rows(
        source,
        tuple(columns),
        len(objects),
        lambda name: [record.get(name, MISSING) for record in objects],
        lambda row: f"{source}:{lines[row]}",
    )


def _lines(source: str, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise StockpotError(
                    f"{source}:{number}: not valid JSON ({_reason(error)}); expected one object a "
                    "line"
                ) from error


def _listed(source: str, text: str) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list, each with the line on which it begins."""
    decoder = json.JSONDecoder()
    place, line, counted = text.index("[") + 1, 1, 0
    separator = ""
    while True:
        place = _skip(text, place)
        if text[place : place + 1] == "]" and separator != ",":
            break
        line, counted = line + text.count("\n", counted, place), place
        try:
            item, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "lineno", line)
            raise StockpotError(f"{source}:{at}: not valid JSON ({_reason(error)})") from error
        yield line, item
        place = _skip(text, place)
        separator = text[place : place + 1]
        if separator not in (",", "]"):
            at = text.count("\n", 0, place) + 1
            raise StockpotError(f"{source}:{at}: not valid JSON (expected ',' or ']')")
        place += separator == ","
    rest = _skip(text, place + 1)
    if rest < len(text):
        at = text.count("\n", 0, rest) + 1
        raise StockpotError(f"{source}:{at}: not valid JSON (something follows the list)")


def _skip(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return first_line(error)


def _table(source: str, text: str, delimiter: str) -> Rows:
    """Rows of CSV or TSV: the first line names the columns, values may be quoted."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    records: list[list[str]] = []
    lines: list[int] = []
    limit = csv.field_size_limit(sys.maxsize)  # the module's 128 KiB is less than a document
    begin = 1
    try:
        for record in reader:
            if header is None:
                header = record
                _check_header(source, header)
            elif record:
                if len(record) != len(header):
                    raise StockpotError(
                        f"{source}:{begin}: {_some(len(record), 'value')} where the header names "
                        f"{_some(len(header), 'column')}"
                    )
                records.append(record)
                lines.append(begin)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise StockpotError(
            f"{source}:{begin}: not valid {'TSV' if delimiter != ',' else 'CSV'} ({error})"
        ) from error
    finally:
        csv.field_size_limit(limit)
    index = {name: number for number, name in enumerate(header or ())}
    return Rows(
        source,
        tuple(index),
        len(records),
        lambda name: [record[index[name]] for record in records],
        lambda row: f"{source}:{lines[row]}",
    )


def _check_header(source: str, header: list[str]) -> None:
    for number, name in enumerate(header):
        if not name.strip():
            raise StockpotError(f"{source}:1: column {number + 1} of the header has no name")
        if name in header[:number]:
            raise StockpotError(f"{source}:1: the header names {name!r} twice")


def _some(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _parquet(source: str, path: Path) -> Rows:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (OSError, pyarrow.ArrowException) as error:
        raise StockpotError(
            f"cannot read {source}: not a parquet file ({first_line(error)})"
        ) from error
    return Rows(
        source,
        tuple(table.column_names),
        table.num_rows,
        lambda name: _values(source, name, table.column(name)),
        lambda row: f"{source}, row {row} (the first is 0)",
    )


def _values(source: str, name: str, column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError as error:
        raise StockpotError(f"{source}: column {name!r} is not UTF-8 ({error})") from error
    return values


# Data sets.


def open_data_set(source: str, config: str | None = None, option: str = "train") -> Any:
    """All splits of a data set, by name.

    Args:
        source: a hub id or a folder; an id that ``STOCKPOT_DATA`` holds is read from there.
        config: which of the data set's configurations; a folder that has but one, without a name,
            is taken to be it, so that a mirror needs no more than its files.
        option: the setting that ``source`` comes from, for the error.

    Raises:
        StockpotError: if it cannot be had.
    """
    import datasets

    place = resolve_source(source)
    try:
        if Path(place).is_dir():
            return _folder(place, config)
        try:
            return datasets.load_dataset(place, config)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # Sets that once came as a program: the hub keeps what it gave under this name.
            return datasets.load_dataset(place, data_dir=config, revision="refs/convert/parquet")
    except Exception as error:  # the library raises many kinds
        raise cannot_load(source, error, option) from error


def _folder(place: str, config: str | None) -> Any:
    """The splits of a folder; those in parquet may differ in their columns."""
    import datasets

    known = datasets.get_dataset_config_names(place)
    if config is not None and config not in known:
        if known != ["default"]:
            raise StockpotError(f"it has no configuration {config!r}{nearest(config, known)}")
        config = None  # a mirror holds one configuration, under no name
    builder = datasets.load_dataset_builder(place, config)
    if builder.name != "parquet":
        return datasets.load_dataset(place, config)
    return {
        split: datasets.load_dataset(builder.name, data_files={split: files}, split=split)
        for split, files in builder.config.data_files.items()
    }


def rows_of_split(
    source: str, splits: Mapping[str, Any], split: str, spell_labels: bool = False
) -> Rows:
    """The rows of one split of an opened data set.

    Args:
        source: its name, for errors.
        splits: from :func:`open_data_set`.
        split: which.
        spell_labels: whether labels that the data set has names for become those names.

    Raises:
        StockpotError: if there is no such split, or it has no rows.
    """
    if split not in splits:
        raise StockpotError(
            f"data set {source!r} has no split {split!r} (it has {', '.join(splits)})"
        )
    data = splits[split]
    if not len(data):
        raise StockpotError(f"data set {source!r}, split {split!r} has no rows")

    def column(name: str) -> list[Any]:
        # Straight from Arrow: a row at a time takes ten times as long.
        table = data.select_columns([name]).with_format("arrow")[:]
        values = _values(source, name, table.column(name))
        names = getattr(data.features[name], "names", None) if spell_labels else None
        if names is None:
            return values
        return [
            names[value] if isinstance(value, int) and 0 <= value < len(names) else None
            for value in values
        ]

    return Rows(
        source,
        tuple(data.column_names),
        len(data),
        column,
        lambda row: f"data set {source!r}, split {split!r}, row {row} (the first is 0)",
    )
