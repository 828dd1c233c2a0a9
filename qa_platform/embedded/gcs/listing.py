"""Listings of objects: ordered by name and generation, in pages, with prefixes, delimiters and globs."""

import base64
import json
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

from qa_platform.embedded.gcs.model import Page, StoredObject, invalid
from qa_platform.embedded.gcs.rows import LIVE_COLUMNS, stored_object

PAGE_LIMIT = 1000


@dataclass(frozen=True)
class Wanted:
    """The parameters of a listing.

    Attributes:
        prefix: list only names that begin with it.
        delimiter: fold names that contain it after the prefix into prefixes.
        start: the first name.
        end: the first name that is no longer listed.
        glob: list only names that match it.
        versions: also list generations that are no longer live.
        soft_deleted: list only soft-deleted generations.
        trailing_delimiter: also list names that end with their first delimiter.
        folders: managed folders, which are listed as prefixes.
        limit: the most objects and prefixes of the page; 0 for PAGE_LIMIT.
        token: the token of the previous page; empty for the first page.
    """

    prefix: str = ""
    delimiter: str = ""
    start: str = ""
    end: str = ""
    glob: str = ""
    versions: bool = False
    soft_deleted: bool = False
    trailing_delimiter: bool = False
    folders: tuple[str, ...] = ()
    limit: int = 0
    token: str = ""


def page(index: sqlite3.Connection, bucket: str, wanted: Wanted) -> Page:
    """One page of a listing, in the order of the names' UTF-8 bytes.

    Raises:
        StorageError: 400 the token or the glob is malformed, or both versions and soft-deleted objects are requested.
    """
    if wanted.versions and wanted.soft_deleted:
        raise invalid("A listing has versions or softDeleted, not both.")
    limit = min(wanted.limit, PAGE_LIMIT) if wanted.limit > 0 else PAGE_LIMIT
    matches = glob_pattern(wanted.glob).fullmatch if wanted.glob else None
    name, generation, group = _parse_token(wanted.token)
    last = wanted.token
    objects: list[StoredObject] = []
    prefixes: list[str] = []
    for stored in _from(index, bucket, max(wanted.prefix, wanted.start, name or group), wanted):
        if not stored.name.startswith(wanted.prefix) or (wanted.end and stored.name.encode() >= wanted.end.encode()):
            break
        is_before = stored.name == name and stored.generation <= generation
        is_folded = bool(group) and stored.name.startswith(group)
        if is_before or is_folded or (matches and not matches(stored.name)):
            continue
        if len(objects) + len(prefixes) >= limit:
            return Page(tuple(objects), tuple(prefixes), last)
        if folder := _folder(stored.name, wanted):
            group = folder
            prefixes.append(folder)
            last = _token("", 0, folder)
        if not folder or (wanted.trailing_delimiter and stored.name == folder):
            objects.append(stored)
            last = _token("", 0, folder) if folder else _token(stored.name, stored.generation, "")
    prefixes += [folder for folder in wanted.folders if folder.startswith(wanted.prefix) and folder not in prefixes]
    return Page(tuple(objects), tuple(prefixes), None)


def _folder(name: str, wanted: Wanted) -> str:
    """The prefix that a name is folded into; empty if the name itself is listed."""
    if not wanted.delimiter:
        return ""
    head, mark, _ = name[len(wanted.prefix) :].partition(wanted.delimiter)
    return wanted.prefix + head + mark if mark else ""


def _from(index: sqlite3.Connection, bucket: str, first: str, wanted: Wanted) -> Iterator[StoredObject]:
    live = f"select {LIVE_COLUMNS} from object where bucket = :bucket and name >= :first"  # noqa: S608
    past = f"select {LIVE_COLUMNS} from past_object where bucket = :bucket and name >= :first and soft_deleted = :soft"  # noqa: S608
    parts = [past] if wanted.soft_deleted else [live, past] if wanted.versions else [live]
    values = {"bucket": bucket, "first": first, "soft": int(wanted.soft_deleted)}
    for row in index.execute(" union all ".join(parts) + " order by name, generation", values):
        yield stored_object(row)


_GLOB_PARTS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|\{|\}|,|.", re.DOTALL)


def glob_pattern(glob: str) -> re.Pattern[str]:
    """The regular expression of a ``matchGlob``: ``*`` and ``?`` match no slash, ``**`` does, and there are sets and alternatives.

    Raises:
        StorageError: 400 a brace or a set is malformed.
    """
    pattern, depth = "", 0
    for part in _GLOB_PARTS.findall(glob):
        match part:
            case "**/":
                pattern += "(?:.*/)?"
            case "**":
                pattern += ".*"
            case "*":
                pattern += "[^/]*"
            case "?":
                pattern += "[^/]"
            case "{":
                pattern, depth = pattern + "(?:", depth + 1
            case "}" if depth:
                pattern, depth = pattern + ")", depth - 1
            case "," if depth:
                pattern += "|"
            case _ if len(part) > 1:
                negated = part.startswith("[!")
                members = part[2 if negated else 1 : -1]
                pattern += f"[{'^/' if negated else ''}{_escaped_set(members)}]"
            case _:
                pattern += re.escape(part)
    try:
        if depth:
            raise re.error("a brace is not closed")
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise invalid(f"Invalid matchGlob: {glob!r} ({error})") from error


def _escaped_set(members: str) -> str:
    return "".join("\\" + character if character in "\\[]^&~|" else character for character in members)


def _token(name: str, generation: int, group: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([name, generation, group]).encode()).decode()


def _parse_token(token: str) -> tuple[str, int, str]:
    """The last name and generation of the previous page, or the prefix that it ended with; the other one is empty."""
    if not token:
        return "", 0, ""
    try:
        name, generation, group = json.loads(base64.urlsafe_b64decode(token))
        return str(name), int(generation), str(group)
    except (ValueError, TypeError) as error:
        raise invalid("Invalid page token.") from error
