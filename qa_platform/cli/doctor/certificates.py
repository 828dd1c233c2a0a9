"""The certificates of the connections to PostgreSQL and Pachyderm: none expires soon."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from qa_platform.cli.doctor.findings import Part, Result, ok, unknown, wrong
from qa_platform.errors import InputError
from qa_platform.settings import PachydermSettings, PostgresSettings

if TYPE_CHECKING:
    from qa_platform.clients.credentials import CertificateExpiry

_SOON = timedelta(days=30)


def _examine() -> Iterator[Result]:
    from qa_platform.clients.credentials import certificate_expiries

    try:
        expiries = certificate_expiries(PostgresSettings(), PachydermSettings())
    except InputError as error:
        # The part that connects with it reports the fix.
        yield unknown(f"not checked: {error.cause}")
        return
    now = datetime.now(UTC)
    soon = [expiry for expiry in expiries if expiry.expires_at - now < _SOON]
    if soon:
        variables = ", ".join(expiry.variable for expiry in soon)
        yield wrong("; ".join(_description(expiry, now) for expiry in soon), f"get new certificates, and set {variables} to them")
    else:
        yield ok("; ".join(_description(expiry, now) for expiry in expiries) or "none is configured")


def _description(expiry: "CertificateExpiry", now: datetime) -> str:
    verb = "ended" if expiry.expires_at <= now else "ends"
    return f"{expiry.variable} ({expiry.subject}) {verb} on {expiry.expires_at:%Y-%m-%d}"


PART = Part(("certificates",), _examine, lambda: "the files of the certificates")
