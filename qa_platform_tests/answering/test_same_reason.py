"""A row gets the same reason through every entry point: the pipeline, `qa-platform answer`, and `Answerer`."""

import csv
import io
from pathlib import Path

import pytest
from click.testing import CliRunner

from qa_platform.answering import Answerer
from qa_platform.answering.shard import answer_shard
from qa_platform.cli.answering import answer as answer_command
from qa_platform.contract import CONTEXT_LIMIT, QUESTION_LIMIT, FileVersion, ModelChoice, RowReason
from qa_platform.ingest import split
from qa_platform.settings import IngestSettings
from qa_platform_tests.answering_models import make_bert

_NUL, _HALF, _LONG_QUESTION, _LONG_CONTEXT = "a\0b", "a\ud800b", "q" * (QUESTION_LIMIT + 1), "c" * (CONTEXT_LIMIT + 1)

# Every reason that a question and a context can have, alone and with the others, to show which one comes first.
ROWS = [
    pytest.param("Who?", "Ada Blum built it.", None, id="good"),
    pytest.param(" ", "c", RowReason.EMPTY_QUESTION, id="empty question"),
    pytest.param("q", "", RowReason.EMPTY_CONTEXT, id="empty context"),
    pytest.param("\u200b\ufeff", "c", RowReason.EMPTY_QUESTION, id="invisible question"),
    pytest.param("q", "\u0301 \u00ad", RowReason.EMPTY_CONTEXT, id="invisible context"),
    pytest.param("\ufffd", "c", RowReason.EMPTY_QUESTION, id="a question without a token"),
    pytest.param("q", "c" * 20_000, RowReason.UNUSABLE_ANSWER, id="one unbroken word"),
    pytest.param(_LONG_QUESTION, "c", RowReason.QUESTION_TOO_LONG, id="long question"),
    pytest.param("q", _LONG_CONTEXT, RowReason.CONTEXT_TOO_LONG, id="long context"),
    pytest.param("q", _NUL, RowReason.NUL_CHARACTER, id="NUL"),
    pytest.param(_HALF, "c", RowReason.LONE_SURROGATE, id="half a surrogate pair"),
    pytest.param("Who? " * 1000, "c", RowReason.QUESTION_EXCEEDS_WINDOW, id="a question beyond the window"),
    pytest.param("", _NUL, RowReason.NUL_CHARACTER, id="NUL before empty"),
    pytest.param("", _HALF, RowReason.LONE_SURROGATE, id="surrogate before empty"),
    pytest.param(_HALF, _NUL, RowReason.NUL_CHARACTER, id="NUL before surrogate"),
    pytest.param(_NUL, _HALF, RowReason.NUL_CHARACTER, id="NUL before surrogate, the other way round"),
    pytest.param(_LONG_QUESTION, "", RowReason.EMPTY_CONTEXT, id="empty before long"),
    pytest.param(_LONG_QUESTION, _LONG_CONTEXT, RowReason.QUESTION_TOO_LONG, id="question before context"),
    pytest.param(_LONG_QUESTION, _NUL, RowReason.NUL_CHARACTER, id="NUL before long"),
    pytest.param("Who? " * 1000, " ", RowReason.EMPTY_CONTEXT, id="empty before the window"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def answerer(folder: Path) -> Answerer:
    return Answerer(str(folder), threads=1)


def errors_of(answered: bytes) -> list[str]:
    return [row["error"] for row in csv.DictReader(io.StringIO(answered.decode(), newline=""))]


def by_the_pipeline(answerer: Answerer, data: bytes, folder: Path) -> list[str]:
    def write(path: str, chunks: object) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"".join(chunks))  # type: ignore[arg-type]

    version = FileVersion("f.csv", 1, len(data))
    split(io.BytesIO(data), version=version, load_id=1, model=ModelChoice("bundled"), settings=IngestSettings(), write=write)
    answer_shard(answerer, folder / "part-00000", folder / "out")
    return errors_of((folder / "out" / "answers.csv").read_bytes())


@pytest.mark.parametrize("columns", [("question", "context"), ("context", "id", "question")], ids=["plain", "reversed"])
@pytest.mark.parametrize(("question", "context", "reason"), ROWS)
def test_a_row_has_the_same_reason_by_every_door(
    folder: Path,
    answerer: Answerer,
    tmp_path: Path,
    question: str,
    context: str,
    reason: RowReason | None,
    columns: tuple[str, ...],
) -> None:
    cells = {"question": question, "context": context, "id": "1"}
    record = ",".join(f'"{cells[name]}"' for name in columns)
    data = f"{','.join(columns)}\n{record}\n".encode(errors="surrogatepass")
    source = tmp_path / "f.csv"
    source.write_bytes(data)
    expected = [reason or ""]

    assert [answer.error or "" for answer in answerer.answer([(question, context)])] == expected
    assert by_the_pipeline(answerer, data, tmp_path / "shards") == expected
    ran = CliRunner().invoke(answer_command, [str(source), "--model", str(folder), "--threads", "1"])
    assert errors_of(ran.stdout_bytes) == expected
