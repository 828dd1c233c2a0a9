"""The spans of answers: at the best mention, on whole characters, and on word boundaries only on request."""

import itertools
import time
from typing import Any

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, processors, trainers

from qa_platform.answering import Answer, Answerer, spans
from qa_platform.answering.characters import Characters, loses_letters
from qa_platform.answering.runtimes.base import WindowBatch
from qa_platform.answering.windows import Layout, Tokenized, Window
from qa_platform.contract import RowReason
from qa_platform_tests.answering_models import make_bert, make_tokenizer, model_of, texts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    return Answerer(str(make_bert(tmp_path_factory.mktemp("bert"))), threads=1)


def sure(monkeypatch: pytest.MonkeyPatch, answerer: Answerer, words: dict[str, tuple[float, float]]) -> None:
    """Have the model mark every token of these words: as a start and as an end, with these logits."""
    loaded = model_of(answerer)
    marked = {loaded.tokenizer.token_to_id(word): logits for word, logits in words.items()}
    assert None not in marked

    def run(batch: WindowBatch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        start, end = np.zeros(batch.ids.shape, np.float32), np.zeros(batch.ids.shape, np.float32)
        for word, (as_start, as_end) in marked.items():
            start[batch.ids == word] = as_start
            end[batch.ids == word] = as_end
        return start, end

    monkeypatch.setattr(loaded.runtime, "run", run)


def one(answerer: Answerer, question: str, context: str, **options: Any) -> Answer:
    (answer,) = answerer.answer([(question, context)], **options)
    return answer


# The best mention

# Mentions of the same answer in two windows: a faint one that ; hints at, and a clear one beside !.
FAR = "OLSEN " + ". " * 40 + "Olsen "


def by_the_neighbour(monkeypatch: pytest.MonkeyPatch, answerer: Answerer) -> None:
    """Have the model be unsure of the answer in the first window, and sure of it in the others."""
    loaded = model_of(answerer)
    word = loaded.tokenizer.encode("olsen", add_special_tokens=False).ids
    assert len(word) == 1

    def run(batch: WindowBatch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        logits = np.zeros(batch.ids.shape, np.float32)
        dots = (batch.ids == loaded.tokenizer.token_to_id(".")).sum(axis=1)
        for row in range(len(logits)):
            first_window = batch.ids[row].tolist().index(word[0]) < 5 if word[0] in batch.ids[row] else False
            logits[row, batch.ids[row] == word[0]] = 1 if first_window and dots[row] else 9
        return logits, logits.copy()

    monkeypatch.setattr(loaded.runtime, "run", run)


def test_the_place_and_the_spelling_are_those_of_the_best_mention(tiny: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    by_the_neighbour(monkeypatch, tiny)
    answer = one(tiny, "?", FAR, max_seq_len=24, doc_stride=4, max_answer_len=1)
    assert (answer.answer, answer.start) == ("Olsen", FAR.index("Olsen"))
    assert answer.score > 0.9


def test_the_place_of_the_reference_can_be_asked_for(tiny: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    by_the_neighbour(monkeypatch, tiny)
    answer = one(tiny, "?", FAR, max_seq_len=24, doc_stride=4, max_answer_len=1, best_mention=False)
    assert (answer.answer, answer.start) == ("OLSEN", 0)


def test_the_sum_over_the_mentions_still_ranks_the_answers(tiny: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each ; alone is less likely than the !, the three together are more likely.
    sure(monkeypatch, tiny, {"!": (9.5, 9.5), ";": (9.1, 9.1)})
    answer = one(tiny, "?", "; . ! . ; . ;", top_k=2, max_answer_len=1)
    assert [answer.answer, answer.alternatives[0].text] == [";", "!"]
    assert answer.start == 0


# Whole characters

_SCRIPTS = [
    *["Jose\u0301", "ปี", "ภาษาไทย", "नमस्ते", "क्षि", "வணக்கம்", "ශ්‍රී", "မြန်မာ", "ខ្មែរ", "한국어", "\u1112\u1161\u11ab", "שָׁלוֹם", "مُحَمَّد", "ὰ͂"],
    *[
        "👩\u200d🚀",
        "👍🏽",
        "🇳🇴🇸🇪",
        "❤\ufe0f",
        "1\ufe0f\u20e3",
        "🏴\U000e0067\U000e0062\U000e007f",
        "Z\u0351\u036b\u0343a",
        "a\r\nb",
        "東京",
        "x",
    ],
]
scripts = st.lists(st.one_of(st.sampled_from(_SCRIPTS), st.text(max_size=4)), min_size=1, max_size=12)
joined = scripts.flatmap(lambda words: st.sampled_from(["", " ", ", "]).map(lambda space: space.join(words)))


def borders(text: str) -> set[int]:
    return {0, len(text), *(match.start() for match in regex.finditer(r"\X", text))}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=joined, aligned=st.booleans())
def test_an_answer_neither_begins_nor_ends_within_a_character(tiny: Answerer, context: str, aligned: bool) -> None:
    answer = one(tiny, "Who?", context, top_k=5, align_to_words=aligned)
    if answer.error:
        assert not answer.answer
        return
    for start, end in ((answer.start, answer.end), *((span.start, span.end) for span in answer.alternatives)):
        assert {start, end} <= borders(context)
        assert context[start:end].strip()


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
@given(context=joined)
@settings(max_examples=60, deadline=None)
def test_the_tokens_of_every_tokenizer_lie_on_borders_of_characters(family: str, context: str) -> None:
    encoding = TOKENIZERS[family].encode(context, add_special_tokens=False)
    characters = Characters(encoding, context)
    for token, (left, right) in enumerate(encoding.offsets):
        start, end = characters.char_range(token, token)
        assert {start, end} <= borders(context)
        # No border between a token's own and where it was moved to.
        assert borders(context) & {*range(start + 1, left + 1), *range(right, end)} == set()
        assert start <= left <= right <= end


TOKENIZERS = {family: make_tokenizer(family) for family in ("bert", "roberta", "albert")}


_PIECES = ["🇳", "🇴", "🇳🇴", "🇸🇪🇳", "a", "a", "\u0301", "\u200d", "\u0903", "\u0600", "🏽", "👩", "क", "\u094d", "\u1100", "\r", "\n", " "]


@given(text=st.lists(st.sampled_from(_PIECES), max_size=30).map("".join))
@settings(max_examples=500, deadline=None)
def test_borders_are_those_of_grapheme_clusters(text: str) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    encoding = tokenizer.encode(text)
    assert len(encoding) == len(text)
    characters = Characters(encoding, text)
    clusters = list(itertools.pairwise(sorted(borders(text))))
    for token, (left, right) in enumerate(encoding.offsets):
        of_token = [(start, end) for start, end in clusters if start < right and left < end]
        assert characters.char_range(token, token) == (of_token[0][0], of_token[-1][1])


@pytest.mark.parametrize("unit", ["🇳🇴", "🇳", "👩\u200d", "e\u0301", "क\u094d", "\u0301", "\u1100"])
def test_time_grows_with_the_clusters_and_not_faster(unit: str) -> None:
    encoding = TOKENIZERS["bert"].encode("Marta", add_special_tokens=False)
    taken = []
    for count in (20_000, 80_000):
        text = f"Marta {unit * (count // len(unit))} keeps it."
        began = time.process_time()
        assert len(Characters(encoding, text)._borders) <= len(text) + 1
        taken.append(time.process_time() - began)
    assert taken[1] < taken[0] * 8 + 0.5


@pytest.mark.parametrize("name", ["Jose\u0301", "ปี", "Zoe\u0308\u0323"])
def test_an_answer_has_the_marks_of_its_last_letter(tiny: Answerer, name: str) -> None:
    assert one(tiny, "Who?", name).answer == name


# Letters that a tokenizer loses


def lossy_tokenizer() -> tokenizers.Tokenizer:
    """As RobBERT's: each word gets a space, which is then trimmed from places in a text that has none there."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    parts: list[Any] = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts(300, seed=1), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=True)
    return tokenizer


def test_a_tokenizer_that_loses_letters_is_known_and_no_other() -> None:
    assert Layout.of(lossy_tokenizer()).loses_letters
    assert [family for family, tokenizer in TOKENIZERS.items() if loses_letters(tokenizer)] == []


def test_lost_letters_are_given_back_to_their_words() -> None:
    text = "Marta Olsen a took  over, in 1987"
    encoding = lossy_tokenizer().encode(text, add_special_tokens=False)
    characters = Characters(encoding, text, loses_letters=True)
    words = ["Marta", "Olsen", "a", "took", "over", ",", "in", "1987"]
    found = []
    for token in range(len(encoding)):
        start, end = characters.char_range(*characters.word(token, 0, len(encoding) - 1))
        found.append(text[start:end])
    assert list(dict.fromkeys(found)) == words


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
@given(context=joined, data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_word_is_all_its_tokens_in_the_window(family: str, context: str, data: st.DataObject) -> None:
    encoding = TOKENIZERS[family].encode(context, add_special_tokens=False)
    assume(len(encoding))
    first, token, last = sorted(data.draw(st.tuples(*[st.integers(0, len(encoding) - 1)] * 3)))
    of_word = [i for i in range(first, last + 1) if encoding.word_ids[i] == encoding.word_ids[token]]
    assert Characters(encoding, context).word(token, first, last) == (of_word[0], of_word[-1])


# Words


def test_an_answer_is_widened_to_whole_words_unless_told_otherwise(tiny: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = model_of(tiny).tokenizer
    context = next(
        word for word in ("keeperx", "oldkeeper", "keepers1987") if len(tokenizer.encode(word, add_special_tokens=False).ids) > 1
    )
    first = tokenizer.encode(context, add_special_tokens=False)
    sure(monkeypatch, tiny, {first.tokens[0]: (20, 20)})
    assert one(tiny, "?", context, max_answer_len=1).answer == context
    exact = one(tiny, "?", context, max_answer_len=1, align_to_words=False)
    assert (exact.start, exact.end) == first.offsets[0]
    assert exact.answer != context


@pytest.fixture(scope="module")
def reads_spaces() -> Tokenized:
    """The tokens of "A  B A": each letter, and each space, is one. They are in one window."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    encoding = tokenizer.encode("A  B A")
    return Tokenized((Window(0, np.array(encoding.ids, np.int32), 0, 0, 6),), Characters(encoding, "A  B A"))


def ranked(tokenized: Tokenized, scores: dict[int, float], options: spans.SpanOptions) -> list[tuple[str, int, float]]:
    """The ranked answers where these tokens have these scores, best first."""
    tokens = np.array(list(scores))
    best = spans.WindowSpans(tokens, tokens, np.array(list(scores.values())), 0.0)
    merged = spans.merge("A  B A", tokenized, [best], options)
    return [(span.text, span.start, round(span.score, 6)) for span in merged.spans]


def test_mentions_beyond_the_best_spans_count_only_where_answers_are_widened(reads_spaces: Tokenized) -> None:
    scores = {3: 0.4, 0: 0.3, 5: 0.2}
    assert ranked(reads_spaces, scores, spans.SpanOptions()) == [("A", 0, 0.5)]
    assert ranked(reads_spaces, scores, spans.SpanOptions(align_to_words=False)) == [("B", 3, 0.4)]
    assert ranked(reads_spaces, scores, spans.SpanOptions(top_k=2, align_to_words=False)) == [("B", 3, 0.4), ("A", 0, 0.3)]


def test_where_the_best_spans_are_white_space_the_next_ones_answer(reads_spaces: Tokenized) -> None:
    scores = {1: 0.4, 3: 0.3, 0: 0.2}
    assert ranked(reads_spaces, scores, spans.SpanOptions(align_to_words=False)) == [("B", 3, 0.3)]
    # They do not where a usable text is among the best.
    assert ranked(reads_spaces, scores, spans.SpanOptions(top_k=2, align_to_words=False)) == [("B", 3, 0.3)]


# Questions and contexts that show nothing

INVISIBLE = ["\u200b", "\ufeff", "\u200b\u200d\u2060", "\x07\x1b", "\u0301", "\u0e35\u0301", "\u3164", "\u2800", "\u00ad \u180e", "\ufe0f"]


@pytest.mark.parametrize("text", INVISIBLE)
def test_a_text_that_shows_nothing_is_empty(tiny: Answerer, text: str) -> None:
    assert one(tiny, text, "Marta Olsen").error is RowReason.EMPTY_QUESTION
    assert one(tiny, "Who?", text).error is RowReason.EMPTY_CONTEXT


def test_a_text_that_the_tokenizer_drops_is_empty(tiny: Answerer) -> None:
    assert one(tiny, "\ufffd", "Marta Olsen").error is RowReason.EMPTY_QUESTION
    assert one(tiny, "Who?", "\ufffd").error is RowReason.EMPTY_CONTEXT


# Answers that are none


def test_a_word_that_no_answer_column_holds_has_a_reason_of_its_own(tiny: Answerer) -> None:
    assert one(tiny, "Who?", "x" * 50_000).error is RowReason.UNUSABLE_ANSWER


def test_no_answer_is_said_only_where_it_may_be(tiny: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    sure(monkeypatch, tiny, {"[CLS]": (50, 50)})
    assert one(tiny, "Who?", "x" * 50_000, handle_impossible_answer=True).error is RowReason.NO_ANSWER
    assert one(tiny, "Who?", "x" * 50_000).error is RowReason.UNUSABLE_ANSWER
    assert one(tiny, "Who?", "Marta Olsen").error is None


@pytest.mark.parametrize("logit", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("error")
def test_logits_that_are_not_finite_give_no_answer_and_no_score(tiny: Answerer, monkeypatch: pytest.MonkeyPatch, logit: float) -> None:
    everywhere = dict.fromkeys(model_of(tiny).tokenizer.get_vocab(), (logit, logit))
    sure(monkeypatch, tiny, everywhere)
    for allowed in (True, False):
        answer = one(tiny, "Who?", "Marta Olsen", handle_impossible_answer=allowed, top_k=3)
        assert answer.error is RowReason.UNUSABLE_ANSWER
        assert (answer.score, answer.alternatives, answer.null_margin) == (0.0, (), None)


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_window_whose_logits_are_not_finite_has_no_say(damaged: int) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoding = tokenizer.encode("A B C")
    # A window for each word, at whose token 0 is [CLS].
    windows = tuple(Window(0, np.zeros(2, np.int32), 1, first, 1) for first in range(3))
    logits = np.array([[0, 1], [0, 1], [0, 1]], np.float32)
    logits[damaged] = np.nan
    options = spans.SpanOptions(top_k=4, no_answer_threshold=0.0)
    found = spans.merge(
        "A B C", Tokenized(windows, Characters(encoding, "A B C")), spans.best_spans(logits, logits, windows, options), options
    )
    assert found.margin == pytest.approx(-2)
    assert [span.text for span in found.spans] == [*(word for number, word in enumerate("ABC") if number != damaged), ""]
    assert found.spans[-1].score == pytest.approx(1 / (1 + np.e) ** 2)


def test_a_text_is_as_probable_as_in_all_windows_together_and_no_answer_as_in_the_window_where_it_is_least() -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoding = tokenizer.encode("A B A")
    # A window for each A.
    windows = tuple(Window(0, np.zeros(2, np.int32), 1, first, 1) for first in (0, 2))
    best = [
        spans.WindowSpans(np.array([token]), np.array([token]), np.array([score]), null)
        for token, score, null in ((0, 0.5, 0.1), (2, 0.4, 0.6))
    ]
    options = spans.SpanOptions(top_k=2, no_answer_threshold=0.0)
    found = spans.merge("A B A", Tokenized(windows, Characters(encoding, "A B A")), best, options)
    assert [span.text for span in found.spans] == ["A", ""]
    # One less the probability that it is in neither: 0.5 * 0.6.
    assert [span.score for span in found.spans] == pytest.approx([0.7, 0.1])


def test_a_text_that_is_too_long_is_no_answer_though_a_shorter_one_equals_it_but_for_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """In lower case the first word has as many characters as the second."""
    monkeypatch.setattr(spans, "ANSWER_LIMIT", 3)
    context = "İİ i̇i̇"
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoding = tokenizer.encode(context)
    window = Window(0, np.array(encoding.ids, np.int32), 0, 0, 2)
    assert context[:2].lower() == context[3:].lower()
    best = spans.WindowSpans(np.array([1, 0]), np.array([1, 0]), np.array([0.6, 0.3]), 0.0)
    tokenized = Tokenized((window,), Characters(encoding, context))
    (answer,) = spans.merge(context, tokenized, [best], spans.SpanOptions()).spans
    assert answer.text == context[:2]
    assert answer.score == pytest.approx(0.3)
