"""Text for people: in a terminal, a log, a page of Dagster, a notification or a report."""

import shlex


def escaped(text: str, *, keep: str = "") -> str:
    """Escape characters that would control a terminal or a page: control characters, line separators, changes of direction.

    Every character that Unicode does not count as printable becomes a Python escape, such as ``\\x1b`` or ``\\u202e``. Names of objects,
    cells and other servers' messages may contain any of them, and also surrogates, which stand for bytes that are not UTF-8.

    Args:
        keep: characters that stay as they are, such as the line ends of a message.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def as_argument(name: str) -> str:
    """A file's name as an argument of a command that people copy into a shell. Options stand before it."""
    return ("-- " if name.startswith("-") else "") + shlex.quote(escaped(name))


def escaped_lines(text: str) -> str:
    """`escaped` for a message of several lines: line feeds stay."""
    return escaped(text, keep="\n")


def escaped_json(text: str) -> str:
    """`escaped` for a JSON document on one line. It uses JSON's own escapes, so the values stay the same."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    code = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{code[at : at + 2].hex()}" for at in range(0, len(code), 2))
