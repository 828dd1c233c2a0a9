"""The variables of the code location: whether Dagster's runs can use them.

Variables that name a service are checked by the part that connects to it.
"""

from collections.abc import Callable, Iterator

from qa_platform.cli.doctor.findings import Part, Result, ok, wrong
from qa_platform.errors import InputError
from qa_platform.settings import (
    SETTINGS_ADVICE,
    CatalogSettings,
    CheckSettings,
    ExecutionSettings,
    IngestSettings,
    ModelSettings,
    NotificationSettings,
    WorkSettings,
    settings_errors,
)

_SETTINGS = (IngestSettings, WorkSettings, CatalogSettings, CheckSettings, NotificationSettings, ExecutionSettings)
_READ: tuple[Callable[[], object], ...] = (lambda: ModelSettings().pinned, *_SETTINGS)
# The names of the settings that this part checks: it explains their errors, whichever part comes across them.
CHECKED = frozenset(settings.__name__ for settings in (ModelSettings, *_SETTINGS))


def _examine() -> Iterator[Result]:
    found = [error for read in _READ if (error := _error_of(read))]
    if not found:
        yield ok("all are valid")
        return
    advice = dict.fromkeys(error.advice for error in found)
    yield wrong("; ".join(error.cause for error in found), "; ".join(advice) or SETTINGS_ADVICE)


def _error_of(read: Callable[[], object]) -> InputError | None:
    try:
        with settings_errors():
            read()
    except InputError as error:
        return error
    return None


PART = Part(("variables",), _examine, lambda: "the environment")
