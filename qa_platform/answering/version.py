"""The version of a file's answers, which Dagster compares, and what of it is known before a model is loaded."""

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
    """The revision of the bundled model, which comes with the package; "" for other models."""
    return bundled_revision() if wanted.id == BUNDLED else ""


def unstated_version(wanted: ModelChoice) -> str:
    """What the version of answers says beyond ``wanted``; "" if nothing."""
    code = "" if _ANSWERING_VERSION == 1 else str(_ANSWERING_VERSION)
    return "-".join(filter(None, [code, known_revision(wanted)]))
