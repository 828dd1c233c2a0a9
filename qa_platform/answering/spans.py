"""From logits to answers, as in the question-answering pipeline of transformers 4.57.

Per window, the start logits and the end logits each get a softmax over the context's tokens and [CLS]. A span's probability is
p(start) * p(end); it has at most ``max_answer_len`` tokens. Spans are ranked by the sums of their logits. float64 adds these without
rounding, so every runtime finds the same spans in the same logits. The best 2 * top_k + 10 spans are widened to whole words; without
widening, only the best top_k count. The probabilities of equal texts, ignoring case, are added up over places and windows, and the
highest sums win. Ties go to the earlier window, then to the earlier place.

Without widening, the pipeline may answer with white space or with nothing. Here such a span is not an answer. If none of the top_k best
spans of any window is usable, the answer comes from the remaining spans.

A text gets the place, and so the spelling, of its best-scored mention. The pipeline gives the place in the first window that proposes
the text at all, however unlikely it is there.

The pipeline reports the sum, which may exceed 1 where windows overlap. Here a score is a probability. Within a window spans exclude each
other, so their sum is a probability. Over windows it is 1 - prod(1 - p), the probability that at least one window holds the answer.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qa_platform.answering.characters import Characters
from qa_platform.answering.windows import Tokenized, Window
from qa_platform.contract import ANSWER_LIMIT


@dataclass(frozen=True)
class SpanOptions:
    """How spans become answers. ``top_k``: maximum answers per row. ``max_answer_len``: maximum tokens of an answer.

    ``no_answer_threshold``: "no answer" wins if its log probability exceeds the best text's by more than this; None means that it may
    not win. ``align_to_words``: spans are widened to whole words. ``best_mention``: a text gets the place of its best mention, not of
    its first.
    """

    top_k: int = 1
    max_answer_len: int = 15
    no_answer_threshold: float | None = None
    align_to_words: bool = True
    best_mention: bool = True

    @property
    def candidates(self) -> int:
        """The number of spans taken from each window. It exceeds ``top_k`` because widening to words makes some of them equal."""
        return 2 * self.top_k + 10

    @property
    def counted(self) -> int:
        """The number of candidates that count. The others count only if these hold no usable text."""
        return self.candidates if self.align_to_words else self.top_k


@dataclass(frozen=True)
class WindowSpans:
    """The best spans of one window, best first.

    ``starts`` and ``ends``: the first and last token, counted in the context. ``scores``: probabilities. All have shape (spans,).
    ``null_probability`` is the probability that the window holds no answer. If the logits have no softmax, it is NaN and there are no
    spans.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    scores: NDArray[np.float64]
    null_probability: float


@dataclass(frozen=True)
class Span:
    """An answer, ``text == context[start:end]``, and its probability. "No answer" is an empty text at 0."""

    text: str
    score: float
    start: int
    end: int


@np.errstate(invalid="ignore")
def best_spans(
    start_logits: NDArray[np.float32], end_logits: NDArray[np.float32], windows: Sequence[Window], options: SpanOptions
) -> list[WindowSpans]:
    """The best spans of each window of a batch.

    Args:
        start_logits, end_logits: shape (windows, tokens), padded on the right.
    """
    first = np.array([window.offset for window in windows])[:, None]
    last = first + np.array([window.length for window in windows])[:, None]
    # The columns of the context's tokens: (windows, width).
    width = int((last - first).max())
    columns = first + np.arange(width)
    outside = columns >= last
    columns = np.minimum(columns, start_logits.shape[1] - 1)
    start, start_total = _of_context(start_logits, columns, outside)
    end, end_total = _of_context(end_logits, columns, outside)
    total = start_total + end_total
    scores = _span_scores(start, end, options.max_answer_len)
    rows, positions = _best(scores.reshape(len(windows), -1), options.candidates)
    starts, lengths = np.divmod(positions, scores.shape[2])
    probabilities = np.exp(scores.reshape(len(windows), -1)[rows, positions] - total[rows])
    bounds = np.searchsorted(rows, np.arange(len(windows) + 1)).tolist()
    null = null_probabilities(start_logits[:, 0].astype(np.float64) + end_logits[:, 0], total)
    result = []
    for row, window in enumerate(windows):
        part = slice(bounds[row], bounds[row + 1])
        begin = starts[part] + window.first
        result.append(WindowSpans(begin, begin + lengths[part], probabilities[part], null[row]))
    return result


def null_probabilities(null: NDArray[np.float64], total: NDArray[np.float64]) -> list[float]:
    """`WindowSpans.null_probability` of each window, from the summed logits of [CLS] and the two softmaxes' summed log denominators."""
    return np.exp(np.where(np.isfinite(total), null - total, np.nan)).tolist()


def _of_context(
    logits: NDArray[np.float32], columns: NDArray[np.int64], outside: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The logits of the context's tokens, shape (windows, width), -inf outside; and the log of the softmax's denominator."""
    null = logits[:, 0].astype(np.float64)
    context = np.where(outside, -np.inf, np.take_along_axis(logits, columns, axis=1).astype(np.float64))
    highest = np.maximum(context.max(axis=1), null)
    total = np.log(np.exp(context - highest[:, None]).sum(axis=1) + np.exp(null - highest)) + highest
    # A window whose softmax is not finite gets no spans.
    return np.where(np.isfinite(total)[:, None], context, -np.inf), total


def _span_scores(start: NDArray[np.float64], end: NDArray[np.float64], longest: int) -> NDArray[np.float64]:
    """At [window, s, n], the summed logits of the span of n + 1 tokens from token s; -inf beyond the context."""
    width = start.shape[1]
    longest = min(longest, width)
    padded = np.pad(end, ((0, 0), (0, longest - 1)), constant_values=-np.inf)
    shifted = np.lib.stride_tricks.sliding_window_view(padded, longest, axis=1)
    return start[:, :, None] + shifted


def _best(scores: NDArray[np.float64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows and columns of the ``count`` best finite scores of every row, best first, ties by column."""
    count = min(count, scores.shape[1])
    threshold = np.partition(scores, scores.shape[1] - count, axis=1)[:, scores.shape[1] - count]
    rows, columns = np.nonzero((scores >= threshold[:, None]) & np.isfinite(scores))
    order = np.lexsort((columns, -scores[rows, columns], rows))
    rows, columns = rows[order], columns[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return rows[rank < count], columns[rank < count]


@dataclass(frozen=True)
class Ranked:
    """The best answers of one row, best first; none if no span of the model is usable.

    ``margin`` is the log probability of "no answer" minus that of the best text; None if "no answer" may not win, or no
    window has finite logits.
    """

    spans: list[Span]
    margin: float | None


def merge(context: str, tokenized: Tokenized, spans: Sequence[WindowSpans], options: SpanOptions) -> Ranked:
    """The best answers of one row from the spans of all its windows; at most ``options.top_k``.

    With ``options.no_answer_threshold``, "no answer" competes with the lowest probability that any window gives it. Spans of white
    space, and spans longer than an answer may be, are dropped, so there may be no answer. Windows whose logits are not finite are
    ignored.
    """
    merged = _merged(context, tokenized, spans, options, options.counted)
    if not merged and options.counted < options.candidates:
        merged = _merged(context, tokenized, spans, options, options.candidates)
    ranked = sorted(merged, key=lambda text: -text.total)
    found = [Span(context[m.start : m.end], m.probability, m.start, m.end) for m in ranked[: options.top_k]]
    nulls = [best.null_probability for best in spans if not math.isnan(best.null_probability)]
    if options.no_answer_threshold is None or not nulls:
        return Ranked(found, None)
    null = min(nulls)
    margin = _margin(null, ranked[0].total if ranked else 0.0)
    rank = 0 if margin > options.no_answer_threshold else max(1, sum(m.total >= null for m in ranked))
    found.insert(rank, Span("", null, 0, 0))
    return Ranked(found[: options.top_k], margin)


def _merged(context: str, tokenized: Tokenized, spans: Sequence[WindowSpans], options: SpanOptions, count: int) -> "Collection[_Merged]":
    """The usable texts among the best ``count`` spans of each window."""
    assert tokenized.characters is not None
    texts: dict[str, _Merged] = {}
    for number, (window, best) in enumerate(zip(tokenized.windows, spans, strict=True)):
        ranges = _char_ranges(tokenized.characters, window, best, options.align_to_words)
        for (start, end), score in itertools.islice(zip(ranges, best.scores.tolist(), strict=True), count):
            # Looked at first: every window may widen its spans to the same endless word or character.
            if end - start > ANSWER_LIMIT:
                continue
            text = context[start:end].lower()
            if not text or text.isspace():
                continue
            merged = texts.get(text)
            if merged is None:
                merged = texts[text] = _Merged(start, end, score)
            merged.add(number, score)
            if options.best_mention:
                merged.move(start, end, score)
    return texts.values()


def _margin(null: float, best: float) -> float:
    """The log of ``null / best``, which is above 0 exactly if ``null`` is greater. Either may be 0."""
    ratio = null / best if best else math.inf if null else 1.0
    return math.log(ratio) if ratio else -math.inf


class _Merged:
    """Equal texts from several spans: the place of one of them, the sum of their scores, which ranks texts, and their probability."""

    __slots__ = ("_best", "_last", "_none", "_sum", "end", "start", "total")

    def __init__(self, start: int, end: int, score: float) -> None:
        self.start = start
        self.end = end
        self._best = score
        self.total = 0.0
        self._last = -1
        self._sum = 0.0
        self._none = 1.0

    def add(self, window: int, score: float) -> None:
        """Add a span's score. Windows come in order."""
        if window != self._last:
            self._none *= 1.0 - self._sum
            self._last, self._sum = window, 0.0
        self._sum = min(self._sum + score, 1.0)
        self.total += score

    def move(self, start: int, end: int, score: float) -> None:
        """Move to the place of another span, if that has a better score."""
        if score > self._best:
            self.start, self.end, self._best = start, end, score

    @property
    def probability(self) -> float:
        return 1.0 - self._none * (1.0 - self._sum)


def _char_ranges(characters: Characters, window: Window, spans: WindowSpans, align_to_words: bool) -> Iterator[tuple[int, int]]:
    """The beginning and end of each span in the context; when aligned, those of the words that it touches, within the window."""
    words: dict[int, tuple[int, int]] = {}
    known: dict[tuple[int, int], tuple[int, int]] = {}
    for span in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
        if align_to_words:
            for token in span:
                if token not in words:
                    low, high = characters.word(token, window.first, window.first + window.length - 1)
                    words.update(dict.fromkeys(range(low, high + 1), (low, high)))
            tokens = words[span[0]][0], words[span[1]][1]
        else:
            tokens = span
        if tokens not in known:
            known[tokens] = characters.char_range(*tokens)
        yield known[tokens]
