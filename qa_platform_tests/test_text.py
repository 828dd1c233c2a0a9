"""Text for display: a terminal obeys nothing in it, and JSON keeps its values."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_platform.errors import InputError
from qa_platform.text import escaped, escaped_json

ANY = st.text(st.characters(exclude_categories=[]))


@given(ANY)
def test_whatever_a_text_holds_it_is_shown_in_printable_characters(text: str) -> None:
    assert escaped(text).isprintable()
    assert escaped(escaped(text)) == escaped(text)
    assert text.isprintable() is (escaped(text) == text)
    escaped(text).encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("\u202egnp.csv", r"\u202egnp.csv"),
        ("\x1b[2J\x9b\x7f", r"\x1b[2J\x9b\x7f"),
        ("\ud800", r"\ud800"),
        ("\U000e0001", r"\U000e0001"),
        ("Übung 日本.csv", "Übung 日本.csv"),
    ],
)
def test_what_cannot_be_seen_is_written_as_python_writes_it(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_what_is_kept_stays() -> None:
    assert escaped("a\tb\nc\u2028", keep="\n\t") == "a\tb\nc\\u2028"


@given(st.dictionaries(ANY, ANY))
def test_a_json_document_keeps_its_values(values: dict[str, str]) -> None:
    line = escaped_json(json.dumps(values, ensure_ascii=False))
    assert line.isprintable()
    assert json.loads(line) == values


def test_an_error_shows_the_names_it_quotes_escaped() -> None:
    error = InputError("it is\nno CSV", where="a\u202eb", advice="give \u2028 up")
    assert str(error) == "a\\u202eb: it is\nno CSV; give \\u2028 up"
    assert error.where == "a\u202eb"
