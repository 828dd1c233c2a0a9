"""The contract between the stages: names, columns, limits, reasons, and the two documents that travel with the rows.

The path of a file:

1. ``incoming/<name>`` in the bucket, an input CSV.
2. ``/<file id>/`` in the repo ``questions``: one folder per shard, ``part-00000/`` …, with ``questions.csv`` (the header and
   that shard's rows) and ``shard.json`` (everything else that a worker needs, including the model). A shard is answered again
   only if its rows or its model change. The first shard also carries the file's ``manifest.json`` to the loader, so it is
   answered again with every new load of the file.
3. ``/<file id>/`` in the repo ``question_answer``: ``manifest.json`` unchanged, and per shard ``answers.csv`` and the worker's
   ``shard.json`` (the same document, completed).
4. Rows in PostgreSQL, and ``/<file id>.csv``, the whole answered file, in the repo ``push-answers-to-sql``.

Standard library only: every stage imports this.
"""

import enum
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from qa_platform.errors import InputError
from qa_platform.text import escaped

INCOMING = "incoming/"
PROCESSED = "processed/"
REJECTED = "rejected/"

QUESTIONS_REPO = "questions"
ANSWER_PIPELINE = "question_answer"
LOAD_PIPELINE = "push-answers-to-sql"
# In the order in which they process a commit.
PIPELINES = (ANSWER_PIPELINE, LOAD_PIPELINE)

# Marks the version of the embedded pachd.
EMBEDDED_PACHD = "-embedded"

# The asset that Dagster's sensor materialises as long as it can list the bucket and its run requests become runs.
HEARTBEAT_ASSET = "incoming_listing"

MANIFEST = "manifest.json"
SHARD_INFO = "shard.json"
SHARD_QUESTIONS = "questions.csv"
SHARD_ANSWERS = "answers.csv"

# The widths of the table's columns, which existing readers rely on.
QUESTION_LIMIT = 10_000
ANSWER_LIMIT = 10_000
CONTEXT_LIMIT = 500_000
MODEL_LIMIT = 1_000

# The characters at which a rejected row's raw text is cut.
RAW_LIMIT = 64 * 1024

# A record of more bytes is rejected while it is read. The longest legal context takes 2 MB, at four bytes per character.
ROW_LIMIT = 4 * 2**20
# A file whose header exceeds either limit is not a table of questions.
HEADER_LIMIT = 2**20
COLUMN_LIMIT = 1_000
# The length at which a column's name is cut where rejected rows repeat it.
COLUMN_LABEL_LIMIT = 200

# A file is rejected as a whole as soon as more rows than this are rejected, and more than were good up to there: it is not a table of
# questions, and its rejects would fill every store.
REJECT_LIMIT = 100_000

# A gzip file may unpack to GZIP_LIMIT bytes and, beyond GZIP_FREE, to GZIP_RATIO times the bytes that were read. Text compresses ten- or
# twentyfold, a bomb a thousandfold.
GZIP_LIMIT = 16 * 2**30
GZIP_FREE = 64 * 2**20
GZIP_RATIO = 200

ANSWER_COLUMNS = ("answer", "score", "answer_start", "answer_end", "model", "error")


class FileReason(enum.StrEnum):
    """Why a whole file is rejected."""

    EMPTY_FILE = "empty_file"
    HEADER_ONLY = "header_only"
    MISSING_COLUMN = "missing_column"
    DUPLICATE_COLUMN = "duplicate_column"
    WRONG_DELIMITER = "wrong_delimiter"
    NOT_UTF8 = "not_utf8"
    UTF16 = "utf16"
    BINARY = "binary"
    ARCHIVE = "archive"
    DAMAGED_GZIP = "damaged_gzip"
    GZIP_BOMB = "gzip_bomb"
    UNBALANCED_QUOTE = "unbalanced_quote"
    TOO_MANY_COLUMNS = "too_many_columns"
    BAD_HEADER = "bad_header"
    HEADER_TOO_LARGE = "header_too_large"
    CR_LINE_ENDS = "cr_line_ends"
    TOO_MANY_BAD_ROWS = "too_many_bad_rows"


class FileStatus(enum.StrEnum):
    """The state of one generation of a file."""

    PENDING = "pending"
    RUNNING = "running"
    # In PostgreSQL; its source is not archived yet.
    LOADED = "loaded"
    FINISHED = "finished"
    # The file cannot be read.
    REJECTED = "rejected"
    # The generation that was answered last has the same content and the same model.
    UNCHANGED = "unchanged"
    # A newer generation took its place.
    SUPERSEDED = "superseded"
    # Parked after too many failures, until a retry is requested.
    FAILED = "failed"
    # Removed on request. The record has no content, and keeps this generation from being answered or loaded again.
    FORGOTTEN = "forgotten"


class RowReason(enum.StrEnum):
    """Why a row has no answer, or (``LOW_SCORE``) why its answer deserves a look. The value is written to the ``error`` cell."""

    EMPTY_QUESTION = "empty_question"
    EMPTY_CONTEXT = "empty_context"
    QUESTION_TOO_LONG = "question_too_long"
    CONTEXT_TOO_LONG = "context_too_long"
    TOO_FEW_CELLS = "too_few_cells"
    TOO_MANY_CELLS = "too_many_cells"
    BAD_QUOTING = "bad_quoting"
    BARE_CARRIAGE_RETURN = "bare_carriage_return"
    ROW_TOO_LARGE = "row_too_large"
    NUL_CHARACTER = "nul_character"
    LONE_SURROGATE = "lone_surrogate"
    QUESTION_EXCEEDS_WINDOW = "question_exceeds_window"
    UNUSABLE_ANSWER = "unusable_answer"
    # Only for rows of a DataFrame: every cell of a CSV is text.
    NOT_TEXT = "not_text"
    NO_ANSWER = "no_answer"
    LOW_SCORE = "low_score"


@dataclass(frozen=True, order=True)
class FileVersion:
    """One generation of one object: ``name`` is the object's name below ``incoming/``. Composed objects have no ``md5``."""

    name: str
    generation: int
    size: int = 0
    crc32c: str = ""
    # Some records and archived copies lack it, so it does not decide whether two versions are equal.
    md5: str = field(default="", compare=False)

    @property
    def shown(self) -> str:
        """The name for display, with unprintable characters escaped."""
        return escaped(self.name)


# The arithmetic of a model. ``auto``, where it is allowed, resolves to one of these.
Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class ModelChoice:
    """The requested model: ``bundled``, a folder, or a Hugging Face id with a revision; and its precision: fp32, bf16, int8 or auto.

    ``no_answer_threshold``: "no answer" wins if its log probability exceeds the best answer's by more than this. If it is None, the model
    gives "no answer" only if the caller allows it explicitly.
    """

    id: str
    revision: str = ""
    precision: str = "fp32"
    no_answer_threshold: float | None = None


@dataclass(frozen=True)
class Rejection:
    """A row that cannot be answered. ``row`` counts data rows from 1; ``line`` is the file's line where the row begins, from 1.

    ``column`` is the `column_label` of the faulty column, empty if the fault is not in one column. ``raw`` is the original row, escaped and
    cut at RAW_LIMIT.
    """

    row: int
    line: int
    reason: RowReason
    column: str = ""
    detail: str = ""
    raw: str = ""


def _values(part: object) -> dict[str, Any]:
    """The fields of a part of a document. None values are left out, so that programs that do not know a field yet can read the rest."""
    return {name: value for name, value in vars(part).items() if value is not None}


class _Document:
    """A dataclass that is written as JSON. Unknown or missing fields are an error that names them."""

    def to_json(self) -> str:
        # A shard may have thousands of rejections: asdict would copy them, and an indent would select the slow encoder.
        return json.dumps(vars(self), default=_values, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        try:
            return cls._of(json.loads(text))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"not a {cls.__name__} document: {error}") from error

    @classmethod
    def _of(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


@dataclass(frozen=True)
class ShardInfo(_Document):
    """``shard.json``. Ingestion writes the first group of fields; the worker adds the second.

    ``first_row`` counts the file's data rows from 1; ``sha256`` is the hash of ``questions.csv``. Object, generation and load id are
    left out, so that a shard with the same rows and model is the same datum, and is not answered again.
    """

    first_row: int
    rows: int
    sha256: str
    model: ModelChoice
    rejections: tuple[Rejection, ...] = ()
    # Whether answers are widened to whole words.
    align_to_words: bool = True
    # What of the answers' version the model does not say; and the launch, if the shard's output was lost. Both make the shard a new datum:
    # Pachyderm would skip the old one, which counts as done.
    launch: str = ""

    # The model that answered: its id, the resolved revision, and the precision that was used.
    answered_by: ModelChoice | None = None
    # The library that ran the model, with its version, such as ``openvino 2026.0``.
    runtime: str = ""
    answered: int = 0
    no_answer: int = 0
    rejected: int = 0
    # The time of answering, ISO 8601, naive UTC.
    answered_at: str = ""
    seconds: float = 0.0

    @classmethod
    def _of(cls, values: dict[str, Any]) -> Self:
        values["model"] = ModelChoice(**values["model"])
        values["rejections"] = tuple(Rejection(**{**r, "reason": RowReason(r["reason"])}) for r in values["rejections"])
        if values.get("answered_by"):
            values["answered_by"] = ModelChoice(**values["answered_by"])
        return cls(**values)


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest. ``name`` is its folder; ``rejected`` counts the rows that ingestion rejected."""

    name: str
    first_row: int
    rows: int
    rejected: int
    sha256: str


@dataclass(frozen=True)
class Manifest(_Document):
    """``manifest.json``: everything that a file consists of. Nothing is loaded unless all of it is there.

    ``load_id`` counts the requests to answer this generation, from 1. Each request changes the manifest, and so the loading
    datum, even if no shard has changed. Two runs of the same load write the same manifest, so that a file whose loading failed
    is not answered again.
    """

    name: str
    generation: int
    size: int
    crc32c: str
    load_id: int
    model: ModelChoice
    columns: tuple[str, ...]
    rows: int
    rejected: int
    shards: tuple[ShardEntry, ...] = field(default=())
    # As in `ShardInfo`. Set if the first shard's output was lost, so that the file is loaded again too.
    launch: str = ""

    @classmethod
    def _of(cls, values: dict[str, Any]) -> Self:
        values["model"] = ModelChoice(**values["model"])
        values["columns"] = tuple(values["columns"])
        values["shards"] = tuple(ShardEntry(**entry) for entry in values["shards"])
        return cls(**values)


@dataclass(frozen=True)
class DatumFault(_Document):
    """Why a datum failed. The programs of the two pipelines report it to Pachyderm, which stores it as the datum's reason.

    ``blameless``: the datum's file is not to blame. ``advice``: what to do. ``v``: the version of this format.
    """

    blameless: bool
    cause: str
    advice: str = ""
    v: int = 1

    @classmethod
    def of_reason(cls, reason: str) -> Self | None:
        """The fault in a datum's reason. None if no program wrote the reason, for example because the process was killed."""
        try:
            # Pachyderm appends its own error if the program could not be restarted.
            values, _ = json.JSONDecoder().raw_decode(reason.lstrip())
            if values["v"] != 1:
                return None
            return cls(blameless=bool(values["blameless"]), cause=str(values["cause"]), advice=str(values.get("advice", "")))
        except (ValueError, TypeError, KeyError):
            return None

    def __str__(self) -> str:
        return f"{self.cause}; {self.advice}" if self.advice else self.cause


def file_id(name: str) -> str:
    """The folder of a file in Pachyderm: an ASCII slug of at most 60 characters and 16 hex characters of the name's SHA-256."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", ascii_name).strip("-")[:60].strip("-")
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{slug}-{digest}" if slug else digest


# Dagster forbids these in partition keys, or uses them for ranges ("...") and lists (","). "%" is our escape character.
_KEY_ESCAPES = {"%": "%25", "...": "%2E%2E%2E", ",": "%2C", "\n": "%0A", "\r": "%0D"}
_KEY_LIMIT = 900
# The line in a worker's log for an answered shard. It is parsed only to show progress.
_SHARD_LINE = re.compile(rf"/pfs/{QUESTIONS_REPO}/(\S+/part-\d+): \d+ rows in ")


def partition_key(name: str) -> str:
    """The Dagster partition key of a file: its escaped name. Beyond 900 bytes, a hash replaces the tail. Injective."""
    key = re.sub("|".join(re.escape(text) for text in _KEY_ESCAPES), lambda match: _KEY_ESCAPES[match.group()], name)
    if len(key.encode()) <= _KEY_LIMIT:
        return key
    head = key.encode()[: _KEY_LIMIT - 65].decode(errors="ignore")
    return f"{head}%{hashlib.sha256(name.encode()).hexdigest()}"


def shard_name(index: int) -> str:
    """The folder of a shard: ``part-00000`` and so on."""
    return f"part-{index:05d}"


def shard_in(line: str) -> str:
    """The path in `questions` of the shard that this line of a worker's log reports as answered; "" for any other line."""
    found = _SHARD_LINE.search(line)
    return found.group(1) if found else ""


def column_label(name: str) -> str:
    """A column's name as rejected rows repeat it. Long names are cut, since a header may be as large as HEADER_LIMIT."""
    return name if len(name) <= COLUMN_LABEL_LIMIT else name[: COLUMN_LABEL_LIMIT - 1] + "…"


def find_columns(header: Sequence[str]) -> tuple[int, int]:
    """The positions of ``question`` and ``context`` in a header. Case and surrounding spaces are ignored.

    Raises:
        ValueError: one of them is missing or repeated; the message names it.
    """
    names = [name.strip().lower() for name in header]
    for wanted in ("question", "context"):
        if names.count(wanted) != 1:
            raise ValueError(f"the header has {names.count(wanted)} columns called {wanted!r}, and must have one")
    return names.index("question"), names.index("context")


def pass_through_columns(header: Sequence[str], added: Sequence[str] = ANSWER_COLUMNS) -> tuple[str, ...]:
    """The upload's columns as the answered CSV names them: a name that clashes with an ``added`` one becomes ``input_<name>``."""
    ours = set(added)
    taken = {name.strip().lower() for name in header} | ours
    result = []
    for name in header:
        renamed = name
        while renamed.strip().lower() in ours or (renamed != name and renamed.strip().lower() in taken):
            renamed = f"input_{renamed.strip()}"
        taken.add(renamed.strip().lower())
        result.append(renamed)
    return tuple(result)
