"""The version of a file's answers: what the same upload must have been answered with to need no new answers."""

from qa_platform.answering.model import BUNDLED, bundled_revision
from qa_platform.contract import ModelChoice

# Incremented when the same model would give different answers. Files answered before are then stale in Dagster.
_ANSWERING_VERSION = 1


def code_version(wanted: ModelChoice, *, revision_of_bundled: str) -> str:
    """The version of a file's answers: the code's version, and the wanted model with its revision, precision and no-answer threshold."""
    revision = revision_of_bundled if wanted.id == BUNDLED else wanted.revision
    threshold = "" if wanted.no_answer_threshold is None else f"-no_answer>{wanted.no_answer_threshold}"
    return f"{_ANSWERING_VERSION}-{wanted.id}{f'@{revision}' if revision else ''}-{wanted.precision}{threshold}"


def current_code_version(wanted: ModelChoice) -> str:
    """The code version of files answered from now on."""
    return code_version(wanted, revision_of_bundled=bundled_revision())


def known_revision(wanted: ModelChoice) -> str:
    """The revision that will answer, as far as it is known before the model is loaded; else empty."""
    return bundled_revision() if wanted.id == BUNDLED else ""
