"""Notifications of failed runs and failed checks: to a Slack webhook, by e-mail, or through `apprise` to any service that it knows.
Off unless a receiver is configured.

Dagster's run status sensors send them. If a run was lost after it had loaded its files, the sensor `done_files` evaluates their checks
and sends their notifications itself.
"""

import http.client
import json
import logging
import re
import smtplib
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from email.message import EmailMessage
from functools import partial
from typing import NamedTuple

import dagster as dg
from dagster._core.execution.plan.objects import StepFailureData
from pydantic import SecretStr

from qa_platform.clients.deadline import begin
from qa_platform.clients.services import Log
from qa_platform.errors import InputError, QaPlatformError, TransientError
from qa_platform.orchestration.reports.checks import run_evaluations
from qa_platform.settings import NotificationSettings
from qa_platform.text import escaped

# The time for one message, through all channels at the same time. A tick of Dagster's sensors sends up to five and may take a minute:
# one that takes longer is repeated, and the receivers get their messages again.
_MESSAGE_SECONDS = 10.0
# The time-out of a connection: a little shorter, so that its own error is reported. It leaves no time for a second attempt, because the
# first message may have been received.
_TIMEOUT_SECONDS = 9.0
# How often an unavailable channel is tried in that time.
_TRIES = 3
_PAUSE_SECONDS = 2.0
# The maximum length of a message in characters, and the maximum number of checks that it names.
_TEXT_LIMIT = 3_000
_NAMED = 20
# Where chats make a link of plain text or of Markdown. A zero-width space prevents it.
_LINKS = re.compile(r"(?<=http:)(?=//)|(?<=https:)(?=//)|(?<=www)(?=\.)|(?<=\])(?=\()", re.IGNORECASE)
_CHECK_NETWORK = "check that this machine can reach it"
_CHECK_MAIL = "check QA_SMTP_HOST, _PORT and _TLS"


class Channel(NamedTuple):
    """A receiver's name and how to check its settings, without secrets; and the function that sends it a subject and a text."""

    name: str
    advice: str
    send: Callable[[str, str], None]


# apprise logs the tokens of an address, and so does urllib3 when it logs apprise's requests.
logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
logging.getLogger("urllib3").setLevel(logging.INFO)


def notification_sensors(settings: NotificationSettings) -> list[dg.SensorDefinition]:
    """The sensors that send notifications; none if no receiver is configured."""
    if not channels(settings):
        return []

    @dg.run_failure_sensor(
        name="notify_failed_runs",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Notifies every configured receiver of every failed run.",
    )
    def notify_failed_runs(context: dg.RunFailureSensorContext) -> None:
        notify(settings, *failed_run(context, settings.dagster_url))

    @dg.run_status_sensor(
        name="notify_failed_checks",
        run_status=dg.DagsterRunStatus.SUCCESS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Notifies every configured receiver of checks that failed in a run that succeeded.",
    )
    def notify_failed_checks(context: dg.RunStatusSensorContext) -> None:
        if lines := failed_checks(context.instance, context.dagster_run.run_id):
            notify(settings, f"{len(lines)} checks failed", _text(context.dagster_run, lines, settings.dagster_url))

    return [notify_failed_runs, notify_failed_checks]


def failed_run(context: dg.RunFailureSensorContext, dagster_url: str) -> tuple[str, str]:
    """Subject and text for a failed run: the messages of its failed steps, which begin with what to do, and its failed checks."""
    run = context.dagster_run
    messages = [_message(event.step_failure_data) for event in context.get_step_failure_events()]
    lines = messages or [context.failure_event.message or "the run failed before its first step"]
    return f"{run.job_name} failed", _text(run, [*lines, *failed_checks(context.instance, run.run_id)], dagster_url)


def _message(failure: StepFailureData) -> str:
    """The description of a ``dg.Failure``; for any other error, its message without a stack trace."""
    if failure.user_failure_data and failure.user_failure_data.description:
        return failure.user_failure_data.description
    error = failure.error.cause or failure.error if failure.error else None
    return error.message.strip() if error else ""


def failed_checks(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    """The checks that failed in a run, one line each; per file if the evaluation has a partition."""
    return _failed(run_evaluations(instance, run_id))


def notify_of_failed_checks(settings: NotificationSettings, evaluations: Iterable[dg.AssetCheckEvaluation], log: Log) -> None:
    """Send a notification of the failed checks among those that a sensor evaluated. A failure is only logged: the sensor must go on."""
    lines = _failed(evaluations)
    if not lines or not channels(settings):
        return
    text = _plain(lines)
    try:
        notify(settings, f"{len(lines)} checks failed", f"{text}\n\nThe runs of these files were lost after loading them.", tries=1)
    except QaPlatformError as error:
        log.warning("The notification of failed checks could not be sent: %s", error)


def _failed(evaluations: Iterable[dg.AssetCheckEvaluation]) -> list[str]:
    failed = [e for e in evaluations if not e.passed]
    # A run's evaluation of all files repeats the evaluations of each file.
    per_file = {e.check_name for e in failed if e.partition}
    lines = [
        f"{'Warning' if e.severity is dg.AssetCheckSeverity.WARN else 'Error'}: {e.asset_key.to_user_string()}, {e.check_name}"
        f"{f': {e.partition}' if e.partition else ''}"
        for e in failed
        if e.partition or e.check_name not in per_file
    ]
    return lines[:_NAMED] + ([f"and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else [])


def channels(settings: NotificationSettings) -> list[Channel]:
    """The configured channels."""
    configured: list[Channel] = []
    if settings.slack_webhook.get_secret_value():
        configured.append(Channel("Slack's webhook", _CHECK_NETWORK, partial(post_to_slack, settings)))
    if settings.email_to:
        configured.append(Channel(f"the mail server {_mail_address(settings)}", _CHECK_MAIL, partial(send_email, settings)))
    configured.extend(
        Channel(f"address {number} of QA_NOTIFY_URLS", _CHECK_NETWORK, partial(send_to_service, url))
        for number, url in enumerate(settings.notify_urls, start=1)
    )
    return configured


def notify(settings: NotificationSettings, subject: str, text: str, *, tries: int = _TRIES) -> None:
    """Send a message through every configured channel, within seconds. If one fails, the others still get the message.

    Args:
        tries: the maximum number of attempts for an unavailable channel.

    Raises:
        TransientError: a channel failed, or took too long and may still send it. The message names it and contains no secrets.
    """
    subject, text = (escaped(part, keep="\r\n\t\u200b") for part in (subject, text))
    until = time.monotonic() + _MESSAGE_SECONDS
    sending = [
        (channel, begin(partial(_send, channel, subject, text, tries, until), f"notify {channel.name}")) for channel in channels(settings)
    ]
    failures: list[str] = []
    for channel, sent in sending:
        try:
            sent.result(max(0.0, until - time.monotonic()))
        except TimeoutError:
            failures.append(
                f"{channel.name} took more than {_MESSAGE_SECONDS:g} s; the message may still arrive; if it does not, {channel.advice}"
            )
        except QaPlatformError as error:
            failures.append(str(error))
    if failures:
        raise TransientError("; ".join(failures))


def _send(channel: Channel, subject: str, text: str, tries: int, until: float) -> None:
    for left in reversed(range(tries)):
        try:
            channel.send(subject, text)
            return
        except TransientError:
            if not left or time.monotonic() + _PAUSE_SECONDS > until:
                raise
        time.sleep(_PAUSE_SECONDS)


def post_to_slack(settings: NotificationSettings, subject: str, text: str) -> None:
    """Post to the webhook.

    Raises:
        InputError: the setting is not an address, or Slack refuses the message.
        TransientError: Slack is unavailable. No message contains the address.
    """
    address = settings.slack_webhook.get_secret_value()
    if not address.startswith(("https://", "http://127.0.0.1:")):
        raise InputError("QA_SLACK_WEBHOOK is not an https:// address", advice="set it to the address that Slack shows for the webhook")
    # Without mark-up and previews: others chose the names of files.
    body = json.dumps({"text": _slack_text(f"{subject}\n{text}"), "mrkdwn": False, "unfurl_links": False}).encode()
    failure: QaPlatformError
    try:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
            return
    except urllib.error.HTTPError as error:
        answer = f"Slack's webhook answers {error.code}"
        if error.code == http.client.TOO_MANY_REQUESTS or error.code >= http.client.INTERNAL_SERVER_ERROR:
            failure = TransientError(f"{answer}: it is down or overloaded")
        else:
            failure = InputError(answer, advice="check that QA_SLACK_WEBHOOK is the address that Slack shows")
    except (OSError, ValueError, http.client.HTTPException) as error:
        failure = TransientError(f"Slack's webhook cannot be reached ({type(error).__name__})", advice=_CHECK_NETWORK)
    # Outside the handlers: the original errors name the address, or their frames hold it.
    raise failure


def send_email(settings: NotificationSettings, subject: str, text: str) -> None:
    """Send one message to all receivers.

    Raises:
        InputError: the mail server refuses the log-in or the message, or the password has characters outside ASCII.
        TransientError: the mail server is unavailable.
    """
    message = EmailMessage()
    message["Subject"] = f"qa_platform: {' '.join(subject.split())}"
    message["From"] = settings.email_from
    message["To"] = ", ".join(settings.email_to)
    message.set_content(text)
    where = _mail_address(settings)
    failure: QaPlatformError
    try:
        with _mail_server(settings) as server:
            if settings.smtp_user:
                server.login(settings.smtp_user, settings.smtp_password.get_secret_value())
            refused = server.send_message(message)
            if not refused:
                return
        # The others have the message, so it is not sent again.
        failure = InputError(f"the mail server {where} refuses {', '.join(refused)}", advice="check QA_EMAIL_TO")
    except (smtplib.SMTPResponseException, smtplib.SMTPRecipientsRefused, smtplib.SMTPNotSupportedError, ValueError) as error:
        if _is_temporary(error):
            failure = TransientError(f"the mail server {where} does not take the message now ({type(error).__name__})")
        else:
            failure = InputError(
                f"the mail server {where} refuses the message ({type(error).__name__})",
                advice="check the QA_SMTP_ and QA_EMAIL_ variables",
            )
    except (OSError, smtplib.SMTPException) as error:
        failure = TransientError(f"the mail server {where} is unavailable ({type(error).__name__})", advice=_CHECK_MAIL)
    raise failure


def _mail_address(settings: NotificationSettings) -> str:
    return f"{settings.smtp_host}:{settings.smtp_port}"


def _is_temporary(error: Exception) -> bool:
    """Whether a mail server asks to try again later, by its codes (RFC 5321, section 4.2.1)."""
    codes = [error.smtp_code] if isinstance(error, smtplib.SMTPResponseException) else []
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = [code for code, _ in error.recipients.values()]
    return bool(codes) and all(400 <= code < 500 for code in codes)


def _mail_server(settings: NotificationSettings) -> smtplib.SMTP:
    if settings.smtp_tls == "ssl":
        return smtplib.SMTP_SSL(settings.smtp_host, settings.smtp_port, timeout=_TIMEOUT_SECONDS, context=ssl.create_default_context())
    server = smtplib.SMTP(settings.smtp_host, settings.smtp_port, timeout=_TIMEOUT_SECONDS)
    if settings.smtp_tls == "starttls":
        server.starttls(context=ssl.create_default_context())
    return server


def send_to_service(url: SecretStr, subject: str, text: str) -> None:
    """Send a message to a service that `apprise` knows, such as Teams, PagerDuty or Matrix.

    Raises:
        InputError: the address does not belong to such a service.
        TransientError: the service did not accept the message.
    """
    # Imported here: it takes half a second, and most deployments have no such address.
    from apprise import Apprise, AppriseAsset, NotifyFormat, OverflowMode

    asset = AppriseAsset(app_id="qa_platform", secure_logging=True, async_mode=False)
    # Without exceptions: their frames would hold the address.
    service = Apprise.instantiate(url.get_secret_value(), asset=asset, suppress_exceptions=True)
    if service is None:
        raise InputError(
            "apprise does not recognise an address in QA_NOTIFY_URLS",
            advice="see the supported addresses at https://github.com/caronc/apprise",
        )
    # Some services refuse long messages; the first lines say what to do. The names of files mention nobody.
    service.overflow_mode = OverflowMode.TRUNCATE
    subject, text = (part.replace("@", "@\u200b") for part in (subject, text))
    if not service.notify(title=subject, body=text, body_format=NotifyFormat.TEXT):
        raise TransientError(
            f"{service.service_name} did not accept the message",
            advice="to see the reason, run `apprise -vv -b test ADDRESS` with its address from QA_NOTIFY_URLS",
        )


def _text(run: dg.DagsterRun, lines: list[str], dagster_url: str) -> str:
    base = dagster_url.rstrip("/")
    link = f"{base}/runs/{run.run_id}" if base else f"run {run.run_id}"
    return f"{_plain(lines)}\n\n{run.job_name}, {link}"


def _plain(lines: list[str]) -> str:
    """Lines that may name files: cut, and without anything that a chat would make a link of."""
    return _LINKS.sub("\u200b", "\n".join(lines)[:_TEXT_LIMIT])


def _slack_text(text: str) -> str:
    # The characters that Slack requires to be escaped.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
