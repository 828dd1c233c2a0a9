"""The answering engine: questions and contexts in, answers out, in order, in bounded memory."""

import collections
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qa_platform.answering import auto
from qa_platform.answering.model import ModelFiles, find_model, load_tokenizer
from qa_platform.answering.runtime import Batch, Runtime, available_cores, load_runtime
from qa_platform.answering.spans import Span, SpanOptions, WindowSpans, best_spans, merge
from qa_platform.answering.windows import Layout, Tokenized, Window, WindowSize, tokenize
from qa_platform.contract import ANSWER_LIMIT, CONTEXT_LIMIT, PRECISIONS, QUESTION_LIMIT, ModelChoice, Precision, RowReason
from qa_platform.errors import InputError

if TYPE_CHECKING:
    import tokenizers

_log = logging.getLogger(__name__)

# Rows and characters that are tokenised together. The first chunk is small, so that the first answers come at once; the
# later ones are large enough to sort windows by length, and small enough to bound the memory and to show progress: a
# character that is a token of its own takes hundreds of bytes while it is tokenised.
_FIRST_ROWS = 32
_CHUNK_ROWS = 256
_CHUNK_CHARACTERS = 2**18
# What a caller keeps for the pairs of one chunk, in bytes.
_CHUNK_KEPT = 2**24
# Answers that are remembered, for rows that ask the same again: about their bytes, were each as long as its context.
_REMEMBERED = 2**25
_ANSWER_BYTES = 300


@dataclass(frozen=True)
class Answer:
    """The answer to one row: ``context[start:end] == answer``; ``score`` is a probability in [0, 1].

    ``error`` is None for an answer; NO_ANSWER where the model says that there is none; LOW_SCORE for an answer below the
    wanted score, which is kept; else why the row could not be answered. ``alternatives`` are the next best spans.
    """

    answer: str
    score: float
    start: int
    end: int
    error: RowReason | None = None
    alternatives: tuple[Span, ...] = ()


@dataclass(frozen=True)
class AnswerOptions:
    """What is asked of each row. All but ``min_score`` mean what they mean in the transformers 4.57 question-answering pipeline.

    Args:
        top_k: spans per row; the best is the answer, the others its ``alternatives``.
        handle_impossible_answer: whether the model may say that there is no answer.
        max_answer_len: tokens of an answer, at most.
        max_seq_len: tokens of a window; None takes 384, or less where the model holds less.
        doc_stride: tokens that neighbouring windows share; None takes 128, or half the window if that is less.
        min_score: below it an answer's ``error`` is LOW_SCORE.
    """

    top_k: int = 1
    handle_impossible_answer: bool = False
    max_answer_len: int = 15
    max_seq_len: int | None = None
    doc_stride: int | None = None
    min_score: float = 0.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("top_k", self.top_k, 1),
            ("max_answer_len", self.max_answer_len, 1),
            ("max_seq_len", self.max_seq_len, 1),
            ("doc_stride", self.doc_stride, 0),
        ):
            if value is not None and not (isinstance(value, int) and value >= least):
                raise InputError(f"{name} must be a whole number, {least} or more, and is {value}")
        if not 0 <= self.min_score <= 1:
            raise InputError(f"min_score must be from 0 to 1, and is {self.min_score}")


class _Slot:
    """Where the answer of one distinct pair will be; equal pairs share it. ``weight``: about its bytes, at most."""

    __slots__ = ("answer", "weight")

    def __init__(self, answer: Answer | None, weight: int) -> None:
        self.answer = answer
        self.weight = weight


@dataclass(frozen=True)
class _Asked:
    """A distinct pair that the model is asked about."""

    slot: _Slot
    context: str
    tokenized: Tokenized


_Results = list[tuple[Window, WindowSpans]]


@dataclass(frozen=True)
class _Chunk:
    """Rows on their way: every row's slot, the pairs that are asked, and what the batches will bring."""

    rows: tuple[_Slot, ...]
    asked: tuple[_Asked, ...]
    results: tuple[Future[_Results], ...]


class Answerer:
    """Answers questions from contexts with one extractive model.

    Making one costs nothing; `warm_up` finds and loads the model, once, and is called by whatever needs it.

    Args:
        model: `bundled`, a folder, or a Hugging Face id, or a ModelChoice with revision and precision.
        threads: of this process; 0 takes every core that it may use.
        device: `cpu`, or a GPU as torch names it, `cuda`.

    Raises:
        InputError: ``threads`` is negative.
    """

    def __init__(self, model: ModelChoice | str = "bundled", *, threads: int = 0, device: str = "cpu") -> None:
        if threads < 0:
            raise InputError(f"threads must be 0 or more, and is {threads}")
        self._choice = ModelChoice(model) if isinstance(model, str) else model
        self._threads = threads
        self._device = device
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    @property
    def identity(self) -> ModelChoice:
        """What really answers: the id, the resolved revision (of a folder: its weights' hash), and the precision in use."""
        return self._warm().identity

    @property
    def runtime(self) -> str:
        """What runs the model, with its version."""
        return self._warm().runtime.name

    def warm_up(self) -> None:
        """Find the model and load it, unless that is done.

        Raises:
            InputError: there is no such model, or it cannot be used.
            TransientError: the hub cannot be reached.
        """
        self._warm()

    def answer(
        self,
        pairs: Iterable[tuple[str, str]],
        options: AnswerOptions | None = None,
        *,
        kept: Callable[[], int] = lambda: 0,
        **values: Any,
    ) -> Iterator[Answer]:
        """One answer for every (question, context), in order, as they become known. Consumes ``pairs`` lazily, from another thread.

        What is wrong with a row is its answer's ``error``; nothing in a row raises. What ``pairs`` raises is raised after the
        answers to all that it gave before. Closing the iterator waits for ``pairs`` where that is about to give the next pair.

        Args:
            options: or, instead, the fields of `AnswerOptions` as keywords.
            kept: bytes that the caller keeps until the answer to the pair that ``pairs`` gave last; asked in that other thread,
                after every pair. Where they are many, fewer pairs are read ahead.

        Raises:
            InputError: an option is out of range; at once, not at the first answer.
        """
        if options is not None and values:
            raise TypeError(f"options are given, and {', '.join(values)} besides: give either")
        options = options or AnswerOptions(**values)
        loaded = self._warm()
        longest = loaded.files.longest_window
        size = WindowSize.of(options.max_seq_len or loaded.files.default_window, options.doc_stride)
        if not 0 <= size.stride <= size.length <= longest:
            raise InputError(
                f"doc_stride {size.stride} <= max_seq_len {size.length} <= {longest} does not hold for model {loaded.files.id}"
            )
        spans = SpanOptions(options.top_k, options.max_answer_len, options.handle_impossible_answer)
        return _Run(loaded, size, spans, options.min_score).answers(chunked(pairs, kept))

    def _warm(self) -> "_Loaded":
        with self._lock:
            if self._loaded is None:
                self._loaded = _load(self._choice, threads=self._threads or available_cores(), device=self._device)
            return self._loaded


@dataclass(frozen=True)
class _Loaded:
    files: ModelFiles
    identity: ModelChoice
    tokenizer: "tokenizers.Tokenizer"
    layout: Layout
    runtime: Runtime


def _load(choice: ModelChoice, *, threads: int, device: str) -> _Loaded:
    files = find_model(choice)
    precision = _precision(files, choice.precision, device)
    runtime = load_runtime(files, precision=precision, threads=threads, device=device)
    tokenizer = load_tokenizer(files)
    return _Loaded(files, ModelChoice(files.id, files.revision, precision), tokenizer, Layout.of(tokenizer), runtime)


def _precision(files: ModelFiles, wanted: str, device: str) -> Precision:
    if wanted == "auto":
        return auto.resolve(files, device)
    for precision in PRECISIONS:
        if precision == wanted:
            return precision
    raise InputError(f"model {files.id}: there is no precision {wanted}; take one of {', '.join(PRECISIONS)}, or auto")


class _Run:
    """One call of `Answerer.answer`."""

    def __init__(self, loaded: _Loaded, size: WindowSize, options: SpanOptions, min_score: float) -> None:
        self._loaded = loaded
        self._size = size
        self._options = options
        self._min_score = min_score
        # Touched by the tokenising thread alone.
        self._slots: collections.OrderedDict[bytes, _Slot] = collections.OrderedDict()
        self._weight = 0

    def answers(self, chunks: Iterator[list[tuple[str, str]]]) -> Iterator[Answer]:
        """Two chunks are under way: while one's batches run and are decoded, the next one is read and tokenised."""
        reading = ThreadPoolExecutor(1, "qa-tokenize")
        running = ThreadPoolExecutor(self._loaded.runtime.requests, "qa-infer")
        try:
            coming = reading.submit(self._prepare, chunks, running)
            while (chunk := coming.result()) is not None:
                coming = reading.submit(self._prepare, chunks, running)
                self._finish(chunk)
                for slot in chunk.rows:
                    assert slot.answer is not None
                    yield slot.answer
        finally:
            reading.shutdown(wait=True, cancel_futures=True)
            running.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, chunks: Iterator[list[tuple[str, str]]], running: ThreadPoolExecutor) -> _Chunk | None:
        """Read a chunk, tokenise what must be asked, and hand its batches to the runtime."""
        chunk = next(chunks, None)
        if chunk is None:
            return None
        new: list[tuple[_Slot, tuple[str, str]]] = []
        rows = tuple(self._slot(pair, new) for pair in chunk)
        tokenized = tokenize(self._loaded.tokenizer, self._loaded.layout, [pair for _, pair in new], self._size)
        asked = tuple(_Asked(slot, pair[1], entry) for (slot, pair), entry in zip(new, tokenized, strict=True))
        windows = [window for entry in tokenized for window in entry.windows]
        results = tuple(running.submit(self._infer, batch) for batch in batches(windows, self._loaded.runtime.tokens))
        return _Chunk(rows, asked, results)

    def _slot(self, pair: tuple[str, str], new: list[tuple[_Slot, tuple[str, str]]]) -> _Slot:
        question, context = pair
        digest = hashlib.blake2b(f"{len(question)} {question}{context}".encode(errors="surrogatepass"), digest_size=16).digest()
        slot = self._slots.get(digest)
        if slot is None:
            reason = unanswerable(question, context)
            weight = self._options.top_k * (_ANSWER_BYTES + min(len(context), ANSWER_LIMIT))
            slot = _Slot(_unanswered(reason) if reason else None, weight)
            if not reason:
                new.append((slot, pair))
            self._remember(digest, slot)
        return slot

    def _remember(self, digest: bytes, slot: _Slot) -> None:
        self._slots[digest] = slot
        self._weight += slot.weight
        while self._weight > _REMEMBERED:
            self._weight -= self._slots.popitem(last=False)[1].weight

    def _infer(self, windows: Sequence[Window]) -> _Results:
        start, end = self._loaded.runtime.run(pad(windows, self._loaded.layout))
        return list(zip(windows, best_spans(start, end, windows, self._options), strict=True))

    def _finish(self, chunk: _Chunk) -> None:
        found: dict[int, list[tuple[int, WindowSpans]]] = collections.defaultdict(list)
        for window, spans in itertools.chain.from_iterable(future.result() for future in chunk.results):
            found[window.row].append((window.first, spans))
        for row, asked in enumerate(chunk.asked):
            in_order = [spans for _, spans in sorted(found[row], key=lambda entry: entry[0])]
            asked.slot.answer = self._answer(asked, in_order)

    def _answer(self, asked: _Asked, spans: list[WindowSpans]) -> Answer:
        if asked.tokenized.reason:
            return _unanswered(asked.tokenized.reason)
        ranked = merge(asked.context, asked.tokenized, spans, self._options)
        if not ranked:
            return _unanswered(RowReason.NO_ANSWER)
        best = ranked[0]
        error = None
        if best.start == best.end:
            error = RowReason.NO_ANSWER
        elif best.score < self._min_score:
            error = RowReason.LOW_SCORE
        return Answer(best.text, best.score, best.start, best.end, error, tuple(ranked[1:]))


def _unanswered(reason: RowReason) -> Answer:
    return Answer("", 0.0, 0, 0, reason)


def unanswerable(question: str, context: str) -> RowReason | None:
    """Why a row is not asked at all, judged by its characters."""
    if not question.strip():
        return RowReason.EMPTY_QUESTION
    if not context.strip():
        return RowReason.EMPTY_CONTEXT
    if len(question) > QUESTION_LIMIT:
        return RowReason.QUESTION_TOO_LONG
    if len(context) > CONTEXT_LIMIT:
        return RowReason.CONTEXT_TOO_LONG
    if "\0" in question or "\0" in context:
        return RowReason.NUL_CHARACTER
    if not (_encodable(question) and _encodable(context)):
        return RowReason.LONE_SURROGATE
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def chunked(pairs: Iterable[tuple[str, str]], kept: Callable[[], int] = lambda: 0) -> Iterator[list[tuple[str, str]]]:
    """Consecutive pairs in lists that are bounded in rows, characters and bytes ``kept``, or have one pair; the first one is small.

    What ``pairs`` raises is raised after the pairs that came before.
    """
    chunk: list[tuple[str, str]] = []
    rows, characters, held = _FIRST_ROWS, 0, 0
    try:
        for pair in pairs:
            more, more_held = len(pair[0]) + len(pair[1]), kept()
            if chunk and (characters + more > _CHUNK_CHARACTERS or held + more_held > _CHUNK_KEPT):
                yield chunk
                chunk, rows, characters, held = [], _CHUNK_ROWS, 0, 0
            chunk.append(pair)
            characters, held = characters + more, held + more_held
            if len(chunk) >= rows:
                yield chunk
                chunk, rows, characters, held = [], _CHUNK_ROWS, 0, 0
    except Exception:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def batches(windows: Sequence[Window], tokens: int) -> Iterator[list[Window]]:
    """Windows of like length together, the longest first, at most ``tokens`` tokens a batch, padding included."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def pad(windows: Sequence[Window], layout: Layout) -> Batch:
    """A batch from windows; padding has token 0, which is masked."""
    lengths = np.array([len(window.ids) for window in windows], np.int32)
    ids = np.zeros((len(windows), int(lengths.max())), np.int32)
    types = np.full(ids.shape, layout.question_type, np.int32)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = window.ids
        types[row, window.offset :] = layout.context_type
    return Batch(ids, types, lengths)
