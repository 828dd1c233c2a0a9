"""The sample files match their description in samples/README.md."""

import csv
import io
import json
import struct
import zlib

import pytest

from qa_platform_tests.checkout import PROJECT

SAMPLES = PROJECT / "samples"

# The damaged data rows of customer_letters.csv, counted from 1.
DAMAGED = {5: "empty question", 9: "blank context", 14: "too few cells", 18: "too many cells", 22: "blank question"}


def records(name: str) -> tuple[list[str], list[list[str]]]:
    """The header and the data rows, as Python's strict CSV reader sees them."""
    text = (SAMPLES / name).read_bytes().decode("utf-8-sig")
    header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    return header, rows


def damage(header: list[str], row: list[str]) -> str | None:
    """What is wrong with a row, or None."""
    if len(row) != len(header):
        return "too few cells" if len(row) < len(header) else "too many cells"
    cells = dict(zip(header, row, strict=True))
    for column in ("question", "context"):
        if not cells[column].strip():
            return f"blank {column}" if cells[column] else f"empty {column}"
    return None


def good_pairs(name: str) -> list[tuple[str, str]]:
    header, rows = records(name)
    question, context = header.index("question"), header.index("context")
    return [(row[question], row[context]) for row in rows if damage(header, row) is None]


@pytest.mark.parametrize(
    ("name", "header", "rows", "contexts"),
    [
        ("lighthouses.csv", ["question", "context"], 45, 8),
        ("field_notes.csv", ["id", "context", "question", "topic"], 50, 9),
        ("customer_letters.csv", ["letter", "question", "context"], 25, 6),
    ],
)
def test_csv_has_its_columns_rows_and_contexts(name: str, header: list[str], rows: int, contexts: int) -> None:
    found_header, found_rows = records(name)
    assert found_header == header
    assert len(found_rows) == rows
    assert len({context for _, context in good_pairs(name)}) == contexts


def test_lighthouses_is_plain() -> None:
    content = (SAMPLES / "lighthouses.csv").read_bytes()
    header, rows = records("lighthouses.csv")
    assert not content.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in content
    assert content.count(b"\n") == len(rows) + 1
    assert [damage(header, row) for row in rows] == [None] * len(rows)


def test_field_notes_has_every_lawful_oddity() -> None:
    content = (SAMPLES / "field_notes.csv").read_bytes()
    header, rows = records("field_notes.csv")
    text = content.decode("utf-8-sig")
    assert content.startswith(b"\xef\xbb\xbf")
    assert content.count(b"\r\n") == len(rows) + 1
    assert any("\n" in row[header.index("context")] for row in rows)
    assert all(oddity in text for oddity in ('""', "🐝", "ö", "قهوة", "富士山", "ὀκτώπους"))
    assert len({row[header.index("id")] for row in rows}) == len(rows)
    assert [damage(header, row) for row in rows] == [None] * len(rows)


def test_customer_letters_is_damaged_in_the_rows_that_the_readme_names() -> None:
    header, rows = records("customer_letters.csv")
    kinds = {number: damage(header, row) for number, row in enumerate(rows, start=1)}
    assert {number: kind for number, kind in kinds.items() if kind} == DAMAGED


def test_holiday_photo_is_a_whole_png() -> None:
    content = (SAMPLES / "holiday_photo.csv").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) < 1000
    kinds, position = [], 8
    while position < len(content):
        (length,) = struct.unpack_from(">I", content, position)
        body = content[position + 4 : position + 8 + length]
        assert struct.unpack_from(">I", content, position + 8 + length) == (zlib.crc32(body),)
        kinds.append(body[:4])
        position += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


def test_gold_has_every_good_question_once_and_in_order() -> None:
    _, rows = records("gold.csv")
    expected = [pair for name in ("lighthouses.csv", "field_notes.csv", "customer_letters.csv") for pair in good_pairs(name)]
    assert [(question, context) for question, context, _ in rows] == expected
    assert len(expected) == 115
    assert len({question for question, _ in expected}) == len(expected)


def test_gold_answers_are_short_pieces_of_their_contexts() -> None:
    header, rows = records("gold.csv")
    assert header == ["question", "context", "answers"]
    for question, context, cell in rows:
        answers = json.loads(cell)
        assert answers, question
        for answer in answers:
            assert answer, question
            assert answer == answer.strip(), question
            assert answer in context, (question, answer)
            assert len(answer.split()) <= 7, (question, answer)
