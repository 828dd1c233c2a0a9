"""The certificates of the connections to PostgreSQL and Pachyderm: none expires soon."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from qa_platform.cli.doctor.findings import Part, Result, ok, unknown, wrong
from qa_platform.errors import InputError
from qa_platform.settings import PachydermSettings, PostgresSettings

if TYPE_CHECKING:
    from qa_platform.clients.credentials import CertificateEnd

_SOON = timedelta(days=30)


def _examine() -> Iterator[Result]:
    from qa_platform.clients.credentials import certificate_ends

    try:
        ends = certificate_ends(PostgresSettings(), PachydermSettings())
    except InputError as error:
        # The part that connects with it reports the fix.
        yield unknown(f"not checked: {error.cause}")
        return
    now = datetime.now(UTC)
    soon = [end for end in ends if end.ends_at - now < _SOON]
    if soon:
        variables = ", ".join(end.variable for end in soon)
        yield wrong("; ".join(_told(end, now) for end in soon), f"get new certificates, and set {variables} to them")
    else:
        yield ok("; ".join(_told(end, now) for end in ends) or "none is configured")


def _told(end: "CertificateEnd", now: datetime) -> str:
    verb = "ended" if end.ends_at <= now else "ends"
    return f"{end.variable} ({end.subject}) {verb} on {end.ends_at:%Y-%m-%d}"


PART = Part(("certificates",), _examine, lambda: "the files of the certificates")
