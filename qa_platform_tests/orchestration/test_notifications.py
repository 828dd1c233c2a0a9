"""Notifications of failed runs and failed checks, to a real HTTP server that stands in for Slack and a real SMTP server."""

import json
import logging
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import dagster as dg
import pytest
from apprise.plugins.custom_json import NotifyJSON
from pydantic import SecretStr

from qa_platform.errors import QaPlatformError, TransientError
from qa_platform.orchestration import notifications
from qa_platform.orchestration.notifications import (
    failed_checks,
    failed_run,
    notification_sensors,
    notify,
    notify_of_failed_checks,
    send_email,
)
from qa_platform.settings import NotificationSettings

SECRET = "T000-B000-secret"
_SECONDS = {name: getattr(notifications, name) for name in ("_MESSAGE_SECONDS", "_TIMEOUT_SECONDS", "_PAUSE_SECONDS")}


class Webhook:
    """What an HTTP server was sent; it answers with the next of ``statuses``, then with ``status``."""

    def __init__(self) -> None:
        self.status = 200
        self.statuses: list[int] = []
        self.texts: list[str] = []
        self.address = ""


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qa_platform.orchestration.notifications._PAUSE_SECONDS", 0)


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    received = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.texts.append(body["text"] if "text" in body else f"{body['title']}: {body['message']}")
            self.send_response(received.statuses.pop(0) if received.statuses else received.status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        received.address = f"http://127.0.0.1:{server.server_port}/services/{SECRET}"
        yield received
        server.shutdown()


class _Mail(socketserver.StreamRequestHandler):
    """As much of SMTP as one message takes. Receivers at `refused.example` are refused, at `busy.example` for now."""

    def handle(self) -> None:
        self._say("220 ready")
        while line := self.rfile.readline():
            command = line.decode().strip()
            if command.upper() == "DATA":
                self._say("354 go on")
                lines = []
                while (content := self.rfile.readline()) != b".\r\n":
                    lines.append(content.decode())
                self.server.messages.append("".join(lines))  # type: ignore[attr-defined]
            elif command.upper() == "QUIT":
                self._say("221 bye")
                return
            answer = "451 later" if "busy.example" in command else "250 ok"
            self._say("550 no such user" if "refused.example" in command else answer)

    def _say(self, text: str) -> None:
        self.wfile.write(f"{text}\r\n".encode())


@contextmanager
def mail_server() -> Iterator[tuple[int, list[str]]]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Mail) as server:
        messages: list[str] = []
        server.messages = messages  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], messages
        server.shutdown()


def settings(webhook: Webhook | None = None, *, port: int = 1, to: tuple[str, ...] = ()) -> NotificationSettings:
    address = webhook.address if webhook else ""
    return NotificationSettings(
        slack_webhook=SecretStr(address), email_to=to, smtp_host="127.0.0.1", smtp_port=port, smtp_tls="none", dagster_url=""
    )


@dg.op
def broken() -> None:
    raise dg.Failure("What to do: fix <it> & run it again.\nThe engine is cold.")


@dg.job
def breaks() -> None:
    broken()


@dg.asset(check_specs=[dg.AssetCheckSpec("complete", asset="cells"), dg.AssetCheckSpec("usual", asset="cells")])
def cells(context: dg.AssetExecutionContext) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult]:
    evaluation = dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey("cells"), check_name="usual", passed=False, severity=dg.AssetCheckSeverity.WARN, partition="a.csv"
    )
    context.log_event(evaluation)
    yield dg.MaterializeResult()
    yield dg.AssetCheckResult(check_name="complete", passed=True)
    yield dg.AssetCheckResult(check_name="usual", passed=False, severity=dg.AssetCheckSeverity.WARN)


def test_nobody_is_told_by_default() -> None:
    assert notification_sensors(NotificationSettings()) == []


def test_with_a_receiver_there_are_sensors_that_run(webhook: Webhook) -> None:
    sensors = notification_sensors(settings(webhook))
    assert [sensor.name for sensor in sensors] == ["notify_failed_runs", "notify_failed_checks"]
    assert {sensor.default_status for sensor in sensors} == {dg.DefaultSensorStatus.RUNNING}


def test_a_failed_run_is_told_with_what_to_do_first(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_SLACK_WEBHOOK", webhook.address)
    with dg.DagsterInstance.ephemeral() as instance:
        result = breaks.execute_in_process(instance=instance, raise_on_error=False)
        (event,) = (e for e in result.all_events if e.event_type is dg.DagsterEventType.RUN_FAILURE)
        context = dg.build_run_status_sensor_context(
            sensor_name="notify_failed_runs", dagster_event=event, dagster_instance=instance, dagster_run=result.dagster_run
        ).for_run_failure()
        subject, text = failed_run(context, "")
        assert subject == "breaks failed"
        assert text.splitlines()[0] == "What to do: fix <it> & run it again."
        assert result.run_id in text
        assert "Traceback" not in text
        sensor = notification_sensors(NotificationSettings())[0]
        sensor(context)
    (told,) = webhook.texts
    assert told.startswith("breaks failed\nWhat to do: fix &lt;it&gt; &amp; run it again.\nThe engine is cold.")


def test_failed_checks_are_told_per_file_and_passed_ones_are_not(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_SLACK_WEBHOOK", webhook.address)
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([cells], instance=instance)
        assert failed_checks(instance, result.run_id) == ["Warning: cells, usual: a.csv"]
        (event,) = (e for e in result.all_events if e.event_type is dg.DagsterEventType.RUN_SUCCESS)
        context = dg.build_run_status_sensor_context(
            sensor_name="notify_failed_checks", dagster_event=event, dagster_instance=instance, dagster_run=result.dagster_run
        )
        notification_sensors(NotificationSettings())[1](context)
    (told,) = webhook.texts
    assert told.startswith("1 checks failed\nWarning: cells, usual: a.csv")


def test_mail_is_sent_to_every_receiver() -> None:
    with mail_server() as (port, messages):
        notify(settings(port=port, to=("a@example.org", "b@example.org")), "a job\r\nBcc: c@example.org", "What to do: größeren Kübel")
    (message,) = messages
    assert "To: a@example.org, b@example.org" in message
    assert "Subject: qa_platform: a job Bcc: c@example.org" in message
    assert "\nBcc:" not in message


def test_a_channel_that_fails_does_not_keep_the_message_from_the_others() -> None:
    nowhere = Webhook()
    nowhere.address = f"http://127.0.0.1:9/{SECRET}"
    with mail_server() as (port, messages), pytest.raises(TransientError, match="Slack"):
        notify(settings(nowhere, port=port, to=("a@example.org",)), "x", "y")
    assert len(messages) == 1


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/", "file:///etc/passwd?", "https://[broken/", "https://hooks.example/a b", ""])
def test_no_failure_shows_the_webhook_address(webhook: Webhook, address: str) -> None:
    webhook.status = 404
    webhook.address = f"{address}{SECRET}" if address else webhook.address
    with pytest.raises(QaPlatformError) as caught:
        notify(settings(webhook), "x", "y")
    shown = "".join(str(error) for error in (caught.value, caught.value.__cause__, caught.value.__context__))
    assert SECRET not in shown
    assert SECRET not in repr(settings(webhook))


def test_a_mail_server_that_refuses_or_is_unavailable_is_named() -> None:
    with mail_server() as (port, _), pytest.raises(QaPlatformError, match=rf"127.0.0.1:{port} refuses"):
        notify(settings(port=port, to=("a@refused.example",)), "x", "y")
    with pytest.raises(QaPlatformError, match="QA_SMTP_HOST"):
        notify(settings(port=9, to=("a@example.org",)), "x", "y")


def test_one_receiver_that_is_refused_is_named_and_the_others_get_one_message() -> None:
    with mail_server() as (port, messages):
        with pytest.raises(QaPlatformError, match=r"refuses a@refused\.example; check QA_EMAIL_TO"):
            notify(settings(port=port, to=("b@example.org", "a@refused.example")), "x", "y")
        assert len(messages) == 1


def test_a_mail_server_that_asks_to_come_back_later_is_no_wrong_setting() -> None:
    with mail_server() as (port, _), pytest.raises(TransientError, match="does not take the message now"):
        send_email(settings(port=port, to=("a@busy.example",)), "x", "y")


def test_names_of_files_mention_nobody_and_long_messages_are_cut(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NotifyJSON, "body_maxlen", 100)
    notify(to_services(as_service(webhook)), "x", "@everyone.csv failed " + "z" * 1000)
    (text,) = webhook.texts
    assert "@everyone" not in text
    assert len(text) <= 110


def test_a_channel_that_drips_ends_in_time_and_is_named(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each read ends within the time-out, the greeting never does.
    monkeypatch.setattr("qa_platform.orchestration.notifications._MESSAGE_SECONDS", 1.0)
    stop = threading.Event()

    class Drips(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while not stop.wait(0.2):
                self.wfile.write(b"220-wait\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drips) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(TransientError, match=rf"the mail server 127.0.0.1:{server.server_address[1]} took more than 1 s"):
            notify(settings(webhook, port=server.server_address[1], to=("a@example.org",)), "x", "y")
        stop.set()
        server.shutdown()
    assert len(webhook.texts) == 1


def test_no_name_of_a_file_becomes_a_link(webhook: Webhook) -> None:
    names = ("[Log in again](https://evil.example/login).csv", "http://evil.example.csv", "WWW.evil.example.csv")
    evaluations = [
        dg.AssetCheckEvaluation(dg.AssetKey("cells"), "usual", passed=False, partition=name, severity=dg.AssetCheckSeverity.WARN)
        for name in names
    ]
    both = NotificationSettings(slack_webhook=SecretStr(webhook.address), notify_urls=(SecretStr(as_service(webhook)),))
    notify_of_failed_checks(both, evaluations, logging.getLogger(__name__))
    assert len(webhook.texts) == 2
    for text in webhook.texts:
        assert text.count("evil.example") == 3
        assert not any(link in text for link in ("://", "](", "WWW."))
        assert text.count("\u200b") == 4


def test_a_slow_server_that_takes_the_message_gets_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real proportions, in less time: a server that answers late, but in time for the message.
    message = _SECONDS["_MESSAGE_SECONDS"] * 0.3
    for name, seconds in _SECONDS.items():
        monkeypatch.setattr(notifications, name, seconds * 0.3)

    class Slow(_Mail):
        def handle(self) -> None:
            threading.Event().wait(message * 0.8)
            super().handle()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Slow) as server:
        server.messages = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        notify(settings(port=server.server_address[1], to=("a@example.org",)), "x", "y")
        server.shutdown()
        assert len(server.messages) == 1  # type: ignore[attr-defined]


def test_an_address_that_is_not_encrypted_is_refused() -> None:
    plain = Webhook()
    plain.address = "http://hooks.example.org/x"
    with pytest.raises(QaPlatformError, match="https"):
        notify(settings(plain), "x", "y")


def test_a_channel_that_is_unavailable_for_a_moment_is_tried_again_and_one_that_refuses_is_not(webhook: Webhook) -> None:
    webhook.statuses = [503, 429]
    notify(settings(webhook), "x", "y")
    assert len(webhook.texts) == 3
    webhook.status = 404
    with pytest.raises(QaPlatformError, match="QA_SLACK_WEBHOOK"):
        notify(settings(webhook), "x", "y")
    assert len(webhook.texts) == 4


def to_services(*urls: str) -> NotificationSettings:
    return NotificationSettings(notify_urls=tuple(map(SecretStr, urls)))


def as_service(webhook: Webhook) -> str:
    """The webhook as apprise addresses a service that takes JSON."""
    return webhook.address.replace("http://", f"json://user:{SECRET}@")


def test_any_service_that_apprise_knows_is_told(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_NOTIFY_URLS", json.dumps([as_service(webhook), as_service(webhook)]))
    assert [sensor.name for sensor in notification_sensors(NotificationSettings())] == ["notify_failed_runs", "notify_failed_checks"]
    notify(NotificationSettings(), "2 checks failed", "a < b & *c*")
    assert webhook.texts == ["2 checks failed: a < b & *c*"] * 2


def test_a_service_that_does_not_take_a_message_is_tried_again_and_named_without_its_address(
    webhook: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    webhook.status = 500
    settings = to_services(as_service(webhook))
    with pytest.raises(TransientError, match=r"JSON did not accept the message.*QA_NOTIFY_URLS") as caught:
        notify(settings, "x", "y")
    assert len(webhook.texts) == 3
    assert SECRET not in f"{caught.value} {settings!r} {caplog.text}"


@pytest.mark.parametrize("url", [f"nothing://{SECRET}", SECRET, f"slack://{SECRET}"])
def test_an_address_of_no_service_is_refused_without_being_shown(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(QaPlatformError, match="apprise does not recognise an address") as caught:
        notify(to_services(url), "x", "y")
    assert SECRET not in f"{caught.value} {caplog.text}"


def test_a_password_that_cannot_be_sent_is_an_error_of_the_platform_without_the_password() -> None:
    with mail_server() as (port, _), pytest.raises(QaPlatformError, match="QA_SMTP_") as caught:
        notify(
            settings(port=port, to=("a@example.org",)).model_copy(update={"smtp_user": "u", "smtp_password": SecretStr("pässword")}),
            "x",
            "y",
        )
    assert "pässword" not in str(caught.value)


def test_failed_checks_that_a_sensor_evaluated_are_told_and_an_outage_is_only_logged(
    webhook: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    passed, failed = (
        dg.AssetCheckEvaluation(asset_key=dg.AssetKey("cells"), check_name=name, passed=name == "good", partition="a\u202e.csv")
        for name in ("good", "bad")
    )
    log = logging.getLogger("sensor")
    notify_of_failed_checks(settings(webhook), [passed], log)
    notify_of_failed_checks(settings(webhook), [passed, failed], log)
    (told,) = webhook.texts
    assert told.startswith("1 checks failed\nError: cells, bad: a\\u202e.csv\n")
    webhook.status = 503
    notify_of_failed_checks(settings(webhook), [failed], log)
    assert "answers 503" in caplog.text
    assert SECRET not in caplog.text
    assert len(webhook.texts) == 2
