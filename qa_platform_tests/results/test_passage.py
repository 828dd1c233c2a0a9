"""Excerpts of text for display, cut to a length."""

from hypothesis import given
from hypothesis import strategies as st

from qa_platform.results.passage import Passage

# Text that PostgreSQL can hold.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.sampled_from(
    ["line\nbreak\r\n\u2028\x00", "right\u202eto left"]
)


def test_a_passage_is_cut_around_its_piece() -> None:
    passage = Passage("An engraver and showman, ", "Henry Winstanley", ", built the first tower on the reef.")
    assert passage.shown(120) == "An engraver and showman, Henry Winstanley, built the first tower on the reef."
    assert passage.shown(60) == "…and showman, Henry Winstanley, built the first tower on…"
    assert passage.shown(30) == "…Henry Winstanley, built the…"
    assert passage.shown(14) == "Henry…"


@given(texts, texts, texts, st.integers(20, 120))
def test_the_piece_of_a_passage_stays_in_sight(before: str, piece: str, after: str, characters: int) -> None:
    shown = Passage(before, piece, after).shown(characters)
    assert len(shown) <= characters
    whole = Passage("", piece, "").shown(len(piece))
    assert whole in shown or len(whole) > characters - 4
