import csv
import dataclasses
import hashlib
import io
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import openvino
import pytest
import torch
from pachyderm_sdk.api.worker import NextDatumRequest, NextDatumResponse

from qa_platform.answering import Answerer
from qa_platform.answering.model import find_model
from qa_platform.answering.shard import answer_shard
from qa_platform.answering.tuned import remember_threshold
from qa_platform.answering.worker import Worker
from qa_platform.contract import (
    ANSWER_COLUMNS,
    MANIFEST,
    SHARD_ANSWERS,
    SHARD_INFO,
    SHARD_QUESTIONS,
    DatumFault,
    ModelChoice,
    Rejection,
    RowReason,
    ShardInfo,
)
from qa_platform.datum_batching import fault_of, serve
from qa_platform.errors import InputError
from qa_platform_tests.answering_models import make_bert, pairs

HEADER = ["id", "Question", "context"]
ROWS = [
    ["1", "Who keeps the lighthouse?", "The lighthouse on Ferris Rock is kept by Marta Olsen, who took over in 1987."],
    ["2", "When did she take over?", "The lighthouse on Ferris Rock is kept by Marta Olsen, who took over in 1987."],
    ["carriage\rreturn", "Where is the lighthouse?", 'A "quoted" word,\r\nand the lighthouse on Ferris Rock.'],
    ["4", "", ""],
    ["5", "   ", "Nobody asked anything."],
    ["6", " ".join(["why"] * 500), "The question does not fit."],
]
REJECTED = Rejection(row=104, line=5, reason=RowReason.LONE_SURROGATE, column="context")


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer("bundled")


def write_shard(folder: Path, rows: list[list[str]] = ROWS, *, claimed: int | None = None, model: ModelChoice | None = None) -> Path:
    folder.mkdir(parents=True)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\r\n").writerows([HEADER, *rows])
    content = text.getvalue().encode()
    (folder / SHARD_QUESTIONS).write_bytes(content)
    info = ShardInfo(
        first_row=101,
        rows=len(rows) if claimed is None else claimed,
        sha256=hashlib.sha256(content).hexdigest(),
        model=model or ModelChoice("bundled"),
        rejections=(REJECTED,) if rows is ROWS else (),
    )
    (folder / SHARD_INFO).write_text(info.to_json())
    return folder


def read_answers(folder: Path) -> list[list[str]]:
    with (folder / SHARD_ANSWERS).open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_answered_rows_keep_their_cells_and_get_ours(answerer: Answerer, tmp_path: Path) -> None:
    answer_shard(answerer, write_shard(tmp_path / "in"), tmp_path / "out")
    header, *rows = read_answers(tmp_path / "out")
    assert header == [*HEADER, *ANSWER_COLUMNS]
    assert [row[:3] for row in rows] == ROWS
    for row in rows[:3]:
        answer, score, start, end, model, error = row[3:]
        assert row[2][int(start) : int(end)] == answer != ""
        assert 0 < float(score) <= 1
        assert (model, error) == ("bundled", "")


def test_rows_that_cannot_be_answered_say_why(answerer: Answerer, tmp_path: Path) -> None:
    info = answer_shard(answerer, write_shard(tmp_path / "in"), tmp_path / "out")
    assert [row[3:] for row in read_answers(tmp_path / "out")[4:]] == [
        ["", "", "", "", "bundled", reason] for reason in ("lone_surrogate", "empty_question", "question_exceeds_window")
    ]
    assert (info.answered, info.no_answer, info.rejected) == (3, 0, 3)


def test_the_shard_says_what_answered_it(answerer: Answerer, tmp_path: Path) -> None:
    info = answer_shard(answerer, write_shard(tmp_path / "in"), tmp_path / "out")
    assert ShardInfo.from_json((tmp_path / "out" / SHARD_INFO).read_bytes()) == info
    assert info.answered_by == answerer.identity
    assert info.answered_by.revision
    assert info.runtime == f"openvino {openvino.__version__}"
    assert (info.first_row, info.rows, info.rejections) == (101, 6, (REJECTED,))


def test_the_shard_says_whether_answers_are_widened_to_words(tmp_path: Path) -> None:
    answerer = Answerer(str(make_bert(tmp_path / "model")), threads=1)
    # Words of several tokens.
    asked = [(question, f"oldkeepers{number} harbourish lighthousekeeper{number}") for number, (question, _) in enumerate(pairs(20))]
    for aligned in (True, False):
        folder = write_shard(tmp_path / f"in-{aligned}", [["1", question, context] for question, context in asked])
        info = ShardInfo.from_json((folder / SHARD_INFO).read_bytes())
        (folder / SHARD_INFO).write_text(dataclasses.replace(info, align_to_words=aligned).to_json())
        assert answer_shard(answerer, folder, tmp_path / f"out-{aligned}").align_to_words is aligned
        expected = [answer.answer for answer in answerer.answer(asked, align_to_words=aligned)]
        assert [row[3] for row in read_answers(tmp_path / f"out-{aligned}")[1:]] == expected
    assert read_answers(tmp_path / "out-True") != read_answers(tmp_path / "out-False")


def test_the_model_says_no_answer_where_the_shards_model_has_a_threshold_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path / "cache"))
    model = ModelChoice(str(make_bert(tmp_path / "model")))
    # What somebody stored on a worker's machine does not count.
    remember_threshold(find_model(model), "cpu", -100.0)
    rows = [["1", question, context] for question, context in pairs(10)]
    worker = Worker(tmp_path)
    for name, threshold, expected in (("without", None, 0), ("low", -100.0, 10), ("high", 100.0, 0)):
        wanted = dataclasses.replace(model, no_answer_threshold=threshold)
        write_shard(tmp_path / "questions" / "file" / name, rows, model=wanted)
        worker.do(f"/pfs/questions/file/{name}")
        done = ShardInfo.from_json((tmp_path / "out" / "file" / name / SHARD_INFO).read_bytes())
        assert (done.answered, done.no_answer) == (10 - expected, expected)
        assert done.model == wanted
        assert done.answered_by
        assert done.answered_by.no_answer_threshold == threshold


def test_a_shard_with_other_rows_than_it_says_is_refused(answerer: Answerer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="6 rows"):
        answer_shard(answerer, write_shard(tmp_path / "in", claimed=7), tmp_path / "out")
    assert not (tmp_path / "out" / SHARD_INFO).exists()


def test_the_worker_finds_absolute_and_relocated_datums(tmp_path: Path) -> None:
    write_shard(tmp_path / "questions" / "some-file" / "part-00000")
    worker = Worker(tmp_path, threads=1)
    worker.do("/pfs/questions/some-file/part-00000")
    assert len(read_answers(tmp_path / "out" / "some-file" / "part-00000")) == 7
    write_shard(tmp_path / "questions" / "some-file" / "part-00001")
    worker.do(str(tmp_path / "questions" / "some-file" / "part-00001"))
    assert len(read_answers(tmp_path / "out" / "some-file" / "part-00001")) == 7


def test_pachyderms_worker_is_asked_by_address_and_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(target: str, options: object) -> None:
        asked.append((target, options))
        raise ConnectionError

    monkeypatch.setattr(grpc, "insecure_channel", refuse)
    with pytest.raises(ConnectionError):
        serve(lambda environment: None, 1234)
    assert asked == [("127.0.0.1:1234", [("grpc.enable_http_proxy", 0)])]


@pytest.mark.parametrize("error", [MemoryError("std::bad_alloc"), RuntimeError("can't start new thread"), OSError(28, "full")])
def test_no_file_is_to_blame_for_a_worker_that_is_too_small(error: Exception) -> None:
    assert fault_of(error).blameless
    assert not fault_of(RuntimeError("something else")).blameless


@pytest.mark.parametrize("datum", ["/pfs/questions/../../elsewhere", "/pfs/out/part-00000", "/elsewhere", "elsewhere"])
def test_the_worker_takes_no_datum_from_elsewhere(tmp_path: Path, datum: str) -> None:
    write_shard(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="it does not lie in"):
        Worker(tmp_path / "pfs", threads=1).do(datum)


def test_the_worker_passes_on_the_manifest_that_the_first_shard_carries(tmp_path: Path) -> None:
    write_shard(tmp_path / "questions" / "some-file" / "part-00000")
    (tmp_path / "questions" / "some-file" / "part-00000" / MANIFEST).write_text('{"not": "looked at"}')
    Worker(tmp_path, threads=1).do("/pfs/questions/some-file/part-00000")
    assert (tmp_path / "out" / "some-file" / MANIFEST).read_text() == '{"not": "looked at"}'
    assert not (tmp_path / "out" / "some-file" / "part-00000" / MANIFEST).exists()


def test_the_worker_says_which_device_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(tmp_path / "questions" / "some-file" / "part-00000")
    with caplog.at_level(logging.INFO):
        Worker(tmp_path, threads=1, device="cpu:0").do("/pfs/questions/some-file/part-00000")
    assert f"by torch {torch.__version__} on cpu:0; QA_DEVICE is cpu:0" in caplog.text


class Datums:
    """A NextDatum service that hands out a list of datums, then blocks, as Pachyderm's worker does."""

    def __init__(self, datums: list[str]) -> None:
        self.datums = iter(datums)
        self.errors: list[str] = []
        self.waiting = threading.Event()
        self.closing = threading.Event()

    def next_datum(self, request: NextDatumRequest, _: grpc.ServicerContext) -> NextDatumResponse:
        self.errors.append(request.error)
        datum = next(self.datums, None)
        if datum is None:
            self.waiting.set()
            self.closing.wait()
            return NextDatumResponse()
        return NextDatumResponse(env=[f"questions={datum}", "PACH_DATUM_ID=x=y"])


def served(datums: Datums) -> tuple[grpc.Server, int]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    method = grpc.unary_unary_rpc_method_handler(datums.next_datum, NextDatumRequest.FromString, bytes)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("pachyderm.worker.Worker", {"NextDatum": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


@pytest.fixture
def datums(tmp_path: Path) -> Iterator[Datums]:
    write_shard(tmp_path / "questions" / "some-file" / "part-00000")
    write_shard(tmp_path / "questions" / "some-file" / "part-00001")
    root = "/pfs/questions/some-file"
    datums = Datums([f"{root}/part-00000", f"{root}/part-00099", f"{root}/part-00001"])
    yield datums
    datums.closing.set()


def run_worker(datums: Datums, root: Path, **variables: str) -> str:
    """Run the worker's process until it has asked for more datums than there are. Returns what it logged."""
    server, port = served(datums)
    environment = {**os.environ, "PPS_WORKER_GRPC_PORT": str(port), "QA_PFS_ROOT": str(root), "QA_THREADS": "1", **variables}
    command = [sys.executable, "-m", "qa_platform.answering.worker"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert datums.waiting.wait(60)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
    datums.closing.set()
    server.stop(0)
    return output


def test_the_worker_process_works_on_datum_after_datum_and_reports_a_broken_one(datums: Datums, tmp_path: Path) -> None:
    output = run_worker(datums, tmp_path)
    assert datums.errors[:2] == ["", ""]
    fault = DatumFault.of_reason(datums.errors[2])
    assert fault is not None
    assert "part-00099" in fault.cause
    assert fault.advice
    assert datums.errors[3] == ""
    assert len(read_answers(tmp_path / "out" / "some-file" / "part-00001")) == 7
    assert "part-00000: 6 rows" in output


def test_without_its_device_the_worker_answers_nothing_and_blames_no_file(datums: Datums, tmp_path: Path) -> None:
    run_worker(datums, tmp_path, QA_DEVICE="cuda:99")
    assert datums.errors[0] == ""
    for error in (datums.errors[1], datums.errors[3]):
        fault = DatumFault.of_reason(error)
        assert fault is not None
        assert fault.blameless
        assert f"device 'cuda:99': torch {torch.__version__} " in fault.cause
        assert "QA_DEVICE, which is cuda:99" in fault.advice
    assert not list(tmp_path.glob("out/**/*.csv"))
