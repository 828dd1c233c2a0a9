"""Tables and pictures for Dagster's pages: cells are always shown as text, and everything is small enough to be shown in place."""

import re
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qa_platform.orchestration.reports.markdown import INLINE_LIMIT, bar_chart, cell, histogram, table
from qa_platform.orchestration.reports.uploads import object_link

HOSTILE = [
    "a | b || c \\| d \\",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "**bold** _it_ ~~no~~ `code` $x$ &amp; &#60;b&#62;",
    "[link](javascript:alert(1)) ![picture](http://example.org/x.png) <http://example.org>",
    "line\nbreak\r\n| --- |\u2028# heading\x00",
    "right\u202eto left",
    "",
]

# Text that PostgreSQL can hold.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.sampled_from(HOSTILE)


def rendered(markdown: str) -> str:
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    # Links and pictures of any kind, which this parser would else refuse by itself.
    parser.validateLink = lambda url: True  # type: ignore[method-assign]
    return parser.render(markdown)


def tags(html: str) -> set[str]:
    return set(re.findall(r"<(\w+)", html))


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_cells_stay_text_whatever_they_hold(rows: list[tuple[str, str]]) -> None:
    markdown = table(("question", "answer"), rows)
    html = rendered(markdown)
    assert tags(html) <= {"table", "thead", "tbody", "tr", "th", "td", "p"}
    shown = html.count("<tr>") - 1
    assert html.count("<td>") == 2 * shown
    assert shown == len(rows) or f"and {len(rows) - shown} more" in html
    assert len(markdown.encode("utf-16-le")) // 2 < INLINE_LIMIT


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_reads_as_the_text_it_was(text: str) -> None:
    html = rendered(f"| x |\n|---|\n| {cell(text)} |")
    (shown,) = re.findall("<td>(.*?)</td>", html) or [""]
    plain = shown.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&").replace("\u200b", "")
    assert plain == " ".join(re.sub("[\x00\u202e\u2028]", " ", text).split())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no longer than it may", "no longer than it may"),
        ("no longer than it may be", "no longer than it may…"),
        ("no longer than it mayhap", "no longer than it…"),
        ("a name-" + "x" * 60, "a name-xxxxxxxxxxxxxx…"),
        ("x" * 60, "x" * 21 + "…"),
    ],
)
def test_a_cell_is_cut_between_words_where_there_are_any(text: str, shown: str) -> None:
    assert cell(text, characters=22) == shown


def test_addresses_in_cells_do_not_become_links() -> None:
    assert "://" not in cell("http://example.org")
    assert "www." not in cell("see www.example.org")
    assert "a@" not in cell("a@example.org")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_link_to_an_object_is_one_link_whatever_the_object_is_called(name: str) -> None:
    bucket = storage.Client("test", AnonymousCredentials()).bucket("b")
    html = rendered(str(object_link(bucket, f"incoming/{name}").value))
    assert tags(html) == {"p", "a"}
    [address] = re.findall('href="(.*?)"', html)
    assert address == f"https://console.cloud.google.com/storage/browser/_details/b/{quote(f'incoming/{name}')}"


def test_a_name_that_browsers_would_resolve_is_no_link() -> None:
    bucket = storage.Client("test", AnonymousCredentials()).bucket("b")
    for name in ("incoming/../../other/a.csv", "incoming/./a.csv"):
        assert tags(rendered(str(object_link(bucket, name).value))) == {"p"}


def test_a_table_of_long_cells_cuts_them_and_counts_the_rows_that_do_not_fit() -> None:
    text = table(("a", "b"), [("x" * 500, "|" * 500)] * 40)
    assert len(text) < INLINE_LIMIT
    assert re.search(r"and \d+ more$", text)
    assert table(("a",), []) == "none"


@given(st.lists(st.integers(0, 10**9), min_size=20, max_size=20), st.floats(0, 1))
def test_a_histogram_is_an_inline_picture_with_a_bar_for_every_part_that_has_answers(counts: list[int], low: float) -> None:
    markdown = histogram(counts, low=low)
    assert len(markdown) < INLINE_LIMIT
    (source,) = re.findall(r"\(<data:image/svg\+xml,([^<>]*)>\)$", markdown)
    svg = ElementTree.fromstring(unquote(source))
    bars = "".join(path.get("d", "") for path in svg.findall("{*}path"))
    assert bars.count("M") == sum(1 for count in counts if count)
    assert "<img" in rendered(markdown)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=14, max_size=14))
def test_a_bar_chart_is_an_inline_picture_whose_upper_bars_stand_on_the_lower_ones(bars: list[tuple[int, int]]) -> None:
    markdown = bar_chart(bars, "rows by day", "16 Nov", "today")
    assert len(markdown) < INLINE_LIMIT
    (source,) = re.findall(r"\(<data:image/svg\+xml,([^<>]*)>\)$", markdown)
    svg = ElementTree.fromstring(unquote(source))
    paths = "".join(path.get("d", "") for path in svg.findall("{*}path"))
    drawn = [(int(x), int(bottom), int(top)) for x, bottom, top in re.findall(r"M(\d+) (\d+)V(\d+)h", paths)]
    assert len(drawn) == sum(1 for bar in bars for count in bar if count)
    assert all(top < bottom for _, bottom, top in drawn)
    assert [text.text for text in svg.findall(".//{*}text")] == [f"{max(map(sum, bars)) or 1:,}", "16 Nov", "today"]


def test_half_a_surrogate_pair_is_left_out() -> None:
    # A gold set's cell `["Ada \\ud83d"]` is JSON for one.
    assert table(("right",), [("Ada \ud83d",)]) == "| right |\n|---|\n| Ada |"
