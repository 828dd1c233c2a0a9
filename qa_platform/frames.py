"""Answers as pandas DataFrames: `answer` answers a frame on this machine, `read_answers` and `rejected` read PostgreSQL's tables.

`answer_file` answers files if the source or the target is Parquet.

The environment says how to reach PostgreSQL. Text has the dtype ``string``, numbers ``Int64`` or ``Float64``; missing values are ``pd.NA``.
"""

import io
import json
import re
import sys
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas.api.extensions import ExtensionArray

from qa_platform.contract import ANSWER_COLUMNS, ModelChoice, Precision, RowReason, find_columns, pass_through_columns
from qa_platform.errors import InputError
from qa_platform.ingest.dialect import csv_line, csv_reader
from qa_platform.ingest.packing import is_parquet, new_file
from qa_platform.settings import ModelSettings, PostgresSettings

if TYPE_CHECKING:
    from tqdm import tqdm

    from qa_platform.answering import Answerer, AnswerOptions
    from qa_platform.answering.rows import AskedRow, Counts
    from qa_platform.ingest import TextLimits
    from qa_platform.ledger import Ledger

# The columns of the answered CSV and of the report on rejected rows that are not text.
_NUMBERS: dict[str, type] = {"score": float, "answer_start": int, "answer_end": int, "line": int, "row": int}
# pandas' name for a level of an index that has none.
_NAMELESS = re.compile(r"__index_level_\d+__")
_DTYPES: dict[type | str, str] = {
    str: "string",
    "text": "string",
    "character varying": "string",
    int: "Int64",
    "integer": "Int64",
    "bigint": "Int64",
    float: "Float64",
    "double precision": "Float64",
    "timestamp without time zone": "datetime64[us]",
    "timestamp with time zone": "datetime64[us, UTC]",
}


def answer(
    frame: pd.DataFrame,
    *,
    question: Hashable = "question",
    context: Hashable = "context",
    model: "str | Answerer" = "bundled",
    precision: Precision | Literal["auto"] = "auto",
    top_k: int = 1,
    handle_impossible_answer: bool | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """A copy of a frame with the columns of `contract.ANSWER_COLUMNS` added. Its own columns, rows and index are unchanged.

    No row raises: one that cannot be answered has the reason in ``error``. Scores have six digits, as in the answered CSV.

    Args:
        question: the column of the questions.
        context: the column of the contexts.
        model: ``bundled``, a folder, or a Hugging Face id; or an `Answerer`, which keeps its model loaded between calls.
        precision: fp32, bf16, int8, or auto: what `qa-platform tune` found. Ignored for an `Answerer`, which has its own.
        top_k: answers per row. With more than one, the next best are in the column ``alternatives``, a JSON list.
        handle_impossible_answer: whether the model may give no answer; see `AnswerOptions` and `Answerer.no_answer_threshold`.
        progress: whether to show a progress bar in a notebook or a terminal.

    Raises:
        InputError: a column is missing, or clashes with an added one; columns or index have duplicates; there is no such model.
        TransientError: the Hugging Face hub is unavailable.
    """
    from qa_platform.answering import Answerer, AnswerOptions
    from qa_platform.answering.rows import Counts

    aligned = ModelSettings().align_to_words
    options = AnswerOptions(top_k=top_k, handle_impossible_answer=handle_impossible_answer, align_to_words=aligned)
    answerer = model if isinstance(model, Answerer) else Answerer(ModelChoice(model, precision=precision))
    return _answered(frame, question, context, answerer, options, Counts(), progress=progress)


def _answered(
    frame: pd.DataFrame,
    question: Hashable,
    context: Hashable,
    answerer: "Answerer",
    options: "AnswerOptions",
    counts: "Counts",
    *,
    progress: bool,
) -> pd.DataFrame:
    from qa_platform.answering.rows import ALTERNATIVES, alternatives_cell, answer_cells, answered_rows

    added = [*ANSWER_COLUMNS, *([ALTERNATIVES] if options.top_k > 1 else [])]
    _check(frame, (question, context), added)
    # Loads the model before the bar starts, so that the bar shows the speed of answering.
    model_id = answerer.identity.id
    rows = []
    with _bar(len(frame), wanted=progress) as bar:
        for _, found in answered_rows(answerer, map(_asked, frame[question], frame[context]), options):
            rows.append([*answer_cells(found, model_id), alternatives_cell(found)])
            counts.add(found)
            bar.update()
    columns = zip(*rows, strict=True) if rows else [()] * len(added)
    return frame.assign(**{name: _of_texts(name, cells) for name, cells in zip(added, columns, strict=False)})


def answer_file(answerer: "Answerer", source: Path, target: Path | None, options: "AnswerOptions", *, limits: "TextLimits") -> "Counts":
    """Answer a file into another, where at least one of the two is Parquet; the other may be CSV. The whole file is held in memory.

    Parquet columns keep their types; CSV columns are text. A column that clashes with an added one becomes ``input_<name>``. The target
    appears only when it is complete.

    Args:
        target: where to write; None writes a CSV to standard output.
        limits: the limits on questions and contexts of a CSV.

    Raises:
        InputError: the source cannot be read, lacks a column, or repeats one; the target is the source.
    """
    from qa_platform.answering.csvfile import refuse_output

    as_csv = target is None or not is_parquet(target)
    answered = partial(_parquet_answered, as_csv=as_csv) if is_parquet(source) else partial(_csv_answered, limits=limits)
    if target is None:
        table, counts = answered(answerer, source, options)
        sys.stdout.buffer.writelines(_csv_lines(table))
        return counts
    refuse_output(source, target, [target])
    # Opened first: a folder that cannot be written to is noticed before hours are spent on the answers.
    with new_file(target) as out:
        table, counts = answered(answerer, source, options)
        if as_csv:
            out.writelines(_csv_lines(table))
        else:
            pq.write_table(table, out)
    return counts


def _csv_answered(answerer: "Answerer", source: Path, options: "AnswerOptions", *, limits: "TextLimits") -> tuple[pa.Table, "Counts"]:
    from qa_platform.answering.csvfile import answer_rows, answered_columns
    from qa_platform.ingest import RowReader

    with source.open("rb") as lines, tempfile.TemporaryFile() as answers, _bar(None, wanted=True) as bar:
        rows = RowReader(lines, limits=limits)
        # A CSV may repeat a column's name, Parquet may not: fail before hours are spent on the answers.
        _refuse_repeated(answered_columns(rows, options), where=str(source))
        counts = answer_rows(answerer, rows, answers, options, lambda row: bar.update())
        answers.seek(0)
        kinds = {name: _NUMBERS.get(name, str) for name in ANSWER_COLUMNS}
        frame = _of_csv(io.TextIOWrapper(answers, encoding="utf-8", newline=""), kinds, rows.delimiter)
    return pa.Table.from_pandas(frame), counts


def _parquet_answered(answerer: "Answerer", source: Path, options: "AnswerOptions", *, as_csv: bool) -> tuple[pa.Table, "Counts"]:
    from qa_platform.answering.rows import Counts

    try:
        # Not a frame: pandas has no exact equivalent of many types, such as lists of integers with missing values.
        table = pq.ParquetFile(source).read()
        table.validate(full=True)
        # pandas' notes, which are JSON.
        _ = table.schema.pandas_metadata
    except (pa.ArrowException, OSError, ValueError) as error:
        # Not pyarrow's text, which names no file.
        raise InputError("it is not Parquet, or is damaged", where=str(source), advice="only Parquet may be called .parquet") from error
    _refuse_repeated(table.column_names, where=str(source))
    try:
        positions = find_columns(table.column_names)
    except ValueError as error:
        raise InputError(f"it is not Parquet with questions and contexts: {error}", where=str(source)) from error
    if as_csv:
        _refuse_unprintable(table, source)
    asked = pd.DataFrame({position: pd.Series(table.column(position).to_pylist(), dtype=object) for position in positions})
    counts = Counts()
    answered = _answered(asked, *positions, answerer, options, counts, progress=True)
    added = pa.Table.from_pandas(answered.drop(columns=[*positions]), preserve_index=False)
    return _side_by_side(table, added), counts


def _side_by_side(table: pa.Table, added: pa.Table) -> pa.Table:
    """Columns added to a table. A column that clashes with an added one is renamed, in pandas' notes on the columns too."""
    names = pass_through_columns(table.column_names, added.column_names)
    renamed = dict(zip(table.column_names, names, strict=True))
    notes, before = added.schema.pandas_metadata, table.schema.pandas_metadata or {}
    # Old versions of pandas note the name only.
    own = ({"field_name": note["name"], **note} for note in before.get("columns") or ())
    notes["columns"] = [*(_renamed(note, renamed[note["field_name"]]) for note in own if note["field_name"] in renamed), *notes["columns"]]
    notes["index_columns"] = [renamed.get(index, index) if isinstance(index, str) else index for index in before.get("index_columns") or ()]
    metadata = {**(table.schema.metadata or {}), b"pandas": json.dumps(notes).encode()}
    columns = [*table.columns, *added.columns]
    return pa.Table.from_arrays(columns, names=[*names, *added.column_names]).replace_schema_metadata(metadata)


def _renamed(note: dict[str, Any], name: str) -> dict[str, Any]:
    return note if note["field_name"] == name else {**note, "name": name, "field_name": name}


def _csv_lines(table: pa.Table) -> Iterator[bytes]:
    """A table as the lines of an answered CSV, without an index that has no name."""
    indexes = [index for index in table.schema.pandas_metadata["index_columns"] if isinstance(index, str)]
    table = table.drop_columns([index for index in indexes if _NAMELESS.fullmatch(index)])
    yield csv_line(table.column_names)
    score = table.column_names.index("score")
    for batch in table.to_batches():
        for row in zip(*map(_cells, batch.columns), strict=True):
            cells = ["" if _is_missing(cell) else str(cell) for cell in row]
            yield csv_line([*cells[:score], cells[score] and f"{row[score]:.6f}", *cells[score + 1 :]])


def _cells(column: pa.Array) -> list[Any]:
    # Of an extension's type, such as a period, pyarrow gives the number or record that it is stored as.
    return list(column.to_pandas() if isinstance(column.type, pa.ExtensionType) else column.to_pylist())


def _refuse_unprintable(table: pa.Table, source: Path) -> None:
    """Refuse values that cannot become text before hours are spent on the answers."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            for chunk in column.chunks:
                _cells(chunk)
        except (ValueError, OverflowError, KeyError) as error:
            what = f"the column {name!r} has values that cannot be written as text: {error}"
            raise InputError(what, where=str(source), advice="write Parquet, or change or drop the column") from error


def read_answers(
    *,
    file: str | None = None,
    partition: str | None = None,
    where: Mapping[str, object] | None = None,
    columns: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The rows of the table ``question_answer`` that meet all conditions, ordered by file and row.

    The frame must fit into memory. Contexts take most of it; use ``columns`` to leave them out.

    Args:
        file: the file's name below ``incoming/``.
        partition: the file's Dagster partition (``context.partition_key``), instead of ``file``.
        where: column values to match, such as ``{"model": "bundled", "flag": None}``. None matches a missing value.
        columns: the columns to read, in this order; all of them by default.

    Raises:
        InputError: there is no condition, or two name a file; the file is not answered; there is no such column; a value does not fit its
            column's type.
        TransientError: PostgreSQL is unavailable.
    """
    from qa_platform.clients.postgres import connect
    from qa_platform.clients.schema import ANSWERS
    from qa_platform.ledger import Ledger
    from qa_platform.results.stored_answers import stored_answers

    conditions = {column: _value(column, value) for column, value in (where or {}).items()}
    settings = PostgresSettings()
    if len([given for given in (file, partition, conditions.get("source_file")) if given is not None]) > 1:
        raise InputError("the file is given more than once", advice="give a file, a partition, or source_file in where")
    if file is not None or partition is not None:
        with Ledger(settings) as ledger:
            conditions["source_file"] = _answered_file(ledger, file, partition)
    if not conditions:
        raise InputError("nothing says which answers to read", advice="give a file, a partition, or values of columns as where")
    names = list(dict.fromkeys(columns if columns is not None else ANSWERS.names))
    with connect(settings) as connection:
        cells: list[list[Any]] = [[] for _ in names]
        for row in stored_answers(connection, names, conditions):
            for column, cell in zip(cells, row, strict=True):
                column.append(cell)
    return pd.DataFrame(
        {name: pd.array(column, dtype=_DTYPES[ANSWERS.base_types[name]]) for name, column in zip(names, cells, strict=True)}
    )


def rejected(file: str) -> pd.DataFrame:
    """The report on a file: why its newest generation was rejected, or the rejected rows in the tables. See `ingest.REPORT_COLUMNS`.

    While a newer generation is not loaded yet, those are an older generation's rows.

    Args:
        file: the file's name below ``incoming/``.

    Raises:
        InputError: the file was never seen, or is neither rejected nor answered yet.
        TransientError: PostgreSQL is unavailable.
    """
    from qa_platform.clients.postgres import connect
    from qa_platform.ledger import Ledger
    from qa_platform.results.rejected_csv import rejected_report

    settings = PostgresSettings()
    with Ledger(settings) as ledger, connect(settings) as connection:
        report = b"".join(rejected_report(ledger, connection, _storable("file", file)))
    return _of_csv(io.StringIO(report.decode(), newline=""), _NUMBERS)


def _check(frame: object, wanted: Iterable[Hashable], added: Sequence[str]) -> None:
    if not isinstance(frame, pd.DataFrame):
        kind = f"{type(frame).__module__}.{type(frame).__name__}".removeprefix("builtins.")
        advice = "call its to_pandas()" if hasattr(frame, "to_pandas") else "pandas.read_csv reads a file into one"
        raise InputError(f"a DataFrame of pandas is needed, and this is {kind}", advice=advice)
    if frame.columns.nlevels > 1:
        raise InputError("the frame's columns have several levels", advice="give it one name per column")
    for name in wanted:
        if name not in frame.columns:
            raise InputError(f"the frame has no column {name!r}", advice="name its columns with question= and context=")
    if clash := [name for name in added if name in frame.columns]:
        raise InputError(f"the frame has the columns {', '.join(clash)} already", advice="drop or rename them")
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise InputError(f"the frame has several columns {twice!r}", advice="drop or rename all but one")
    if not frame.index.is_unique:
        twice = frame.index[frame.index.duplicated()][0]
        raise InputError(f"the frame's index has {twice} several times", advice="number the rows with reset_index()")


def _asked(question: object, context: object) -> "AskedRow":
    """A row for the engine. A missing value becomes an empty text, which the engine rejects as empty."""
    from qa_platform.answering.rows import AskedRow

    question, context = ("" if _is_missing(cell) else cell for cell in (question, context))
    if not (isinstance(question, str) and isinstance(context, str)):
        return AskedRow((), "", "", RowReason.NOT_TEXT)
    # numpy has its own class of strings.
    return AskedRow((), str(question), str(context))


def _is_missing(cell: object) -> bool:
    return pd.api.types.is_scalar(cell) and bool(pd.isna(cell))


def _bar(rows: int | None, *, wanted: bool) -> "tqdm":
    """A progress bar on standard error. It is shown only in a notebook or a terminal, not in a log."""
    from rich.console import Console
    from tqdm import tqdm

    console = Console(stderr=True)
    return tqdm(total=rows, unit=" rows", disable=not (wanted and (console.is_terminal or console.is_jupyter)))


def _answered_file(ledger: "Ledger", file: str | None, partition: str | None) -> str:
    """The name of an answered file, given its name or its partition."""
    from qa_platform.results.answered_record import answered_record

    name = file if file is None else _storable("file", file)
    if partition is not None:
        record = ledger.newest_by_partition([_storable("partition", partition)]).get(partition)
        name = record.version.name if record else None
    if name is None:
        raise InputError("it is not answered", where=partition or "", advice="`qa-platform status` lists the files")
    return answered_record(ledger, name).version.name


def _value(column: str, value: object) -> str | None:
    """A value as text, for a parameter that PostgreSQL casts to the column's type."""
    if not pd.api.types.is_scalar(value):
        raise InputError(f"must be one value, and is a {type(value).__name__}", where=f"where, {column}")
    return None if _is_missing(value) else _storable(f"where, {column}", str(value))


def _storable(where: str, text: str) -> str:
    from qa_platform.ingest.rules import storable

    if not storable(text):
        raise InputError("it has a character that the tables cannot hold: NUL, or half of a surrogate pair", where=where)
    return text


def _refuse_repeated(names: Sequence[str], *, where: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"it has several columns {twice[0]!r}", where=where, advice="rename all but one")


def _of_csv(lines: Iterable[str], kinds: Mapping[str, type], delimiter: str = ",") -> pd.DataFrame:
    """A CSV with unique column names, as a frame. Columns are text unless ``kinds`` gives another type."""
    header, *rows = csv_reader(lines, delimiter=delimiter)
    cells = zip(*rows, strict=True) if rows else [()] * len(header)
    return pd.DataFrame({name: _of_texts(name, column, kinds) for name, column in zip(header, cells, strict=True)})


def _of_texts(column: str, cells: Iterable[str], kinds: Mapping[str, type] = _NUMBERS) -> ExtensionArray:
    """A column from the cells of a CSV. An empty cell is a missing value."""
    kind = kinds.get(column, str)
    return pd.array([kind(cell) if cell else None for cell in cells], dtype=_DTYPES[kind])
