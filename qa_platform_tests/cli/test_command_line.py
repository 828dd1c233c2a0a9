"""The command line for users and scripts: help, exit statuses, output on a terminal and into a pipe."""

import csv
import errno
import gzip
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_platform.batches.contents import contents, rows_done
from qa_platform.cli.main import main
from qa_platform.cli.status import observe
from qa_platform.cli.status.observe import FileState, Observer, ObserverSettings, Snapshot
from qa_platform.cli.status.render import change_line, details, overview
from qa_platform.cli.status.watch import Watch
from qa_platform.cli.terminal import age
from qa_platform.clients import bucket
from qa_platform.clients.pachyderm import pachd_errors, session
from qa_platform.clients.postgres import connect
from qa_platform.contract import FileReason, FileStatus, FileVersion
from qa_platform.errors import TransientError
from qa_platform.ingest import FileRejection
from qa_platform.ledger import FileRecord, Ledger
from qa_platform.loading import migrate
from qa_platform.settings import PachydermSettings, PostgresSettings, WorkSettings
from qa_platform_tests.answering_models import make_bert, make_model
from qa_platform_tests.checkout import PROJECT
from qa_platform_tests.conftest import Database, new_database
from qa_platform_tests.flow import Flow, bridge, csv_of, flow, wait_until
from qa_platform_tests.json_schemas import fits
from qa_platform_tests.processes import until

__all__ = ["flow"]

PROGRAM = [sys.executable, "-m", "qa_platform.cli.main"]
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def tables(postgres_socket: str) -> Iterator[Database]:
    """A database with the tables."""
    with new_database(postgres_socket) as database, pytest.MonkeyPatch.context() as patch:
        for name, value in database.environment.items():
            patch.setenv(name, value)
        migrate.upgrade(PostgresSettings())
        yield database


@pytest.fixture
def place(tables: Database, gcs_address: str, monkeypatch: pytest.MonkeyPatch) -> storage.Bucket:
    """An empty bucket and empty tables, which the environment names; no Pachyderm."""
    client = storage.Client("test", AnonymousCredentials(), client_options={"api_endpoint": f"http://{gcs_address}"})
    opened = client.create_bucket(f"test-{uuid.uuid4().hex}")
    variables = {"STORAGE_BUCKET": opened.name, "STORAGE_EMULATOR_HOST": f"http://{gcs_address}", **tables.environment}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PACHD_ADDRESS", "grpc://127.0.0.1:1")
    with connect(PostgresSettings()) as connection:
        connection.execute("TRUNCATE question_file, question_answer, question_answer_reject")
    return opened


def run(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def upload(place: storage.Bucket, name: str = "my.csv") -> FileVersion:
    return bucket.upload(place, name, io.BytesIO(b"question,context\nWho?,It was Ada.\n"))


def claimed(version: FileVersion) -> None:
    with Ledger(PostgresSettings()) as ledger:
        ledger.claim([version], owner="o", lease_seconds=60)


def begun(version: FileVersion) -> None:
    with Ledger(PostgresSettings()) as ledger:
        ledger.start("o", [version], run_id="r", batch_id="b")


def rejected(version: FileVersion) -> None:
    with Ledger(PostgresSettings()) as ledger:
        ledger.reject_file(version, FileRejection(FileReason.UTF16, "it is UTF-16", line=1))


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


@pytest.mark.parametrize(("path", "command"), list(commands(main)), ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_every_command_has_help_that_is_not_cut_off_and_describes_every_option(path: tuple[str, ...], command: click.Command) -> None:
    shown = run(*path, "--help")
    assert shown.exit_code == 0
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    listed = next(line for line in run(*path[:-1], "--help").output.splitlines() if line.split()[:1] == [path[-1]])
    assert listed.endswith(".")
    assert not listed.endswith("...")


def test_the_help_names_the_exit_statuses() -> None:
    named = {line.split()[0] for line in run("--help").output.splitlines() if line.split()}
    assert {"0", "1", "2", str(os.EX_TEMPFAIL), "130"} <= named


def test_the_exit_status_tells_wrong_use_from_wrong_input_from_what_is_away(place: storage.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("status").exit_code == 0
    assert run("status", "--no-such-option").exit_code == 2
    unknown = run("status", "nowhere.csv")
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert "nowhere.csv" in unknown.stderr
    monkeypatch.setenv("PG_HOST", "/nowhere")
    away = run("status")
    assert away.exit_code == os.EX_TEMPFAIL
    assert "cannot be reached" in away.stderr


def test_a_variable_that_cannot_be_used_is_named_without_its_value(place: storage.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_PORT", "s3cret")
    result = run("status")
    assert result.exit_code == 1
    assert "PG_PORT" in result.stderr
    assert "s3cret" not in result.output
    monkeypatch.delenv("PG_PORT")
    monkeypatch.setenv("QA_SUFFIXES", "csv")
    assert "QA_SUFFIXES: each suffix must begin with a dot" in run("upload", __file__).stderr


@pytest.mark.parametrize("words", [["answers", "my.csv", "--rejected"], ["answer", __file__]])
def test_an_output_in_a_folder_that_does_not_exist_is_refused_by_name(words: list[str]) -> None:
    result = run(*words, "-o", "/nowhere/out.csv")
    assert result.exit_code == 1
    assert "/nowhere/out.csv: the folder /nowhere does not exist" in result.stderr


def test_status_needs_neither_dagster_nor_torch(place: storage.Bucket) -> None:
    code = (
        "import sys; from qa_platform.cli.main import main; main(['status'], standalone_mode=False);"
        "print([m for m in ('dagster', 'torch', 'numpy', 'pachyderm_sdk') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_nothing_is_uploaded_when_one_of_several_cannot_be(place: storage.Bucket, tmp_path: Path) -> None:
    for name in ("a/x.csv", "b/x.csv", "good.csv", "bad.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("question,context\n")
    twice = run("upload", str(tmp_path / "a/x.csv"), str(tmp_path / "b/x.csv"))
    assert twice.exit_code == 2
    assert "x.csv" in twice.stderr
    assert run("upload", str(tmp_path / "good.csv"), str(tmp_path / "bad.txt")).exit_code == 1
    assert list(place.list_blobs()) == []
    assert run("upload", str(tmp_path / "bad.txt"), "--as", "fine.csv").exit_code == 0
    assert [blob.name for blob in place.list_blobs()] == ["incoming/fine.csv"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("two\nlines.csv", "must not contain a line break"),
        (".hidden.csv", "names begin with . or ~ are taken for temporary files"),
        (".csv", "names begin with . or ~ are taken for temporary files"),
        ("~x.csv", "names begin with . or ~ are taken for temporary files"),
        ("x.csv.part", "as are those that end in .part"),
        ("folder/", "must not end with a slash"),
        ("x.txt", "files whose names end in .csv"),
        ("x" * 1012 + ".csv", "must not be longer than 1015 bytes"),
    ],
)
def test_a_name_that_no_upload_may_have_is_refused_with_the_reason(place: storage.Bucket, name: str, why: str) -> None:
    result = run("upload", __file__, "--as", name)
    assert (result.exit_code, list(place.list_blobs())) == (1, [])
    assert why in result.stderr
    assert "--as" in result.stderr


def test_when_an_upload_fails_the_files_after_it_are_named(place: storage.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a.csv", "b.csv", "c.csv")
    for name in names:
        (tmp_path / name).write_text("question,context\n")
    whole = bucket.upload

    def failing(place: storage.Bucket, name: str, source: IO[bytes]) -> FileVersion:
        if name == "b.csv":
            raise TransientError("the bucket cannot be reached")
        return whole(place, name, source)

    monkeypatch.setattr(bucket, "upload", failing)
    result = run("upload", *(str(tmp_path / name) for name in names))
    assert result.exit_code == os.EX_TEMPFAIL
    assert f"not uploaded: {tmp_path / 'c.csv'}\n" in result.stderr
    assert [blob.name for blob in place.list_blobs()] == ["incoming/a.csv"]


@pytest.mark.parametrize(
    "words",
    [
        ["upload", __file__, "--as", ""],
        ["answers", ""],
        ["retry", "a.csv", ""],
        ["status", ""],
        ["forget", ""],
        ["restore", ""],
        ["pachyderm", "logs", ""],
    ],
)
def test_an_empty_name_is_wrong_use(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "a name must not be empty" in result.stderr


def test_a_number_of_jobs_is_at_least_one() -> None:
    assert run("pachyderm", "jobs", "--limit", "-1").exit_code == 2


def test_without_credentials_a_command_says_so(place: storage.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    result = run("upload", __file__, "--as", "x.csv")
    assert result.exit_code == 1
    assert "Google's client finds no credentials (File /nowhere/key.json was not found.)" in result.stderr
    assert "gcloud auth application-default login" in result.stderr


def test_a_pachd_that_is_away_is_named_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACHD_ADDRESS", "grpc://127.0.0.1:1")
    result = run("pachyderm", "status")
    assert result.exit_code == os.EX_TEMPFAIL
    assert "pachd cannot be reached at grpc://127.0.0.1:1" in result.stderr


def test_a_bucket_that_is_missing_or_away_is_an_error_without_a_traceback(place: storage.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_BUCKET", "no-such-bucket")
    result = run("upload", __file__, "--as", "x.csv")
    assert result.exit_code == 1
    assert "STORAGE_BUCKET" in result.stderr
    shown = run("status")
    assert shown.exit_code == 0
    assert "not known: uploads that the sensor has not seen" in shown.output


def test_a_bucket_that_refuses_for_good_ends_a_command_with_what_to_do(
    place: storage.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"question,context\nWhere?,Here.\n")
    bucket = place.client.get_bucket(place.name)
    bucket.requester_pays = True
    bucket.patch()
    refused = run("upload", str(file))
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "set QA_BILLING_PROJECT" in refused.stderr
    monkeypatch.setenv("QA_BILLING_PROJECT", "billing-project")
    assert run("upload", str(file)).exit_code == 0


def test_status_says_why_a_file_is_not_archived(place: storage.Bucket) -> None:
    version = upload(place, "kept.csv")
    rejected(version)
    with Ledger(PostgresSettings()) as ledger:
        ledger.record_archive_failure(version, error="Object is under active Temporary hold; release it", work=WorkSettings())
    shown = run("status", "kept.csv")
    assert "stays in incoming/ for now: Object is under active Temporary hold; release it" in shown.stdout


def test_a_limit_is_said_to_hold_for_the_files_that_are_done(place: storage.Bucket) -> None:
    for name in ("a.csv", "b.csv"):
        rejected(upload(place, name))
    upload(place, "c.csv")
    shown = run("status", "--limit", "1")
    assert len(shown.stdout.splitlines()) == 1 + 2 + 1, "the head, a rejected file with its reason, and the upload"
    assert "only the newest 1 are shown, and those in progress" in shown.stderr


def test_status_shows_an_upload_before_any_sensor_has_seen_it(place: storage.Bucket) -> None:
    version = upload(place)
    assert run("status").stdout.splitlines()[1].split() == ["my.csv", "uploaded"]
    assert "the sensor has not seen it" in run("status", "my.csv").stdout
    (line,) = run("status", "--json").stdout.splitlines()
    assert json.loads(line) == {
        "version": {"name": "my.csv", "generation": version.generation, "size": version.size, "crc32c": version.crc32c, "md5": version.md5},
        "status": "uploaded",
        "rows_done": None,
        "rows_total": None,
    }
    assert fits("status", line)


def test_a_watch_into_a_pipe_writes_a_line_per_change_and_ends_with_the_work(place: storage.Bucket, tmp_path: Path) -> None:
    version = upload(place)
    out = tmp_path / "out"
    with out.open("wb") as target, subprocess.Popen([*PROGRAM, "status", "--watch"], stdout=target, stderr=target) as process:
        for state, change in (("uploaded", claimed), ("pending", begun), ("reading", rejected)):
            until(partial(tells, out, f"my.csv: {state}", process))
            change(version)
        assert process.wait(30) == 1
    *lines, last = out.read_text().splitlines()
    assert [line.split(" ", 1)[1].partition(":")[2].split(":")[0].strip() for line in lines] == [
        "uploaded",
        "pending",
        "reading",
        "rejected",
    ]
    assert all(datetime.fromisoformat(line.split()[0]).tzinfo for line in lines)
    assert last == "nothing is in progress: 1 rejected"
    assert "\x1b" not in out.read_text()


def tells(out: Path, text: str, process: "subprocess.Popen[Any]") -> bool:
    return text in out.read_text() or process.poll() is not None


def test_a_watch_of_nothing_ends_at_once(place: storage.Bucket) -> None:
    result = run("status", "--watch")
    assert (result.exit_code, result.stdout) == (0, "nothing is in progress\n")


def test_a_watch_does_not_end_before_the_bucket_could_be_asked_unless_it_never_can(
    place: storage.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "_FAILED_BACKOFF_SECONDS", 0.0)
    upload(place)
    with monkeypatch.context() as away:
        away.setattr(observe, "_TIMEOUT_SECONDS", 0.0)
        watch = Watch(Observer(ObserverSettings.from_environment()))
        watch.look()
        assert not watch.over
        assert "no answer" in watch.snapshot.problems[0]
    assert [file.state for file in watch.look()] == ["uploaded"]
    assert not watch.over
    monkeypatch.setenv("STORAGE_BUCKET", "no-such-bucket")
    refused = Watch(Observer(ObserverSettings.from_environment()))
    refused.look()
    assert refused.over


def test_a_watch_as_json_writes_an_object_per_change(place: storage.Bucket) -> None:
    rejected(upload(place))
    result = run("status", "my.csv", "--watch", "--json")
    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["status"] == "rejected"
    assert fits("status", line)


def test_ctrl_c_ends_a_watch_on_a_terminal_without_a_traceback_and_gives_the_cursor_back(place: storage.Bucket) -> None:
    upload(place, "a name " * 20 + ".csv")
    shown, status = on_a_terminal("status", "--watch", until_shown="uploaded")
    assert status == 130
    assert "interrupted" in shown
    assert "Traceback" not in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "…" in shown


def test_colours_are_for_terminals_that_want_them(place: storage.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(place)
    assert "\x1b[33m" in on_a_terminal("status")[0]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33m" not in on_a_terminal("status")[0]


def test_standard_input_and_pipes_are_uploaded(place: storage.Bucket, tmp_path: Path) -> None:
    content = b"question,context\nWho?,Ada.\n"
    assert "give it one with --as" in run("upload", "-").stderr
    result = CliRunner().invoke(main, ["upload", "-", "--as", "piped.csv"], input=content)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"- -> gs://{place.name}/incoming/piped.csv (generation ")
    os.mkfifo(tmp_path / "fifo.csv")
    writer = threading.Thread(target=(tmp_path / "fifo.csv").write_bytes, args=[content])
    writer.start()
    assert run("upload", str(tmp_path / "fifo.csv")).exit_code == 0
    writer.join()
    for name in ("piped.csv", "fifo.csv"):
        assert place.blob(f"incoming/{name}").download_as_bytes() == content


def test_uploads_show_a_bar_on_a_terminal_only(place: storage.Bucket, tmp_path: Path) -> None:
    path = tmp_path / "bar.csv"
    path.write_text("question,context\n" + "Who?,It was Ada.\n" * 10_000)
    # Taken for markup, this name would be an error.
    shown, status = on_a_terminal("upload", str(path), "--as", "[/b].csv")
    assert status == 0
    assert "━" in shown
    assert "[/b].csv" in shown
    assert run("upload", str(path)).stderr.splitlines() == ["`qa-platform status --watch` follows it"]


def test_answering_and_evaluating_show_a_bar_on_a_terminal_only(tmp_path: Path) -> None:
    model = make_bert(tmp_path / "[red]model")
    gold = tmp_path / "gold.csv"
    gold.write_text("question,context,answers\n" + 'Who built it?,It was built by Ada.,"[""Ada""]"\n' * 200)
    target = tmp_path / "answered.csv"
    answering = ("answer", str(gold), "-o", str(target), "--model", str(model))
    shown, status = on_a_terminal(*answering)
    assert status == 0
    assert "━" in shown
    assert "200 rows" in shown
    target.unlink()
    assert "━" not in run(*answering).stderr
    shown, status = on_a_terminal("evaluate", str(gold), "--model", str(model))
    assert status == 0
    assert "━" in shown
    assert "200 questions" in shown
    # What looks like markup in the model's name is no markup.
    assert "[red]model" in shown.replace("\r\n", "")


def test_messages_are_not_obeyed_by_a_terminal() -> None:
    result = run("answer", "samples/lighthouses.csv", "--model", "/nowhere/\x1b]0;forged\x07")
    assert result.exit_code == 1
    assert "\x1b" not in result.stderr
    assert r"\x1b]0;forged\x07" in result.stderr


HOSTILE = "a\u2028b\u2029c\u202ed\u2066e\x1b[2Jf\x9bg\x7fh\ti.csv"
ESCAPED = r"a\u2028b\u2029c\u202ed\u2066e\x1b[2Jf\x9bg\x7fh\ti.csv"


def test_a_name_is_shown_escaped_by_every_command(place: storage.Bucket, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"question,context\n")
    shown = [run("upload", str(tmp_path / "x.csv"), "--as", HOSTILE), run("status"), run("status", HOSTILE)]
    version = bucket.find_incoming(place, HOSTILE)
    assert version is not None
    begun(version)
    shown += [run("status"), run("answers", HOSTILE), run("answers", HOSTILE, "--rejected"), run("retry", HOSTILE + "?")]
    rejected(version)
    shown += [run("status", HOSTILE), run("retry", HOSTILE)]
    outputs = [result.output + result.stderr for result in shown]
    assert [text for text in outputs if not text.replace("\n", "").isprintable()] == []
    assert all(ESCAPED in text for text in [outputs[0], outputs[1], *outputs[3:8], outputs[8]])
    (line,) = run("status", "--json").stdout.splitlines()
    assert line.isprintable()
    assert json.loads(line)["version"]["name"] == HOSTILE


@pytest.mark.parametrize(
    "words",
    [
        ["upload", b"\xff.csv"],
        ["upload", "x.csv", "--as", b"x/\xff.csv"],
        ["upload", "x.csv", b"\xff.csv"],
        ["answers", b"\xff.csv"],
        ["answers", "--rejected", b"\xff.csv"],
        ["retry", "x.csv", b"\xff.csv"],
        ["status", b"\xff.csv"],
        ["status", "--watch", b"\xff.csv"],
        ["pachyderm", "logs", b"\xff"],
        ["pachyderm", "apply", "--tag", b"\xff"],
    ],
)
def test_a_name_that_is_not_utf8_is_wrong_use_before_anything_is_asked(tmp_path: Path, words: list[str | bytes]) -> None:
    for name in (b"x.csv", b"\xff.csv"):
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_bytes(b"question,context\n")
    # No service is configured, and none could be reached.
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": ":".join(sys.path),
        "PYTHONUTF8": "1",
        "STORAGE_EMULATOR_HOST": "http://127.0.0.1:1",
    }
    command = [sys.executable, "-m", "qa_platform.cli.main", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert b"is not UTF-8" in done.stderr
    assert b"\\udcff" in done.stderr
    assert done.stdout == b""


def test_a_file_whose_own_name_is_not_utf8_is_uploaded_under_another(place: storage.Bucket, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv"))
    path.write_bytes(b"question,context\n")
    result = run("upload", str(path), "--as", "fine.csv")
    assert result.exit_code == 0
    assert "\\udcff.csv -> gs://" in result.output
    assert bucket.find_incoming(place, "fine.csv")


@pytest.mark.parametrize(("path", "command"), list(commands(main)))
def test_no_command_takes_a_text_that_might_not_be_utf8(path: tuple[str, ...], command: click.Command) -> None:
    texts = [p.name for p in command.params if p.type is click.STRING]
    assert set(texts) <= {"model", "revision", "device"}, "use cli.arguments.NAME"


def on_a_terminal(*words: str, until_shown: str | None = None) -> tuple[str, int]:
    """What a command shows on a terminal of 80 columns, and its exit status; Ctrl-C is pressed once ``until_shown`` is shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="80", LINES="24")
        os.execv(sys.executable, [*PROGRAM, *words])
    shown = ""
    try:
        while part := os.read(terminal, 65536).decode(errors="replace"):
            shown += part
            if until_shown and until_shown in shown:
                until_shown = None
                os.write(terminal, b"\x03")
    except OSError:
        # The other end is closed.
        pass
    finally:
        os.close(terminal)
    return shown, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_was_rejected_is_told_with_what_to_do(place: storage.Bucket, tmp_path: Path) -> None:
    rejected(upload(place))
    header, record = csv.reader(io.StringIO(run("answers", "my.csv", "--rejected").stdout))
    assert dict(zip(header, record, strict=True))["reason"] == "utf16"
    assert "UTF-8" in dict(zip(header, record, strict=True))["what_to_do"]
    target = tmp_path / "rejected.csv"
    assert run("answers", "my.csv", "--rejected", "-o", str(target)).exit_code == 0
    assert target.read_text().startswith("line,row,column,reason")
    assert run("answers", "other.csv", "--rejected", "-o", str(tmp_path / "none.csv")).exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rejected.csv"]
    assert "rejected.parquet: this is CSV" in run("answers", "my.csv", "--rejected", "-o", str(tmp_path / "rejected.parquet")).stderr
    # From such a file `qa-platform answer -o rejected.csv` continues.
    other = tmp_path / "rejected.csv.partial"
    other.write_text("answered rows")
    assert run("answers", "my.csv", "--rejected", "-o", str(target)).exit_code == 0
    assert other.read_text() == "answered rows"
    refused = run("answers", "my.csv")
    assert "my.csv: it is not answered: it was rejected; see `qa-platform status my.csv`" in refused.stderr


def test_files_are_retried_all_or_none(place: storage.Bucket) -> None:
    versions = [upload(place, name) for name in ("a.csv", "b.csv")]
    for version in versions:
        rejected(version)
    assert run("retry", "a.csv", "nowhere.csv").exit_code == 1
    with Ledger(PostgresSettings()) as ledger:
        assert {r.status for r in ledger.records(versions).values()} == {FileStatus.REJECTED}
    done = run("retry", "a.csv", "b.csv", "a.csv")
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, 2)
    with Ledger(PostgresSettings()) as ledger:
        assert {r.status for r in ledger.records(versions).values()} == {FileStatus.PENDING}


def test_a_reader_that_goes_away_is_not_taken_for_pachd_going_away() -> None:
    with pytest.raises(BrokenPipeError), pachd_errors("fetching"):
        raise BrokenPipeError


def record(name: str, status: FileStatus, error: str = "", rows: int = 0) -> FileRecord:
    done = status in (FileStatus.LOADED, FileStatus.FINISHED)
    return FileRecord(
        version=FileVersion(name, 1),
        status=status,
        load_id=1,
        rows=rows,
        answered=rows,
        no_answer=0,
        rejected=0,
        claim_owner="",
        attempts=0,
        due=True,
        was_deferred=False,
        wanted_model="m",
        wanted_revision="",
        wanted_precision="",
        model="",
        model_revision="",
        model_precision="",
        place=f"incoming/{name}",
        pachyderm_commit="",
        pachyderm_job="",
        batch_id="",
        dagster_run="",
        created_at=NOW - timedelta(days=3),
        started_at=NOW - timedelta(hours=1),
        answered_at=None,
        loaded_at=NOW if done else None,
        archived_at=None,
        error=error,
    )


@st.composite
def states(draw: st.DrawFn) -> FileState:
    name = draw(st.text(min_size=1, max_size=200))
    if draw(st.booleans()):
        return FileState(FileVersion(name, 1))
    total = draw(st.integers(0, 10**8))
    made = record(name, draw(st.sampled_from(FileStatus)), draw(st.text(max_size=300)), rows=total)
    made = replace(made, archive_error=draw(st.text()), csv_error=draw(st.text()), place=draw(st.text()), model=draw(st.text()))
    return FileState(made.version, made, draw(st.none() | st.just((total // 2, total))))


@settings(max_examples=40, deadline=None)
@given(st.lists(states(), max_size=8), st.none() | st.integers(4, 30))
def test_whatever_names_and_errors_hold_the_overview_fits_and_obeys_nobody(files: list[FileState], height: int | None) -> None:
    snapshot = Snapshot(NOW, tuple(files), ("a problem " * 20,))
    lines = overview(snapshot, width=80, height=height)
    assert max(line.cell_len for line in lines) <= 80
    assert all(line.plain.isprintable() for line in lines)
    assert height is None or len(lines) <= max(height, 5)
    unbounded = [line.plain for line in overview(snapshot, width=None)] + [change_line(file, NOW) for file in files]
    assert all(line.isprintable() for line in unbounded)
    for file in files:
        assert all(line.plain.isprintable() for line in details(Snapshot(NOW, (file,)), width=80))


def test_the_details_of_a_file_say_how_many_blank_rows_were_skipped() -> None:
    shown: dict[int | None, list[str]] = {}
    for blank in (None, 0, 2):
        made = replace(record("a.csv", FileStatus.FINISHED), blank=blank)
        shown[blank] = [str(line) for line in details(Snapshot(NOW, (FileState(made.version, made),)), width=80) if "blank" in str(line)]
    assert shown == {None: [], 0: [], 2: ["blank rows, skipped: 2"]}


def test_what_is_in_progress_is_shown_first_where_not_all_fits_and_long_messages_say_where_the_rest_is() -> None:
    files = [FileState(FileVersion(f"old-{n}.csv", 1), record(f"old-{n}.csv", FileStatus.FINISHED, rows=7)) for n in range(50)]
    files.append(FileState(FileVersion("busy.csv", 1), record("busy.csv", FileStatus.RUNNING), (1200, 4000)))
    lines = [line.plain for line in overview(Snapshot(NOW, tuple(files)), width=80, height=10)]
    assert lines[1].split() == ["busy.csv", "reading", "1200/4000", "60m"]
    assert lines[-1] == f"… and {51 - (len(lines) - 2)} more"
    failed = record("bad.csv", FileStatus.FAILED, "a reason that is long " * 20)
    lines = [line.plain for line in overview(Snapshot(NOW, (FileState(failed.version, failed),)), width=80)]
    assert lines[2].endswith("…")
    assert "qa-platform status FILE" in lines[3]


def test_names_that_differ_at_their_ends_are_told_apart_when_cut() -> None:
    names = [f"export_of_the_customer_relationship_system_of_2026_part_{n:06d}.csv" for n in range(3)]
    files = tuple(FileState(FileVersion(name, 1), record(name, FileStatus.FINISHED, rows=10)) for name in names)
    lines = [line.plain for line in overview(Snapshot(NOW, files), width=80)]
    assert len({line.split()[0] for line in lines[1:]}) == 3


@pytest.mark.parametrize(("seconds", "text"), [(-5, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (2 * 86_400, "2d")])
def test_ages_are_short(seconds: int, text: str) -> None:
    assert age(timedelta(seconds=seconds)) == text


def test_ctrl_c_ends_a_watch_into_a_pipe_without_a_traceback(place: storage.Bucket) -> None:
    upload(place)
    with subprocess.Popen([*PROGRAM, "status", "--watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert "uploaded" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_command_leaves_no_unfinished_file(tmp_path: Path, number: signal.Signals) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"question": ["Who?"] * 20_000, "context": [f"It is Ada {n}." for n in range(20_000)]}), source)
    command = [*PROGRAM, "answer", str(source), "-o", str(tmp_path / "out.parquet"), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: any(tmp_path.glob("*.unfinished")), "the output is begun")
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_command_works_also_where_its_output_is_closed(tmp_path: Path, closed: str) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("question,context\nWho?,It is Ada.\n")
    words = shlex.join([*PROGRAM, "answer", str(source), "-o", str(target), "--threads", "1"])
    subprocess.run(["sh", "-c", f"{words} {closed}"], check=True, capture_output=True)
    assert target.read_text().startswith("question,context,answer")


def test_rows_that_nobody_can_read_are_an_error(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("question,context\nWho?,It is Ada.\n")
    words = shlex.join([*PROGRAM, "answer", str(source), "--threads", "1"])
    done = subprocess.run(["sh", "-c", f"{words} >&-"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "Error: standard output is closed; redirect it, or name a file with -o")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["answer", "--help"], ["completion"]])
def test_what_is_only_said_is_dropped_where_nobody_can_read_it(words: list[str]) -> None:
    done = subprocess.run(["sh", "-c", f"{shlex.join([*PROGRAM, *words])} >&-"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_is_forgotten_also_where_dagster_is_not_installed() -> None:
    program = "import sys; sys.modules['dagster'] = None; from qa_platform.cli.main import main; main(['forget', 'a.csv', '--no-dagster'])"
    environment = {**os.environ, "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9", "PG_HOST": "127.0.0.1", "PG_PORT": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False, capture_output=True, text=True)
    assert (done.returncode, "PostgreSQL cannot be reached" in done.stderr) == (os.EX_TEMPFAIL, True), done.stderr


@pytest.mark.slow
def test_the_rows_that_are_done_are_those_of_the_datums_that_are(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_SHARD_ROWS", "2")
    version = flow.upload("measured.csv", csv_of(*(bridge(f"Ort {n}") for n in range(5))))
    flow.tick_and_run()
    commit = flow.record(version).pachyderm_commit
    with session(PachydermSettings(), "measuring") as client:
        batch = contents(client, commit)
        assert sum(rows_done(client, commit, batch).values()) == 5
    with connect(PostgresSettings()) as connection:
        connection.execute("UPDATE question_file SET status = 'running' WHERE source_file = %s", [version.name])
        try:
            (file,) = Observer(ObserverSettings.from_environment(), version.name).snapshot().files
        finally:
            connection.execute("UPDATE question_file SET status = 'finished' WHERE source_file = %s", [version.name])
    assert file.progress == (5, 5)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What `answers` writes, without any service."""
    content = b"question,answer\n"
    monkeypatch.setattr("qa_platform.cli.files._write_answers", lambda file, target, *, rejected: target.write(content))
    return content


def test_answers_are_written_into_a_device_or_a_pipe_which_stays_one(written: bytes, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Both ends, so that neither side waits.
    reading = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        assert run("answers", "a.csv", "-o", str(pipe)).exit_code == 0
        assert os.read(reading, 1000) == written
    finally:
        os.close(reading)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_answers_are_written_into_the_file_that_a_link_points_to(written: bytes, tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "there.csv")
    assert run("answers", "a.csv", "-o", str(tmp_path / "link.csv")).exit_code == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "there.csv").read_bytes() == written


def test_answers_are_gzip_where_the_name_says_so(written: bytes, tmp_path: Path) -> None:
    packed = tmp_path / "a.csv.gz"
    contents = set()
    for _ in range(2):
        assert run("answers", "a.csv", "-o", str(packed)).exit_code == 0
        contents.add(packed.read_bytes())
    assert [gzip.decompress(content) for content in contents] == [written]


def test_a_dash_is_standard_output(written: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("answers", "a.csv", "-o", "-").stdout_bytes == written
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_answer_in_gzip_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, questions, packed = make_model("bert", tmp_path / "model"), tmp_path / "questions.csv", tmp_path / "out.csv.gz"
    questions.write_text("question,context\n" + "".join(f"Who is number {n}?,Number {n} is Ada.\n" for n in range(300)))
    done: list[bool] = []

    @contextmanager
    def bar(total: int, *, unit: str, shown: bool) -> Iterator[Callable[..., None]]:
        def advance(size: int, *, skipped: bool = False) -> None:
            done.append(skipped)
            if len(done) == 200:
                raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr("qa_platform.cli.answering._progress", bar)
    command = ["answer", str(questions), "--model", str(model), "-o", str(packed)]
    stopped = CliRunner().invoke(main, command)
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("stopped; the same command continues from here\n")
    assert not packed.exists()
    done[:] = [False] * 200
    assert CliRunner().invoke(main, command).exit_code == 0
    assert done[200:].count(True) >= 100
    rows = list(csv.reader(io.StringIO(gzip.decompress(packed.read_bytes()).decode())))
    assert [row[0] for row in rows[1:]] == [f"Who is number {n}?" for n in range(300)]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "questions.csv", "out.csv.gz"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["Ctrl-C", "full disk"])
def test_an_answer_whose_packing_failed_is_packed_by_the_next_run_and_no_row_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model, questions, packed = make_model("bert", tmp_path / "model"), tmp_path / "questions.csv", tmp_path / "out.csv.gz"
    questions.write_text("question,context\n" + "".join(f"Who is number {n}?,Number {n} is Ada.\n" for n in range(30)))
    done: list[bool] = []

    @contextmanager
    def bar(total: int, *, unit: str, shown: bool) -> Iterator[Callable[..., None]]:
        yield lambda size, *, skipped=False: done.append(skipped)

    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr("qa_platform.cli.answering._progress", bar)
    command = ["answer", str(questions), "--model", str(model), "-o", str(packed)]
    with monkeypatch.context() as failing:
        failing.setattr(gzip.GzipFile, "write", fail)
        assert CliRunner().invoke(main, command).exit_code != 0
    left = {path.name for path in tmp_path.iterdir()}
    assert done == [False] * 30
    assert CliRunner().invoke(main, command).exit_code == 0
    assert done[30:] == [True] * 30
    rows = list(csv.reader(io.StringIO(gzip.decompress(packed.read_bytes()).decode())))
    assert [row[0] for row in rows[1:]] == [f"Who is number {n}?" for n in range(30)]
    assert left == {"model", "questions.csv", "out.csv.gz.partial", "out.csv.gz.partial.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "questions.csv", "out.csv.gz"}


@pytest.mark.parametrize("module", ["openvino", "tokenizers"])
def test_a_command_without_its_packages_names_the_extra_that_brings_them(module: str) -> None:
    program = f"import sys; sys.modules[{module!r}] = None; from qa_platform.cli.main import main; main(['tune'])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"Error: this command needs {module}, which is not installed; pip install 'qa-platform[worker]'\n"


def test_a_model_that_needs_torch_says_so_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, questions = make_model("deberta", tmp_path / "model"), tmp_path / "questions.csv"
    questions.write_text("question,context\nWho?,Ada.\n")
    monkeypatch.delitem(sys.modules, "qa_platform.answering.runtimes.torch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(main, ["answer", str(questions), "--model", str(model), "-o", str(tmp_path / "answers.csv")])
    assert result.exit_code == 1
    assert "deberta on cpu needs torch, which is not installed" in result.output
    assert "pip install 'qa-platform[torch]'" in result.output


def test_a_wait_ends_when_no_upload_is_in_progress_and_says_why_one_has_no_answers(place: storage.Bucket, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("bad.csv", "gone.csv")]
    for path in paths:
        path.write_text("question,context\nWho?,It was Ada.\n")
    upload(place, "other.csv")
    out = tmp_path / "out"
    with out.open("wb") as target:
        waiting = subprocess.Popen([*PROGRAM, "upload", *map(str, paths), "--wait"], stdout=target, stderr=subprocess.PIPE, text=True)
        with waiting as process:
            until(partial(tells, out, "gone.csv: uploaded", process))
            bad, gone = (bucket.find_incoming(place, path.name) for path in paths)
            assert bad
            assert gone
            rejected(bad)
            place.blob(f"incoming/{gone.name}").delete()
            _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out.read_text().splitlines()[-1] == "1 superseded, 1 rejected"
    assert "other.csv" not in out.read_text(), "of others nothing is told, nor waited for"
    reasons = dict(line.split(": ", 1) for line in said.splitlines())
    assert reasons["bad.csv"].startswith("rejected: utf16")
    assert reasons["gone.csv"] == "superseded: it was overwritten or deleted before a sensor saw it"


def test_a_wait_that_times_out_says_where_each_upload_stands(place: storage.Bucket, tmp_path: Path) -> None:
    path = tmp_path / "my.csv"
    path.write_text("question,context\nWho?,It was Ada.\n")
    result = run("upload", str(path), "--wait", "--timeout", "0")
    assert result.exit_code == 1
    assert result.stderr == "my.csv: uploaded: the time is up; it will still be answered\n"
    assert run("upload", str(path), "--timeout", "1").exit_code == 2


def test_ctrl_c_ends_a_wait_and_leaves_the_upload(place: storage.Bucket, tmp_path: Path) -> None:
    path = tmp_path / "my.csv"
    path.write_text("question,context\nWho?,It was Ada.\n")
    shown, status = on_a_terminal("upload", str(path), "--wait", until_shown="uploaded")
    assert status == 130
    assert "the uploads stay, and will be answered" in shown
    assert "Traceback" not in shown
    assert bucket.find_incoming(place, "my.csv")


@pytest.mark.slow
@pytest.mark.parametrize("state", ["finished", "unchanged"])
def test_a_wait_for_an_upload_that_is_answered_is_a_success(flow: Flow, tmp_path: Path, state: str) -> None:
    path = tmp_path / "waited.csv"
    path.write_bytes(csv_of(bridge("Ulm")))
    out = tmp_path / "out"
    with out.open("wb") as target, subprocess.Popen([*PROGRAM, "upload", str(path), "--wait"], stdout=target) as process:
        until(partial(tells, out, "waited.csv: uploaded", process))
        until(lambda: not flow.tick_and_run() and process.poll() is not None)
    assert process.returncode == 0
    assert out.read_text().splitlines()[-1] == f"1 {state}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_tells_how_a_shell_gets_its_script(shell: str) -> None:
    shown = run("completion").stdout
    assert f"_QA_PLATFORM_COMPLETE={shell}_source qa-platform" in shown
    script = CliRunner().invoke(main, prog_name="qa-platform", env={"_QA_PLATFORM_COMPLETE": f"{shell}_source"})
    assert f"_QA_PLATFORM_COMPLETE={shell}_complete" in script.stdout


def completed(word: str) -> list[str]:
    environment = {"_QA_PLATFORM_COMPLETE": "bash_complete", "COMP_WORDS": f"qa-platform status {word}", "COMP_CWORD": "2"}
    done = CliRunner().invoke(main, prog_name="qa-platform", env=environment)
    assert done.stderr == ""
    return done.stdout.split()


def test_files_of_the_ledger_are_completed_unless_a_shell_would_obey_their_names(
    place: storage.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("my.csv", "more/m.csv", "m;reboot;.csv", "m$(reboot).csv", "m\nplain,x.csv", "m x.csv", "other.csv"):
        claimed(FileVersion(name, 1))
    assert sorted(completed("m")) == ["plain,more/m.csv", "plain,my.csv"]
    monkeypatch.setenv("PG_HOST", "/nowhere")
    assert completed("m") == []


def test_variables_that_help_texts_name_exist() -> None:
    page = (PROJECT / "docs" / "configuration.md").read_text()
    named = {name for text in help_texts() for name in re.findall(r"\bQA[A-Z_]*_[A-Z_]+\b", text)}
    assert "QA_PIPELINES_WORKERS" in named
    # `local run` sets it, for programs that are not the platform's.
    assert [name for name in sorted(named - {"QA_DATABASE_URL"}) if f"`{name}`" not in page] == []


def help_texts(command: click.Command = main, path: tuple[str, ...] = ()) -> Iterator[str]:
    yield CliRunner().invoke(main, [*path, "--help"]).output
    for name, inner in getattr(command, "commands", {}).items():
        yield from help_texts(inner, (*path, name))


@pytest.mark.parametrize("words", [["status"], ["answer", "q.csv", "--model", "nobody/none"]])
def test_a_forgotten_embedded_stack_is_named_by_commands_that_need_services_only(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith(("PG_", "PACH"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.csv").write_text("question,context\nWho?,Ada.\n")

    def unavailable(*_: object, **__: object) -> NoReturn:
        raise TransientError("it is unavailable")

    monkeypatch.setattr("qa_platform.clients.postgres.connect", unavailable)
    monkeypatch.setattr("qa_platform.ledger.connection.connect", unavailable)
    monkeypatch.setattr("qa_platform.answering.engine.find_model", unavailable)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == os.EX_TEMPFAIL, result.output
    assert ("qa-platform local run -- " in result.output) == (words == ["status"])
