"""Answers as DataFrames: answering a frame locally, reading the tables into frames, and the notebook of the documentation."""

import asyncio
import io
import json
import os
from collections.abc import Hashable
from decimal import Decimal
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from qa_platform import frames
from qa_platform.answering import Answerer, AnswerOptions
from qa_platform.answering.csvfile import answer_stream
from qa_platform.answering.model import find_model
from qa_platform.answering.tuned import remember_threshold
from qa_platform.cli.answering import answer as answer_command_of_cli
from qa_platform.clients.postgres import connect
from qa_platform.clients.schema import ANSWERS
from qa_platform.contract import ANSWER_COLUMNS, COLUMN_LIMIT, ModelChoice, RowReason, partition_key
from qa_platform.errors import InputError
from qa_platform.ingest import REPORT_COLUMNS
from qa_platform.ingest.dialect import parse
from qa_platform.ingest.rules import TABLE_LIMITS
from qa_platform.loading.load import load_file
from qa_platform.settings import PostgresSettings
from qa_platform_tests.checkout import PROJECT
from qa_platform_tests.loading_helpers import ANSWERED_BY, AnsweredRow, AnsweredUpload, ingested

NOTEBOOK = PROJECT / "docs" / "answers.ipynb"
BRIDGE = "The bridge was built by Ada Blum in 1872."
ASKED = pd.DataFrame({"question": ["Who built the bridge?", "When?"], "context": BRIDGE, "topic": ["people", None]}, index=[7, 3])


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer("bundled", threads=1)


def test_a_frame_keeps_its_rows_index_and_columns_and_gets_ours(answerer: Answerer) -> None:
    before = ASKED.copy()
    answered = frames.answer(ASKED, model=answerer)
    pd.testing.assert_frame_equal(ASKED, before)
    pd.testing.assert_frame_equal(answered[list(ASKED.columns)], before)
    assert list(answered.columns) == [*ASKED.columns, *ANSWER_COLUMNS]
    assert answered["answer"].to_dict() == {7: "Ada Blum", 3: "1872"}
    assert [str(answered[name].dtype) for name in ANSWER_COLUMNS] == ["string", "Float64", "Int64", "Int64", "string", "string"]
    row = answered.loc[7]
    assert BRIDGE[row["answer_start"] : row["answer_end"]] == "Ada Blum"


def test_a_model_may_say_of_a_frames_row_that_there_is_no_answer(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path))
    # As `qa-platform evaluate --remember` does.
    remember_threshold(find_model(ModelChoice("bundled")), "cpu", -1000.0)
    assert frames.answer(ASKED, model=answerer)["error"].isna().all()
    assert frames.answer(ASKED, model=answerer, handle_impossible_answer=True)["error"].to_list() == ["no_answer"] * 2
    chosen = Answerer(ModelChoice("bundled", no_answer_threshold=1000.0), threads=1)
    assert frames.answer(ASKED, model=chosen, handle_impossible_answer=True)["error"].isna().all()


def test_a_frame_without_rows_gets_the_same_columns(answerer: Answerer) -> None:
    answered = frames.answer(ASKED.iloc[:0], model=answerer, top_k=2)
    assert list(answered.columns) == [*ASKED.columns, *ANSWER_COLUMNS, "alternatives"]
    assert len(answered) == 0
    assert answered["score"].dtype == "Float64"


def answer_command(*arguments: object) -> Result:
    return CliRunner().invoke(answer_command_of_cli, [*map(str, arguments), "--threads", "1"])


def test_parquet_is_answered_into_parquet_with_the_types_of_its_columns(tmp_path: Path) -> None:
    source, target = tmp_path / "my.parquet", tmp_path / "answered.parquet"
    asked = pd.DataFrame(
        {"Context": [BRIDGE, BRIDGE, None], "QUESTION": ["Who built it?", "When?", "Who?"], "n": [1, None, 3]}, index=[7, 3, 9]
    )
    asked.astype({"n": "Int64"}).to_parquet(source)
    result = answer_command(source, "-o", target, "--top-k", 2)
    assert result.exit_code == 0, result.output
    assert result.stderr == "3 rows, 2 answered, 0 without answer, 1 rejected\n"
    answered = pd.read_parquet(target, dtype_backend="numpy_nullable")
    assert list(answered.columns) == [*asked.columns, *ANSWER_COLUMNS, "alternatives"]
    assert answered["answer"].fillna("-").to_dict() == {7: "Ada Blum", 3: "1872", 9: "-"}
    assert answered["error"].fillna("-").to_list() == ["-", "-", "empty_context"]
    assert [str(answered[name].dtype) for name in ("n", "score", "answer_start")] == ["Int64", "Float64", "Int64"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["answered.parquet", "my.parquet"]
    packed = tmp_path / "answered.csv.gz"
    assert answer_command(target, "-o", packed).exit_code == 0
    assert len(pd.read_csv(packed)) == 3
    packed.unlink()
    assert answer_command(target, "-o", source).exit_code == 0
    again = pd.read_parquet(source)
    assert again["input_answer"].equals(again["answer"])


def test_whole_numbers_with_gaps_stay_whole_in_parquet_that_pandas_did_not_write(tmp_path: Path) -> None:
    source = tmp_path / "my.parquet"
    pq.write_table(pa.table({"question": ["Who built it?", "When?"], "context": [BRIDGE, BRIDGE], "n": [1, None]}), source)
    result = answer_command(source)
    assert [line.split(",")[2] for line in result.stdout.splitlines()] == ["n", "1", ""]


@pytest.mark.parametrize("index", [pd.Index([4, 4], name="answer"), pd.Index([4, 4])], ids=["named", "repeated"])
def test_an_index_that_parquet_keeps_with_its_rows_is_answered_like_a_column(tmp_path: Path, index: pd.Index) -> None:
    source, target = tmp_path / "my.parquet", tmp_path / "answered.csv"
    pd.DataFrame({"question": ["Who built it?", "When?"], "context": [BRIDGE, BRIDGE]}, index=index).to_parquet(source)
    assert answer_command(source, "-o", target).exit_code == 0
    answered = pd.read_csv(target)
    assert answered["answer"].to_list() == ["Ada Blum", "1872"]
    assert list(answered.columns) == ["question", "context", *(["input_answer"] if index.name else []), *ANSWER_COLUMNS]
    again = tmp_path / "again.parquet"
    assert answer_command(source, "-o", again).exit_code == 0
    kept = pd.read_parquet(again)
    assert (kept.index.to_list(), kept.index.name) == ([4, 4], index.name and "input_answer")
    assert kept["answer"].to_list() == ["Ada Blum", "1872"]


def test_types_that_pandas_does_not_have_are_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "my.parquet", tmp_path / "answered.parquet"
    large = 2**53 + 1
    types = {
        "question": pa.large_string(),
        "context": pa.dictionary(pa.int8(), pa.string()),
        "ids": pa.list_(pa.int64()),
        "record": pa.struct({"id": pa.int64()}),
        "counts": pa.map_(pa.string(), pa.int64()),
        "price": pa.decimal128(9, 2),
    }
    cells: dict[str, list[Any]] = {
        "question": ["Who built it?", "When?"],
        "context": [BRIDGE, BRIDGE],
        "ids": [[large, None], [3]],
        "record": [{"id": large}, None],
        "counts": [[("a", large)], None],
        "price": [Decimal("1.20"), None],
    }
    table = pa.table({name: pa.array(cells[name], type=of) for name, of in types.items()})
    pq.write_table(table, source)
    assert answer_command(source, "-o", target).exit_code == 0
    answered = pq.ParquetFile(target).read()
    assert answered.select(table.column_names).cast(table.schema).equals(table)
    assert answered.schema.field("ids").type == types["ids"]
    assert [*parse(answer_command(source).stdout)][1][2:6] == [f"[{large}, None]", f"{{'id': {large}}}", f"[('a', {large})]", "1.20"]


@pytest.mark.parametrize(
    ("column", "what"),
    [
        (pa.array([2**60], pa.timestamp("us")), "the column 'x' has values that cannot be written as text"),
        (pa.array([0], pa.timestamp("s", "Nowhere/At All")), "the column 'x' has values that cannot be written as text"),
        (pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")), "it is not Parquet, or is damaged"),
    ],
    ids=["year 36812", "no such zone", "not UTF-8"],
)
def test_parquet_that_no_csv_can_hold_is_refused_before_it_is_answered(
    answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: pa.Array, what: str
) -> None:
    source = tmp_path / "my.parquet"
    pq.write_table(pa.table({"question": ["Who?"], "context": [BRIDGE], "x": column}), source)
    monkeypatch.setattr(frames, "_answered", None)
    with pytest.raises(InputError, match=f"my.parquet: {what}"):
        frames.answer_file(answerer, source, tmp_path / "out.csv", AnswerOptions(), limits=TABLE_LIMITS)


def test_pandas_own_types_are_written_to_csv_as_pandas_shows_them(tmp_path: Path) -> None:
    source = tmp_path / "my.parquet"
    frame = pd.DataFrame({"question": ["Who built it?"], "context": [BRIDGE], "month": pd.period_range("2020-01", periods=1, freq="M")})
    frame.to_parquet(source)
    assert parse(answer_command(source).stdout)[1][2] == "2020-01"


def test_notes_of_an_old_pandas_are_understood(tmp_path: Path) -> None:
    source, target = tmp_path / "my.parquet", tmp_path / "out.parquet"
    pd.DataFrame({"question": ["Who built it?"], "context": [BRIDGE]}, index=pd.Index([7], name="id")).to_parquet(source)
    table = pq.ParquetFile(source).read()
    notes = table.schema.pandas_metadata
    for note in notes["columns"]:
        del note["field_name"]
    pq.write_table(table.replace_schema_metadata({b"pandas": json.dumps(notes).encode()}), source)
    assert answer_command(source, "-o", target).exit_code == 0
    assert pd.read_parquet(target)["answer"].to_dict() == {7: "Ada Blum"}


def test_alternatives_of_before_are_renamed_like_other_columns(tmp_path: Path) -> None:
    source, once, twice = tmp_path / "my.csv", tmp_path / "once.csv", tmp_path / "twice.parquet"
    source.write_text(f"question,context\nWho built it?,{BRIDGE}\n")
    assert answer_command(source, "-o", once, "--top-k", 2).exit_code == 0
    header = parse(answer_command(once, "--top-k", 2).stdout)[0]
    assert header.count("alternatives") == header.count("input_alternatives") == 1
    assert answer_command(once, "-o", twice, "--top-k", 2).exit_code == 0
    assert answer_command(twice, "--top-k", 2).stdout.splitlines()[0].count("input_input_alternatives") == 1


def test_a_column_that_is_renamed_does_not_lend_its_type_to_the_answers(tmp_path: Path) -> None:
    source, target = tmp_path / "my.parquet", tmp_path / "answered.parquet"
    frame = pd.DataFrame({"question": ["Who built it?"], "context": [BRIDGE], "score": pd.array([3], dtype="Int64")})
    frame.to_parquet(source)
    assert answer_command(source, "-o", target).exit_code == 0
    answered = pd.read_parquet(target)
    assert answered["input_score"].to_list() == [3]
    assert 0 < answered["score"][0] < 1


def test_parquet_and_csv_are_answered_into_each_other(tmp_path: Path) -> None:
    source, parquet, target, direct = (tmp_path / name for name in ("my.csv", "my.parquet", "answered.csv", "direct.csv"))
    source.write_bytes(f'question;context;line\nWho built it?;{BRIDGE};one\n;{BRIDGE};"a\r;b"\n'.encode())
    assert answer_command(source, "-o", direct).exit_code == 0
    assert answer_command(source, "-o", parquet).exit_code == 0
    answered = pd.read_parquet(parquet, dtype_backend="numpy_nullable")
    assert answered["line"].to_list() == ["one", "a\r;b"]
    assert answered["error"].fillna("-").to_list() == ["-", "empty_question"]
    assert answered["score"].dtype == "Float64"
    answered[["question", "context", "line"]].to_parquet(parquet)
    assert answer_command(parquet, "-o", target).exit_code == 0
    assert parse(target.read_bytes().decode()) == parse(direct.read_bytes().decode(), delimiter=";")
    assert answer_command(parquet).stdout_bytes == target.read_bytes()


def test_what_cannot_be_answered_as_parquet_is_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet, twice = tmp_path / "my.parquet", tmp_path / "twice.csv"
    parquet.write_text("question,context\n")
    assert "my.parquet: it is not Parquet, or is damaged; " in str(answer_command(parquet).exception)
    ASKED.rename(columns={"context": "text"}).to_parquet(parquet)
    assert "columns called 'context'" in str(answer_command(parquet).exception)
    ASKED.to_parquet(parquet)
    assert "this is the input" in str(answer_command(parquet, "-o", parquet).exception)
    twice.write_text(f"question,context,a,a\nWho?,{BRIDGE},1,2\n")
    assert "twice.csv: it has several columns 'a'" in str(answer_command(twice, "-o", tmp_path / "out.parquet").exception)
    monkeypatch.setattr("qa_platform.cli.answering.find_spec", lambda name: None)
    assert str(answer_command(parquet).exception) == "Parquet needs pandas and pyarrow and tqdm; pip install 'qa-platform[frames]'"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.parquet", "twice.csv"]


@pytest.mark.parametrize(
    ("header", "options", "what"),
    [
        ("question,context,,", AnswerOptions(), "it has several columns ''"),
        ("question,context,a,a", AnswerOptions(), "it has several columns 'a'"),
    ],
)
def test_a_csv_that_no_frame_can_hold_is_refused_before_its_rows_are_read(
    answerer: Answerer, tmp_path: Path, header: str, options: AnswerOptions, what: str
) -> None:
    source = tmp_path / "my.csv"
    # The rows have an error of their own, which would be found first.
    source.write_text(f'{header}\nWho built it?,{BRIDGE},,\n"never closed')
    with pytest.raises(InputError, match=f"my.csv: {what}"):
        frames.answer_file(answerer, source, tmp_path / "out.parquet", options, limits=TABLE_LIMITS)
    assert [path.name for path in tmp_path.iterdir()] == ["my.csv"]


def test_a_csv_with_as_many_columns_as_an_upload_may_have_is_answered_into_parquet(answerer: Answerer, tmp_path: Path) -> None:
    source, target = tmp_path / "my.csv", tmp_path / "out.parquet"
    # The last one has no name.
    names = ["question", "context", *(f"c{n}" for n in range(COLUMN_LIMIT - 3)), ""]
    source.write_text(";".join(names) + f"\nWho built it?;{BRIDGE}" + ";x" * (COLUMN_LIMIT - 2) + "\n")
    assert frames.answer_file(answerer, source, target, AnswerOptions(), limits=TABLE_LIMITS).answered == 1
    answered = pd.read_parquet(target)
    assert list(answered.columns) == [*names, *ANSWER_COLUMNS]
    assert answered.loc[0, ["c0", "", "answer"]].to_list() == ["x", "x", "Ada Blum"]


def test_a_csv_out_of_a_pipe_is_answered_into_parquet(answerer: Answerer, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "w") as pipe:
        pipe.write(f"question,context\nWho built it?,{BRIDGE}\n")
        pipe.close()
        frames.answer_file(answerer, Path(f"/dev/fd/{reading}"), tmp_path / "out.parquet", AnswerOptions(), limits=TABLE_LIMITS)
    assert pd.read_parquet(tmp_path / "out.parquet")["answer"].to_list() == ["Ada Blum"]


def test_a_bad_row_has_its_reason_and_the_others_have_their_answers(answerer: Answerer) -> None:
    empty: list[object] = [None, float("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), "", " "]
    no_text: list[object] = [3, 2.5, True, b"Who?", ["Who?"], {"q": 1}, pd.Timestamp("2026-01-01"), np.array(["Who?"])]
    bad = [*empty, *no_text, "a\0b", "a\ud800b"]
    expected = [RowReason.EMPTY_QUESTION] * len(empty) + [RowReason.NOT_TEXT] * len(no_text)
    expected += [RowReason.NUL_CHARACTER, RowReason.LONE_SURROGATE]
    frame = pd.DataFrame({"question": [*bad, "Who built the bridge?", np.str_("When?")], "context": BRIDGE})
    answered = frames.answer(frame, model=answerer)
    assert answered["error"][: len(bad)].to_list() == expected
    assert answered["answer"][: len(bad)].isna().all()
    assert answered["score"][: len(bad)].isna().all()
    assert answered["answer"][len(bad) :].to_list() == ["Ada Blum", "1872"]
    assert answered["error"][len(bad) :].isna().all()
    swapped = frames.answer(frame, question="context", context="question", model=answerer)
    assert set(swapped["error"][: len(empty)]) == {RowReason.EMPTY_CONTEXT}


def test_a_frame_has_the_answers_of_the_answered_csv(answerer: Answerer) -> None:
    source = f'question,context,topic\nWho built it?,{BRIDGE},NA\nWhen?,{BRIDGE},\n,{BRIDGE},"a\nb"\n'.encode()
    target = io.BytesIO()
    answer_stream(answerer, io.BytesIO(source), target, AnswerOptions(top_k=2))
    asked = pd.read_csv(io.BytesIO(source), dtype="string")
    answered = frames.answer(asked, model=answerer, top_k=2)
    by_the_csv = pd.read_csv(io.BytesIO(target.getvalue()), dtype=dict(answered.dtypes))
    pd.testing.assert_frame_equal(answered, by_the_csv)
    assert json.loads(answered["alternatives"][0])[0].keys() == {"text", "score", "start", "end"}


class OtherFrame:
    """As of polars."""

    def to_pandas(self) -> pd.DataFrame:
        return ASKED


@pytest.mark.parametrize(
    ("frame", "columns", "what"),
    [
        pytest.param(ASKED, {"question": "ask"}, "no column 'ask'", id="a column is missing"),
        pytest.param(ASKED.assign(score=1, error=""), {}, "the columns score, error already", id="our columns"),
        pytest.param(pd.concat([ASKED, ASKED]), {}, "index has 7 several times", id="duplicate index"),
        pytest.param(ASKED.set_axis(["question", "context", "context"], axis=1), {}, "several columns 'context'", id="duplicate columns"),
        pytest.param(pd.concat({"a": ASKED}, axis=1), {}, "several levels", id="levels"),
        pytest.param("my.csv", {}, "a DataFrame of pandas is needed, and this is str; pandas.read_csv", id="a name"),
        pytest.param(OtherFrame(), {}, r"this is qa_platform_tests.test_frames.OtherFrame; call its to_pandas\(\)", id="other library"),
    ],
)
def test_a_frame_that_would_be_ambiguous_is_refused(frame: pd.DataFrame, columns: dict[str, Hashable], what: str) -> None:
    with pytest.raises(InputError, match=what):
        frames.answer(frame, **columns)  # type: ignore[arg-type]


def test_a_frame_is_answered_inside_a_running_event_loop(answerer: Answerer) -> None:
    async def cell() -> pd.DataFrame:
        return frames.answer(ASKED, model=answerer)

    assert asyncio.run(cell())["answer"].to_list() == ["Ada Blum", "1872"]


def test_a_bar_is_shown_to_somebody_who_looks_at_it(
    answerer: Answerer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames.answer(ASKED, model=answerer)
    monkeypatch.setenv("FORCE_COLOR", "1")
    frames.answer(ASKED, model=answerer, progress=False)
    assert capsys.readouterr() == ("", "")
    frames.answer(ASKED, model=answerer)
    assert "2/2" in capsys.readouterr().err


@pytest.fixture
def environment(postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch) -> PostgresSettings:
    """The environment of an empty database."""
    for name in ("host", "port", "user", "dbname"):
        monkeypatch.setenv(f"PG_{name.upper()}", str(getattr(postgres, name)))
    return postgres


@pytest.fixture
def loaded(environment: PostgresSettings, tmp_path: Path) -> PostgresSettings:
    """A database with two files: three answers, of which one has a low score, and one answer."""
    rows = [
        AnsweredRow("Who?", "Ada built."),
        AnsweredRow("When?", "1872, say.", error=RowReason.LOW_SCORE),
        AnsweredRow("Why?", "For us."),
    ]
    with connect(environment) as connection:
        load_file(connection, AnsweredUpload(rows).write(tmp_path / "history"))
        load_file(connection, AnsweredUpload([AnsweredRow("What?", "A canal.")], name="a, b.csv").write(tmp_path / "other"))
    return environment


@pytest.mark.usefixtures("loaded")
def test_a_file_is_read_with_all_columns_of_the_table_in_the_order_of_its_rows() -> None:
    answers = frames.read_answers(file="history.csv")
    assert tuple(answers.columns) == ANSWERS.names
    assert answers["row_number"].to_list() == [1, 2, 3]
    assert answers["answer"].to_list() == ["Ada", "1872,", "For"]
    assert answers["flag"].to_list() == [pd.NA, "low_score", pd.NA]
    dtypes = answers.dtypes.astype(str)
    assert dtypes[["answer", "score", "answer_end", "generation"]].to_list() == ["string", "Float64", "Int64", "Int64"]
    assert dtypes[["qa_timestamp", "loaded_at"]].to_list() == ["datetime64[us]", "datetime64[us, UTC]"]
    assert answers["qa_timestamp"][0] == pd.Timestamp("2026-03-01T10:00:00")


@pytest.mark.usefixtures("loaded")
def test_a_partition_is_read_by_its_key() -> None:
    key = partition_key("a, b.csv")
    assert key != "a, b.csv"
    answers = frames.read_answers(partition=key, columns=["source_file", "question"])
    assert answers.to_dict("records") == [{"source_file": "a, b.csv", "question": "What?"}]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("where", "questions"),
    [
        ({"model": ANSWERED_BY.id}, ["What?", "Who?", "When?", "Why?"]),
        ({"flag": "low_score"}, ["When?"]),
        ({"flag": None, "source_file": "history.csv"}, ["Who?", "Why?"]),
        ({"flag": pd.NA, "row_number": np.int64(3)}, ["Why?"]),
        ({"score": 0.5, "answer_start": "0", "qa_timestamp": pd.Timestamp("2026-03-01 10:00"), "answer": "For"}, ["Why?"]),
        ({"question": "Who? "}, []),
        ({"question": "Who?' OR '1'='1"}, []),
        ({"question": "%s %(question)s"}, []),
    ],
)
def test_rows_are_chosen_by_the_values_of_their_columns(where: dict[str, object], questions: list[str]) -> None:
    assert frames.read_answers(where=where, columns=["question"])["question"].to_list() == questions


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({}, "nothing says which answers"),
        ({"where": {}}, "nothing says which answers"),
        ({"file": "history.csv", "partition": "history.csv"}, "more than once"),
        ({"file": "history.csv", "where": {"source_file": "a, b.csv"}}, "more than once"),
        ({"file": "histroy.csv"}, "it is not answered"),
        ({"file": ""}, "it is not answered"),
        ({"partition": "a, b.csv"}, "it is not answered"),
        ({"file": "a\0b"}, "cannot hold"),
        ({"where": {"model": "a\ud800"}}, "cannot hold"),
        ({"where": {"model": ["bundled"]}}, "must be one value"),
        ({"where": {"row_number": "1 OR 1=1"}}, "refuses the data"),
        ({"where": {"row_number": 2**70}}, "refuses the data"),
        ({"where": {"1=1); DROP TABLE question_answer; --": "1"}}, "no such column"),
        ({"file": "history.csv", "columns": ["question", 'a" FROM question_file --']}, "no such column"),
    ],
)
def test_what_cannot_be_read_is_refused(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        frames.read_answers(**arguments)
    assert len(frames.read_answers(file="history.csv")) == 3


def test_the_rejected_rows_of_a_file_are_a_frame(environment: PostgresSettings, tmp_path: Path) -> None:
    data = b'question,context\n"two\nlines",c\n ,c\nonly one\nq,c\n'
    with connect(environment) as connection:
        load_file(connection, ingested(data, tmp_path / "file"))
        load_file(connection, ingested(b"question,context\nq,c\n", tmp_path / "good", name="good.csv"))
    rejected = frames.rejected("history.csv")
    assert tuple(rejected.columns) == REPORT_COLUMNS
    assert rejected["line"].to_list() == [4, 5]
    assert rejected["column"].to_list() == ["question", pd.NA]
    assert rejected["reason"].to_list() == ["empty_question", "too_few_cells"]
    assert [str(dtype) for dtype in rejected.dtypes] == ["Int64", "Int64", *["string"] * 4]
    none = frames.rejected("good.csv")
    assert len(none) == 0
    pd.testing.assert_series_equal(none.dtypes, rejected.dtypes)


@pytest.mark.usefixtures("environment")
def test_a_file_that_was_never_seen_has_no_rejected_rows_to_read() -> None:
    with pytest.raises(InputError, match="no such file"):
        frames.rejected("histroy.csv")


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_the_notebook_runs(postgres: PostgresSettings, tmp_path: Path) -> None:
    with connect(postgres) as connection:
        for name in ("lighthouses.csv", "customer_letters.csv"):
            load_file(connection, ingested((PROJECT / "samples" / name).read_bytes(), tmp_path / name, name=name))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "45/45" in printed
    assert "Warning" not in printed
    shown = [output.data for output in outputs if "data" in output]
    assert any("image/png" in data for data in shown)
    assert "empty_question" in shown[0]["text/plain"]
    assert "too_many_cells" in shown[-1]["text/plain"]
