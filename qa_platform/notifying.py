"""Telling people of failed runs and failed checks, through a Slack webhook or by e-mail. Off unless a receiver is configured.

These are Dagster's sensors on the ends of runs. Checks of files whose run was lost after it had loaded them belong to no run: the bucket
sensor, which evaluates them, tells of them itself.
"""

import http.client
import json
import logging
import smtplib
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from email.message import EmailMessage

import dagster as dg

from qa_platform.errors import InputError, QaPlatformError, TransientError
from qa_platform.settings import NotificationSettings

# A tick of a sensor may take a minute.
_TIMEOUT_SECONDS = 10
# A way that is away is tried again, unless so long has passed: another try may take the time-out once more.
_TRIES = 3
_PAUSE_SECONDS = 2.0
_NO_TRY_AFTER_SECONDS = 15
# Characters of a message, and checks that it names.
_TEXT_LIMIT = 3_000
_NAMED = 20

Send = Callable[[str, str], None]


def notification_sensors(settings: NotificationSettings) -> list[dg.SensorDefinition]:
    """The sensors that tell somebody, or none where nobody is to be told."""
    if not senders(settings):
        return []

    # The settings are read anew with every tick: they hold secrets, and a definition is kept.
    @dg.run_failure_sensor(
        name="notify_failed_runs",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Tells the Slack webhook and the receivers of e-mail of every run that failed.",
    )
    def notify_failed_runs(context: dg.RunFailureSensorContext) -> None:
        notify(NotificationSettings(), *failed_run(context))

    @dg.run_status_sensor(
        name="notify_failed_checks",
        run_status=dg.DagsterRunStatus.SUCCESS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Tells them of checks that failed in a run that succeeded.",
    )
    def notify_failed_checks(context: dg.RunStatusSensorContext) -> None:
        if lines := failed_checks(context.instance, context.dagster_run.run_id):
            notify(NotificationSettings(), f"{len(lines)} checks failed", _text(context.dagster_run, lines))

    return [notify_failed_runs, notify_failed_checks]


def failed_run(context: dg.RunFailureSensorContext) -> tuple[str, str]:
    """Subject and text for a failed run: what its failed steps say, what to do first, and its failed checks."""
    said = [event.step_failure_data.error_display_string for event in context.get_step_failure_events()]
    lines = [_without_type(text) for text in said] or [context.failure_event.message or "the run failed before its first step"]
    return f"{context.dagster_run.job_name} failed", _text(
        context.dagster_run, [*lines, *failed_checks(context.instance, context.dagster_run.run_id)]
    )


def failed_checks(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    """The checks that failed in a run, a line each, per file where the evaluation is a file's."""
    records = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
    found = [record.event_log_entry.dagster_event for record in records]
    return _failed([event.asset_check_evaluation_data for event in found if event])


def tell_of_failed_checks(evaluations: Iterable[dg.AssetCheckEvaluation], log: logging.Logger) -> None:
    """Tell of the checks that failed among those that a sensor evaluated. What cannot be told is logged: the sensor has more to do."""
    lines = _failed(evaluations)
    settings = NotificationSettings()
    if not lines or not senders(settings):
        return
    text = "\n".join(lines)[:_TEXT_LIMIT]
    try:
        notify(settings, f"{len(lines)} checks failed", f"{text}\n\nof files whose run was lost after it had loaded them", tries=1)
    except QaPlatformError as error:
        log.warning("Failed checks could not be told of: %s", error)


def _failed(evaluations: Iterable[dg.AssetCheckEvaluation]) -> list[str]:
    failed = [e for e in evaluations if not e.passed]
    # What a run says of all its files together repeats what it says of each.
    per_file = {e.check_name for e in failed if e.partition}
    lines = [
        f"{'Warning' if e.severity is dg.AssetCheckSeverity.WARN else 'Error'}: {e.asset_key.to_user_string()}, {e.check_name}"
        f"{f': {e.partition}' if e.partition else ''}"
        for e in failed
        if e.partition or e.check_name not in per_file
    ]
    return lines[:_NAMED] + ([f"and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else [])


def senders(settings: NotificationSettings) -> list[Send]:
    """How somebody is told, by subject and text."""
    found: list[Send] = []
    if settings.slack_webhook.get_secret_value():
        found.append(lambda subject, text: post_to_slack(settings, subject, text))
    if settings.email_to:
        found.append(lambda subject, text: send_email(settings, subject, text))
    return found


def notify(settings: NotificationSettings, subject: str, text: str, *, tries: int = _TRIES) -> None:
    """Tell everybody who is configured. One way that is out of order does not keep the message from the others.

    Args:
        tries: how often a way is tried that is away, at most.

    Raises:
        QaPlatformError: a way is out of order; the tick that raised it shows which, and nothing secret.
    """
    failures: list[QaPlatformError] = []
    no_try_after = time.monotonic() + _NO_TRY_AFTER_SECONDS
    for send in senders(settings):
        for left in reversed(range(tries)):
            try:
                send(subject, text)
                break
            except QaPlatformError as error:
                if not left or not isinstance(error, TransientError) or time.monotonic() + _PAUSE_SECONDS > no_try_after:
                    failures.append(error)
                    break
            time.sleep(_PAUSE_SECONDS)
    if failures:
        raise TransientError("; ".join(map(str, failures)))


def post_to_slack(settings: NotificationSettings, subject: str, text: str) -> None:
    """Post to the webhook.

    Raises:
        InputError: the address is none, or Slack refuses the message.
        TransientError: Slack is away. Its address is in no message.
    """
    address = settings.slack_webhook.get_secret_value()
    if not address.startswith(("https://", "http://127.0.0.1:")):
        raise InputError("QA_SLACK_WEBHOOK is no https:// address; take the one that Slack shows for the webhook")
    body = json.dumps({"text": _slack_text(f"*{subject}*\n{text}")}).encode()
    failure: QaPlatformError
    try:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
            return
    except urllib.error.HTTPError as error:
        said = f"Slack's webhook answers {error.code}"
        if error.code == http.client.TOO_MANY_REQUESTS or error.code >= http.client.INTERNAL_SERVER_ERROR:
            failure = TransientError(f"{said}: it is out of order or overloaded; this passes by itself")
        else:
            failure = InputError(f"{said}: is QA_SLACK_WEBHOOK still the address that Slack shows?")
    except (OSError, ValueError, http.client.HTTPException) as error:
        failure = TransientError(f"Slack's webhook cannot be reached ({type(error).__name__}); may this machine reach it?")
    # Outside the handlers: the originals name the address, or their frames hold it.
    raise failure


def send_email(settings: NotificationSettings, subject: str, text: str) -> None:
    """Send one message to all receivers.

    Raises:
        InputError: the mail server refuses the log-in or the message, or cannot be told them: a password in other characters than ASCII.
        TransientError: it is away.
    """
    message = EmailMessage()
    message["Subject"] = f"qa_platform: {' '.join(subject.split())}"
    message["From"] = settings.email_from
    message["To"] = ", ".join(settings.email_to)
    message.set_content(text)
    where = f"{settings.smtp_host}:{settings.smtp_port}"
    failure: QaPlatformError
    try:
        with _mail_server(settings) as server:
            if settings.smtp_user:
                server.login(settings.smtp_user, settings.smtp_password.get_secret_value())
            server.send_message(message)
            return
    except (smtplib.SMTPResponseException, smtplib.SMTPRecipientsRefused, smtplib.SMTPNotSupportedError, ValueError) as error:
        failure = InputError(
            f"the mail server {where} refuses the message ({type(error).__name__}): check the QA_SMTP_ and QA_EMAIL_ variables"
        )
    except (OSError, smtplib.SMTPException) as error:
        failure = TransientError(f"the mail server {where} cannot be used ({type(error).__name__}): check QA_SMTP_HOST, _PORT and _TLS")
    raise failure


def _mail_server(settings: NotificationSettings) -> smtplib.SMTP:
    if settings.smtp_tls == "ssl":
        return smtplib.SMTP_SSL(settings.smtp_host, settings.smtp_port, timeout=_TIMEOUT_SECONDS, context=ssl.create_default_context())
    server = smtplib.SMTP(settings.smtp_host, settings.smtp_port, timeout=_TIMEOUT_SECONDS)
    if settings.smtp_tls == "starttls":
        server.starttls(context=ssl.create_default_context())
    return server


def _text(run: dg.DagsterRun, lines: list[str]) -> str:
    base = NotificationSettings().dagster_url.rstrip("/")
    link = f"{base}/runs/{run.run_id}" if base else f"run {run.run_id}"
    text = "\n".join(lines)[:_TEXT_LIMIT]
    return f"{text}\n\n{run.job_name}, {link}"


def _without_type(said: str) -> str:
    # "dagster._core.definitions.events.Failure: What to do: …", and a stack trace after it.
    text = said.split("\nStack Trace:")[0].strip()
    return text[text.find("What to do: ") :] if "What to do: " in text else text


def _slack_text(text: str) -> str:
    # What Slack asks to be escaped; the rest is the reader's, file names and log lines included.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
