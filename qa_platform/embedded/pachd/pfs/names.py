"""Names, ids and paths: validation and creation."""

import re
import uuid

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.storage.trees import DEFAULT_TAG

_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_COMMIT_ID = re.compile(r"[0-9a-f]{12}4[0-9a-f]{19}")
_GLOB_CHARACTERS = "*?[]{}!()@+^"


def new_id() -> str:
    """A new id for a commit or a set of commits."""
    return uuid.uuid4().hex


def is_commit_id(text: str) -> bool:
    """Whether a text has the form of a commit id."""
    return _COMMIT_ID.fullmatch(text) is not None


def begins_with_commit_id(text: str) -> bool:
    """Whether a text is a commit id, with or without an ancestry."""
    return _COMMIT_ID.match(text) is not None


def tag_of(datum: str) -> str:
    """The tag of the file parts that a datum writes."""
    return datum or DEFAULT_TAG


def check_name(name: str) -> None:
    """Refuse an invalid name for a project, repo, branch or pipeline.

    Raises:
        PachError: the name is invalid.
    """
    if not _NAME.fullmatch(name):
        raise PachError(f"name ({name}) invalid: only alphanumeric characters, underscores, and dashes are allowed")


def check_path(path: str) -> str:
    """The path in its normal form: with a leading slash, and with a trailing one if it names a folder.

    Raises:
        PachError: the path has characters or segments that are not allowed.
    """
    if not path.isascii() or not path.isprintable():
        raise PachError(f"path ({path}) invalid: only printable ASCII characters allowed")
    for character in path:
        if character in _GLOB_CHARACTERS:
            raise PachError(f"path ({path}) invalid: globbing character ({character}) not allowed in path")
    segments = path.split("/")
    if "." in segments or ".." in segments:
        raise PachError(f"path ({path}) invalid: relative file paths are not allowed")
    return "/" + "/".join(segment for segment in segments if segment) + ("/" if path.endswith("/") and path.strip("/") else "")
