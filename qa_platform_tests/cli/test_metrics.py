"""`qa-platform metrics` against real servers: its values match the uploads, and an unavailable service hides no other metrics."""

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest
import yaml  # type: ignore[import-untyped]
from click.testing import CliRunner
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from qa_platform.batches.pending import archive_done
from qa_platform.cli.doctor import certificates
from qa_platform.cli.doctor.findings import State
from qa_platform.cli.main import main
from qa_platform.cli.metrics.exporter import Exporter
from qa_platform.cli.metrics.readings import READINGS, SERVICES
from qa_platform.clients.postgres import connect
from qa_platform.contract import ANSWER_PIPELINE, HEARTBEAT_ASSET, LOAD_PIPELINE, FileStatus, FileVersion
from qa_platform.ledger import Ledger
from qa_platform.loading.load import load_file
from qa_platform.provisioning.project_files import project_file
from qa_platform.settings import DagsterSettings, PostgresSettings, WorkSettings
from qa_platform_tests.checkout import PROJECT
from qa_platform_tests.credentials import certificate, private_key
from qa_platform_tests.flow import Flow, bridge, csv_of, flow, wait_until
from qa_platform_tests.ledger.helpers import A1, B1, C1, charge, claimed_by_run
from qa_platform_tests.loading_helpers import AnsweredUpload, answered_rows

__all__ = ["flow"]

SECRET = "planted-Pa55word-77f3"
ALERTS = PROJECT / "deploy" / "monitoring" / "alerts.yaml"
BOARD = PROJECT / "deploy" / "monitoring" / "board.json"
ALL = {"postgres", "bucket", "pachd", "dagster", "files", "recent", "jobs", "certificates"}

Samples = dict[str, dict[tuple[str, ...], float]]


def samples(families: Iterator[Metric]) -> Samples:
    """The values, by the metric's name and the values of its labels, in the order of the labels' names."""
    return {f.name: {tuple(value for _, value in sorted(s.labels.items())): s.value for s in f.samples} for f in families}


def scrape(told: list[str] | None = None, **options: Any) -> Samples:
    return samples(Exporter((told if told is not None else []).append, **options).collect())


def read(*names: str) -> Samples:
    """What some parts give, which must not fail."""
    told: list[str] = []
    values = scrape(told, services={}, readings={name: {**SERVICES, **READINGS}[name] for name in names})
    assert told == []
    return values


def available(values: Samples) -> set[str]:
    return {name for family in ("qa_up", "qa_read_success") for (name,), value in values[family].items() if value}


@pytest.fixture
def ledger(postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """A ledger whose table is empty, in the database that the environment names."""
    for name in ("host", "port", "user", "dbname"):
        monkeypatch.setenv(f"PG_{name.upper()}", str(getattr(postgres, name)))
    with Ledger(postgres) as ledger:
        yield ledger


def test_an_empty_table_gives_zeros(ledger: Ledger) -> None:
    values = read("files", "recent")
    assert values["qa_files"] == {(str(status),): 0 for status in FileStatus}
    assert values["qa_claims"] == {("held",): 0, ("expired",): 0}
    assert values["qa_last_load_timestamp_seconds"] == values["qa_oldest_waiting_seconds"] == values["qa_recent_files"] == {(): 0}
    assert values["qa_recent_stage_seconds"] == {}


def test_waiting_files_claims_and_charges_are_counted(ledger: Ledger, connection: psycopg.Connection) -> None:
    claimed_by_run(ledger, A1, B1)
    charge(ledger, B1, "broken")
    ledger.claim([C1], owner="dead", lease_seconds=0)
    connection.execute("UPDATE question_file SET created_at = now() - interval '2 hours' WHERE source_file = %s", [C1.name])
    values = read("files")
    assert (values["qa_files"]["pending",], values["qa_files"]["running",]) == (2, 1)
    assert values["qa_claims"] == {("held",): 1, ("expired",): 1}
    assert values["qa_charged_failures"] == {(): 1}
    assert values["qa_deferred_files"] == {(): 0}
    assert values["qa_oldest_waiting_seconds"][()] == pytest.approx(7200, abs=60)


def test_a_file_that_is_asked_for_again_waits_since_its_last_load_at_most(ledger: Ledger, connection: psycopg.Connection) -> None:
    ledger.claim([A1], owner="run", lease_seconds=60)
    connection.execute("UPDATE question_file SET created_at = now() - interval '30 days', loaded_at = now() - interval '1 hour'")
    assert read("files")["qa_oldest_waiting_seconds"][()] == pytest.approx(3600, abs=60)


def test_stages_that_did_not_happen_in_this_order_are_left_out(ledger: Ledger, connection: psycopg.Connection) -> None:
    """Shards that Pachyderm had answered before keep the time of that, which says nothing of this load."""
    ledger.claim([A1, B1, C1], owner="run", lease_seconds=60)
    # Seconds before now: seen, started, answered, loaded.
    for version, moments in ((A1, (100, 90, 70, 30)), (B1, (100, 60, 500, 10)), (C1, (9000, 8000, 7000, 6000))):
        connection.execute(
            "UPDATE question_file SET status = 'finished', (created_at, started_at, answered_at, loaded_at) = "
            "(SELECT now() - make_interval(secs => a), now() - make_interval(secs => b), now() - make_interval(secs => c), "
            "now() - make_interval(secs => d) FROM (SELECT %s, %s, %s, %s) AS s (a, b, c, d)) WHERE source_file = %s",
            [*moments, version.name],
        )
    values = read("recent")
    assert values["qa_recent_files"] == {(): 2}, "that of two hours ago is not recent"
    stages = values["qa_recent_stage_seconds"]
    assert [stages[quantile, "waiting"] for quantile in ("0.5", "1")] == [10, 40]
    assert [stages["1", stage] for stage in ("answering", "loading")] == [20, 40]


def test_a_reading_that_hangs_holds_one_thread_and_blanks_nothing_else(
    ledger: Ledger, postgres: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(postgres) as blocking, blocking.transaction(), socket.create_server(("127.0.0.1", 0)) as silent:
        blocking.execute("LOCK TABLE question_file")
        monkeypatch.setenv("PACHD_ADDRESS", f"grpc://127.0.0.1:{silent.getsockname()[1]}")
        told: list[str] = []
        parts = {name: SERVICES[name] for name in ("postgres", "pachd")}
        exporter = Exporter(told.append, services=parts, readings={"files": READINGS["files"]}, deadline=1)
        begun = time.monotonic()
        first, second = samples(exporter.collect()), samples(exporter.collect())
        assert time.monotonic() - begun < 4
    for values in (first, second):
        assert available(values) == {"postgres"}
        assert "qa_files" not in values
    assert sorted(told) == ["files: no answer within the deadline", "pachd: no answer within the deadline"]


def test_the_exporter_survives_services_that_are_away_and_tells_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PG_PASSWORD", "PACH_TOKEN", "GCS_ACCESS"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("PG_HOST", str(tmp_path))
    monkeypatch.setenv("PACHD_ADDRESS", "grpc://127.0.0.1:1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("DAGSTER_PG_URL", f"postgresql://u:{SECRET}@127.0.0.1:1/d")
    (tmp_path / "dagster.yaml").write_text(project_file("dagster.yaml").read_text())
    told: list[str] = []
    values = scrape(told)
    assert available(values) == {"certificates"}
    assert {line.partition(":")[0] for line in told} == ALL - {"certificates"}
    assert SECRET not in "".join(told)


def test_certificates_are_followed_to_their_end_and_the_doctor_names_those_that_end_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = private_key()
    (tmp_path / "root.pem").write_text(certificate(key, days=-1) + certificate(key, days=90))
    (tmp_path / "own.pem").write_text(certificate(key, days=20) + certificate(key, days=400))
    monkeypatch.setenv("PG_SSLROOTCERT", str(tmp_path / "root.pem"))
    monkeypatch.setenv("PG_SSLCLIENT_CERT", str(tmp_path / "own.pem"))
    monkeypatch.setenv("PACH_CA_BUNDLE", str(tmp_path / "root.pem"))
    days = {setting: seconds / 86_400 for (setting,), seconds in read("certificates")["qa_certificate_expiry_seconds"].items()}
    assert days == pytest.approx({"PG_SSLROOTCERT": 90, "PG_SSLCLIENT_CERT": 20, "PACH_CA_BUNDLE": 90}, abs=0.1)
    [finding] = certificates.PART.examine()
    ends = datetime.now(UTC) + timedelta(days=20)
    assert finding.detail == f"PG_SSLCLIENT_CERT (CN=test) ends on {ends:%Y-%m-%d}"
    assert finding.state is State.WRONG
    assert "PG_SSLCLIENT_CERT" in finding.fix
    (tmp_path / "own.pem").write_text(certificate(key, days=-1))
    [finding] = certificates.PART.examine()
    assert "ended on" in finding.detail
    (tmp_path / "own.pem").write_text(certificate(key, days=31))
    assert [result.state for result in certificates.PART.examine()] == [State.OK]
    (tmp_path / "own.pem").write_text(SECRET)
    [finding] = certificates.PART.examine()
    assert finding.state is State.UNKNOWN
    assert SECRET not in finding.detail


@pytest.mark.parametrize("listen", ["9464", "127.0.0.1:", "127.0.0.1:65536", ":9464", "h:x"])
def test_an_address_that_is_none_is_refused(listen: str) -> None:
    assert CliRunner().invoke(main, ["metrics", "--listen", listen]).exit_code == 2


def test_an_address_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # The command would take the test's own signal.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(main, ["metrics", "--listen", f"127.0.0.1:{taken.getsockname()[1]}"])
    assert result.exit_code == 1
    assert "--listen" in result.output


# --- The whole way, and what is deployed beside it ---


@dataclass(frozen=True)
class Whole:
    """The metrics before and after one file went the whole way and another was rejected. Other tests may use the same stack."""

    before: Samples
    after: Samples

    def growth(self, name: str) -> dict[tuple[str, ...], float]:
        before = self.before[name]
        return {labels: value - before[labels] for labels, value in self.after[name].items() if value != before[labels]}


@pytest.fixture(scope="module")
def whole(flow: Flow) -> Whole:
    with dg.DagsterInstance.from_config(str(DagsterSettings().dagster_home)) as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization(HEARTBEAT_ASSET))
    # A file that another test left unarchived would be archived in between.
    archive_done(flow.services, logging.getLogger())
    with served() as address:
        before = complete(address)
        flow.upload("metrics/seen.csv", csv_of(bridge("Bonn"), ("", "No question."), bridge("Jena")))
        flow.upload("metrics/no table.csv", b"\xff\xfe\x00")
        assert [result.success for result in flow.tick_and_run()] == [True]
        return Whole(before, complete(address))


@contextmanager
def served() -> Iterator[str]:
    """The address of the command's metrics. It ends by SIGTERM."""
    command = [sys.executable, "-m", "qa_platform.cli.main", "metrics", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        try:
            yield next(line for line in lines if line.startswith("serving http://127.0.0.1:")).split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def complete(address: str) -> Samples:
    """All metrics: a busy machine may take longer than the deadline."""

    def attempt() -> Samples | None:
        with urllib.request.urlopen(address) as answer:
            values = samples(iter(text_string_to_metric_families(answer.read().decode())))
        return values if available(values) == ALL else None

    return wait_until(attempt, "everything can be read") or {}


@pytest.mark.slow
def test_the_values_are_those_of_what_was_uploaded(whole: Whole) -> None:
    assert whole.growth("qa_files") == {("finished",): 1, ("rejected",): 1}
    for family in ("qa_rows", "qa_recent_rows"):
        assert whole.growth(family) == {("answered",): 2, ("rejected",): 1}
    assert whole.growth("qa_recent_files") == {(): 1}
    assert whole.growth("qa_recent_scored_answers") == {(): 2}
    assert set(whole.after["qa_recent_stage_seconds"]) == {(q, s) for s in ("waiting", "answering", "loading") for q in ("0.5", "0.9", "1")}
    for name in ("qa_claims", "qa_deferred_files", "qa_parked_files", "qa_charged_failures", "qa_archive_errors"):
        assert whole.growth(name) == {}, name
    jobs = whole.after["qa_pachyderm_jobs"]
    assert all(jobs[pipeline, "success"] for pipeline in (ANSWER_PIPELINE, LOAD_PIPELINE))
    assert set(whole.after["qa_pachyderm_recent_job_restarts"]) == {(ANSWER_PIPELINE,), (LOAD_PIPELINE,)}
    for name in ("qa_heartbeat_timestamp_seconds", "qa_last_load_timestamp_seconds"):
        assert whole.after[name][()] == pytest.approx(time.time(), abs=300), name
    assert whole.after["qa_heartbeat_limit_seconds"] == {(): WorkSettings().heartbeat_fails_after}


def expressions() -> list[str]:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    board = json.loads(BOARD.read_text())
    return [rule["expr"] for rule in rules] + [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def unknown(expression: str, known: Samples) -> set[str]:
    """The metrics of an expression that are not exported, and its label values that no sample has."""
    names = set(re.findall(r"\bqa_\w+", expression))
    wrong = {name for name in names if name not in known}
    for name, selector in re.findall(r"\b(qa_\w+)\{([^}]*)\}", expression):
        values = set(re.findall(r'"([^"]*)"', selector))
        found = {value for labels in known.get(name, {}) for value in labels}
        wrong |= {f"{name}: {word}" for value in values for word in value.split("|") if word not in found}
    return wrong


@pytest.mark.slow
def test_alerts_and_board_ask_for_what_is_served_only(whole: Whole) -> None:
    # None of the tests' services has a certificate.
    known: Samples = whole.after | {"qa_certificate_expiry_seconds": {}}
    assert len(expressions()) > 15
    assert [expression for expression in expressions() if unknown(expression, known)] == []
    assert unknown('qa_nothing > 0 and qa_files{state=~"pending|runing"} > 0', known) == {"qa_nothing", "qa_files: runing"}


def test_a_claim_that_a_dead_run_left_on_a_file_that_is_done_needs_nobody(
    ledger: Ledger, connection: psycopg.Connection, tmp_path: Path
) -> None:
    # Pachyderm loads the files of a run that died. No other run has to continue with them, so the alert must not fire.
    upload = AnsweredUpload(answered_rows(4))
    version = FileVersion(upload.name, upload.generation)
    ledger.claim([version], owner="dead", lease_seconds=60)
    ledger.start("dead", [version], run_id="dead", batch_id="b")
    connection.execute("UPDATE question_file SET claim_until = now() - interval '1 day'")
    assert read("files")["qa_claims"]["expired",] == 1
    load_file(connection, upload.write(tmp_path / "file"))
    assert read("files")["qa_claims"]["expired",] == 0


def test_a_claim_on_a_file_whose_source_was_deleted_needs_nobody(ledger: Ledger, connection: psycopg.Connection) -> None:
    ledger.claim([A1], owner="dead", lease_seconds=0)
    assert ledger.mark_superseded(A1)
    assert read("files")["qa_claims"]["expired",] == 0
