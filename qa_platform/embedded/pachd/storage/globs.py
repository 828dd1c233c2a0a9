"""Pachyderm's glob patterns: ``*``, ``**``, ``?``, ``[a-z]``, ``[!a]``, ``{a,b}``, and groups such as ``(…)``, ``@(a|b)``, ``?(…)``.

A pattern matches whole paths of files and folders (of folders without the trailing slash). ``/`` matches only the root.
"""

import re
from collections.abc import Iterator

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.storage.trees import Found, TreeStore

_SPECIAL = re.compile(r"[*?\[\]{}()!@+^\\]")
_REPEATS = {"@": "", "?": "?", "*": "*", "+": "+"}


def is_glob(pattern: str) -> bool:
    """Whether a text contains characters that are special in patterns."""
    return _SPECIAL.search(pattern) is not None


def clean(pattern: str) -> str:
    """A pattern with one leading slash and no trailing one; ``/`` for the root."""
    return "/" + pattern.strip("/")


def match(store: TreeStore, node: str | None, pattern: str) -> Iterator[Found]:
    """The matching files and folders of a tree, ordered by path.

    Args:
        node: the root of the tree; None for a tree without files.

    Raises:
        PachError: the pattern is malformed.
    """
    root = store.find(node, "/")
    if root is None:
        return
    pattern = clean(pattern)
    if pattern == "/":
        yield root
    elif "**" in pattern or re.search(r"[{(\[][^})\]]*/", pattern):
        whole = translate(pattern)
        yield from (found for found in store.walk(root) if found.path != "/" and whole.fullmatch(found.path.rstrip("/")))
    else:
        yield from _by_segment(store, root, [translate(segment) for segment in pattern[1:].split("/")])


def _by_segment(store: TreeStore, folder: Found, segments: list[re.Pattern[str]]) -> Iterator[Found]:
    for child in store.list(folder):
        name = child.path[len(folder.path) :].rstrip("/")
        if not segments[0].fullmatch(name):
            continue
        if len(segments) == 1:
            yield child
        elif child.is_dir:
            yield from _by_segment(store, child, segments[1:])


def translate(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern.

    Raises:
        PachError: the pattern is malformed.
    """
    try:
        text, rest = _sequence(pattern, 0, stop="")
        if rest != len(pattern):
            raise PachError(f"cannot parse glob {pattern!r}: unexpected {pattern[rest]!r}")
        return re.compile(text, re.DOTALL)
    except (re.error, IndexError) as error:
        raise PachError(f"cannot parse glob {pattern!r}: {error}") from error


def _sequence(pattern: str, at: int, *, stop: str) -> tuple[str, int]:
    out = []
    while at < len(pattern) and pattern[at] not in stop:
        character = pattern[at]
        if character in "@?*+!" and pattern[at + 1 : at + 2] == "(":
            inner, at = _alternatives(pattern, at + 2, separator="|", end=")")
            out.append(f"(?!(?:{inner})(?:/|$))[^/]*" if character == "!" else f"({inner}){_REPEATS[character]}")
        elif character == "(":
            inner, at = _alternatives(pattern, at + 1, separator="|", end=")")
            out.append(f"({inner})")
        elif character == "{":
            inner, at = _alternatives(pattern, at + 1, separator=",", end="}")
            out.append(f"(?:{inner})")
        elif pattern.startswith("**", at):
            out.append(".*")
            at += 2
        elif character == "*":
            out.append("[^/]*")
            at += 1
        elif character == "?":
            out.append("[^/]")
            at += 1
        elif character == "[":
            end = pattern.index("]", at + 2) if "]" in pattern[at + 2 :] else -1
            if end < 0:
                raise PachError(f"cannot parse glob {pattern!r}: '[' without ']'")
            body = pattern[at + 1 : end].replace("\\", "\\\\")
            out.append(f"[^/{body[1:]}]" if body[0] in "!^" else f"[{body}]")
            at = end + 1
        elif character == "\\" and at + 1 < len(pattern):
            out.append(re.escape(pattern[at + 1]))
            at += 2
        else:
            out.append(re.escape(character))
            at += 1
    return "".join(out), at


def _alternatives(pattern: str, at: int, *, separator: str, end: str) -> tuple[str, int]:
    options = []
    while True:
        text, at = _sequence(pattern, at, stop=separator + end)
        options.append(text)
        if at >= len(pattern):
            raise PachError(f"cannot parse glob {pattern!r}: {end!r} is missing")
        at += 1
        if pattern[at - 1] == end:
            return "|".join(options), at
