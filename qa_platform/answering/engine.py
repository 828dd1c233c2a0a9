"""The answering engine: questions and contexts in, answers out, in order, in bounded memory."""

import collections
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from qa_platform.answering.calibration import Calibration
from qa_platform.answering.chunks import ChunkSize, batches, chunked
from qa_platform.answering.model import ModelFiles, find_model, load_tokenizer
from qa_platform.answering.processes import Processes, processes_for
from qa_platform.answering.runtimes.base import Runtime, pad
from qa_platform.answering.runtimes.select import available_cores, load_runtime
from qa_platform.answering.spans import Span, SpanOptions, WindowSpans, merge
from qa_platform.answering.tuned import tuned_precision, tuned_threshold
from qa_platform.answering.windows import Layout, Tokenized, Window, WindowSize, tokenize
from qa_platform.contract import ANSWER_LIMIT, PRECISIONS, ModelChoice, Precision, RowReason
from qa_platform.errors import InputError
from qa_platform.ingest.rules import fault_of_pair

if TYPE_CHECKING:
    import tokenizers

_log = logging.getLogger(__name__)

# Bytes for the answers that are cached for repeated pairs. Each answer is counted as if it were as long as its context.
_REMEMBERED = 2**25
_ANSWER_BYTES = 300
_TRIAL = ("Who?", "Ada.")


@dataclass(frozen=True)
class Answer:
    """The answer to one row: ``context[start:end] == answer``, and ``score`` is a probability in [0, 1].

    ``error`` is None for an answer, NO_ANSWER if the model was allowed to give none and did, and LOW_SCORE for an answer below
    ``min_score``, which is kept. Any other value says why the row could not be answered. ``alternatives`` are the next best spans.

    ``null_margin`` is the log probability of "no answer" minus that of the best span. It is None if the model must give an answer.
    """

    answer: str
    score: float
    start: int
    end: int
    error: RowReason | None = None
    alternatives: tuple[Span, ...] = ()
    null_margin: float | None = None

    @property
    def is_rejected(self) -> bool:
        """Whether the row could not be answered. This is then no verdict of the model."""
        return self.error not in (None, RowReason.NO_ANSWER, RowReason.LOW_SCORE)


@dataclass(frozen=True)
class AnswerOptions:
    """How rows are answered. All options except the last two work as in the question-answering pipeline of transformers 4.57.

    Args:
        top_k: spans per row; the best is the answer, the others its ``alternatives``.
        handle_impossible_answer: whether the model may give no answer. None allows it if the model's choice has a threshold for it.
        max_answer_len: maximum tokens of an answer.
        max_seq_len: tokens of a window; None means 384, or the model's maximum if that is less.
        doc_stride: tokens that neighbouring windows share; None means 128, or half the window if that is less. It is capped at half the
            room that the question leaves.
        align_to_words: widen answers to whole words. Without it, as for languages without spaces, answers end where the model says.
        min_score: an answer with a lower score has the ``error`` LOW_SCORE.
        best_mention: an answer that occurs in several places gets the place of its best mention. If false, it gets the place in the first
            window that proposes it, as in the pipeline.

    Raises:
        InputError: a value is out of range.
    """

    top_k: int = 1
    handle_impossible_answer: bool | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    doc_stride: int | None = None
    align_to_words: bool = True
    min_score: float = 0.0
    best_mention: bool = True

    def __post_init__(self) -> None:
        for name, value, least in (
            ("top_k", self.top_k, 1),
            ("max_answer_len", self.max_answer_len, 1),
            ("max_seq_len", self.max_seq_len, 1),
            ("doc_stride", self.doc_stride, 0),
        ):
            if value is not None and not (isinstance(value, int) and value >= least):
                raise InputError(f"must be a whole number, {least} or more, and is {value}", where=name)
        if not 0 <= self.min_score <= 1:
            raise InputError(f"must be from 0 to 1, and is {self.min_score}", where="min_score")


class _Slot:
    """Holds the answer to one distinct pair; equal pairs share it. ``weight`` is an upper estimate of its bytes."""

    __slots__ = ("answer", "weight")

    def __init__(self, answer: Answer | None, weight: int) -> None:
        self.answer = answer
        self.weight = weight


@dataclass(frozen=True)
class _Asked:
    """A distinct pair that the model is asked."""

    slot: _Slot
    context: str
    tokenized: Tokenized


_Results = list[tuple[Window, WindowSpans]]


@dataclass(frozen=True)
class _Chunk:
    """Rows in progress: every row's slot, the distinct pairs that are asked, and the results of their batches."""

    rows: tuple[_Slot, ...]
    asked: tuple[_Asked, ...]
    results: tuple[Future[_Results], ...]


class Answerer:
    """Answers questions from contexts with one extractive model.

    Creating one is cheap. `warm_up` finds and loads the model once; every method that needs the model calls it.

    Args:
        model: ``bundled``, a folder, or a Hugging Face id; or a ModelChoice with revision and precision.
        threads: threads of each process; 0 means one for every core that this process may use, divided among them.
        device: ``cpu``, or a GPU by its torch name, such as ``cuda``.
        processes: answering processes. 0 means as many as keep the device busy: for a CPU, this process alone. If there are several, each
            imports the main program's file, which needs ``if __name__ == "__main__":``.

    Raises:
        InputError: ``threads`` or ``processes`` is negative.
    """

    def __init__(self, model: ModelChoice | str = "bundled", *, threads: int = 0, device: str = "cpu", processes: int = 1) -> None:
        for name, value in (("threads", threads), ("processes", processes)):
            if value < 0:
                raise InputError(f"must be 0 or more, and is {value}", where=name)
        self._choice = ModelChoice(model) if isinstance(model, str) else model
        self._threads = threads
        self._device = device
        self._processes = processes or processes_for(device)
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    @property
    def identity(self) -> ModelChoice:
        """The model in use: its choice with the resolved revision (for a folder, a hash) and precision."""
        return self._warm().identity

    @property
    def runtime(self) -> str:
        """The library that runs the model, with its version."""
        return self._warm().model.name

    def no_answer_threshold(self, options: AnswerOptions) -> float | None:
        """How far the log probability of "no answer" must exceed the best span's for it to win. None if the model may not give it.

        This is the threshold of the model's choice, else the one that `qa-platform evaluate` stored for the model on this machine, else 0.
        """
        chosen = self._choice.no_answer_threshold
        allowed = options.handle_impossible_answer
        if not (allowed or (allowed is None and chosen is not None)):
            return None
        if chosen is None:
            chosen = tuned_threshold(self._warm().files, self._device)
        return 0.0 if chosen is None else chosen

    def warm_up(self) -> None:
        """Find and load the model, unless it is loaded.

        Raises:
            InputError: there is no such model, or it cannot be used.
            TransientError: the hub is unavailable.
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
        """One answer for every (question, context), in order. Consumes ``pairs`` lazily, in another thread.

        No row raises: one that cannot be answered has the reason in its answer's ``error``. An exception from ``pairs`` is raised after
        the answers to all earlier pairs. Closing the iterator waits until ``pairs`` has yielded the pair in progress.

        Args:
            options: how to answer.
            kept: returns the bytes that the caller holds for the last pair from ``pairs`` until its answer comes. Called after every pair,
                in that other thread. The more bytes are held, the fewer pairs are read ahead.
            values: the fields of `AnswerOptions`, instead of ``options``.

        Raises:
            InputError: an option is out of range. Raised by this call, not at the first answer.
        """
        if options is not None and values:
            raise TypeError(f"both options and {', '.join(values)} are given; give either")
        options = options or AnswerOptions(**values)
        loaded = self._warm()
        longest = loaded.files.longest_window
        size = WindowSize.of(options.max_seq_len or loaded.files.default_window, options.doc_stride)
        if not 0 <= size.stride <= size.length <= longest:
            raise InputError(
                f"doc_stride must be 0 to max_seq_len, and max_seq_len at most {longest}; they are {size.stride} and {size.length}",
                where=f"model {loaded.files.id}",
            )
        spans = SpanOptions(
            top_k=options.top_k,
            max_answer_len=options.max_answer_len,
            no_answer_threshold=self.no_answer_threshold(options),
            align_to_words=options.align_to_words,
            best_mention=options.best_mention,
        )
        return loaded.model.answers(chunked(pairs, kept, loaded.model.chunk), Wanted(size, spans, options.min_score))

    def _warm(self) -> "_Loaded":
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def _load(self) -> "_Loaded":
        files = find_model(self._choice)
        precision = _precision(files, self._choice.precision, self._device)
        identity = replace(self._choice, id=files.id, revision=files.revision, precision=precision)
        threads = self._threads or max(1, available_cores() // self._processes)
        if self._processes == 1:
            return _Loaded(files, identity, LoadedModel.of(files, precision, threads=threads, device=self._device))
        make = partial(_load_again, identity, precision, threads=threads, device=self._device)
        return _Loaded(files, identity, Processes(make, self._processes, self._device, threads=threads))


@dataclass(frozen=True)
class Wanted:
    """How the rows of one call are answered."""

    size: WindowSize
    spans: SpanOptions
    min_score: float


@dataclass(frozen=True)
class LoadedModel:
    """A model in this process. ``name`` is the library that runs it, with its version; ``chunk`` is how much to read ahead."""

    name: str
    chunk: ChunkSize
    tokenizer: "tokenizers.Tokenizer"
    layout: Layout
    runtime: Runtime
    calibration: Calibration

    @classmethod
    def of(cls, files: ModelFiles, precision: Precision, *, threads: int, device: str) -> "LoadedModel":
        runtime = load_runtime(files, precision=precision, threads=threads, device=device)
        tokenizer = load_tokenizer(files)
        layout = Layout.of(tokenizer)
        if not layout.before:
            # Such as GPT-2 and XLNet. A window's scores are relative to that token: without it they would be wrong, and silently so.
            what = "its tokenizer puts no token such as [CLS] before the question"
            raise InputError(what, where=f"model {files.id}", advice="use a model of a family such as BERT or RoBERTa")
        _check_numbers(files, runtime, tokenizer, layout)
        return cls(runtime.name, runtime.chunk, tokenizer, layout, runtime, files.calibration)

    def answers(self, chunks: Iterator[list[tuple[str, str]]], wanted: Wanted) -> Iterator[Answer]:
        """The answers to the rows of all chunks, in order."""
        return _Run(self, wanted).answers(chunks)


def _check_numbers(files: ModelFiles, runtime: Runtime, tokenizer: "tokenizers.Tokenizer", layout: Layout) -> None:
    """Run the model once, because damaged weights would make every row look unanswerable."""
    (row,) = tokenize(tokenizer, layout, [_TRIAL], WindowSize.of(files.default_window, None))
    if row.windows and not all(np.isfinite(logits).all() for logits in runtime.run(pad(row.windows, layout))):
        raise files.damaged_weights()


def _load_again(identity: ModelChoice, precision: Precision, *, threads: int, device: str) -> LoadedModel:
    return LoadedModel.of(find_model(identity), precision, threads=threads, device=device)


@dataclass(frozen=True)
class _Loaded:
    files: ModelFiles
    identity: ModelChoice
    model: LoadedModel | Processes


def _precision(files: ModelFiles, wanted: str, device: str) -> Precision:
    if wanted == "auto":
        return tuned_precision(files, device)
    for precision in PRECISIONS:
        if precision == wanted:
            return precision
    raise InputError(f"there is no precision {wanted}", where=f"model {files.id}", advice=f"use {', '.join(PRECISIONS)} or auto")


class _Run:
    """One call of `Answerer.answer`."""

    def __init__(self, model: LoadedModel, wanted: Wanted) -> None:
        self._model = model
        self._size = wanted.size
        self._options = wanted.spans
        self._min_score = wanted.min_score
        # Used only by the tokenising thread.
        self._slots: collections.OrderedDict[bytes, _Slot] = collections.OrderedDict()
        self._weight = 0

    def answers(self, chunks: Iterator[list[tuple[str, str]]]) -> Iterator[Answer]:
        """Answer with two chunks in progress: while the batches of one run and are decoded, the next one is read and tokenised."""
        reading = ThreadPoolExecutor(1, "qa-tokenize")
        running = ThreadPoolExecutor(self._model.runtime.requests, "qa-infer")
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
        """Read a chunk, tokenise the pairs that must be asked, and give their batches to the runtime."""
        chunk = next(chunks, None)
        if chunk is None:
            return None
        new: list[tuple[_Slot, tuple[str, str]]] = []
        rows = tuple(self._slot(pair, new) for pair in chunk)
        tokenized = tokenize(self._model.tokenizer, self._model.layout, [pair for _, pair in new], self._size)
        asked = tuple(_Asked(slot, pair[1], entry) for (slot, pair), entry in zip(new, tokenized, strict=True))
        windows = [window for entry in tokenized for window in entry.windows]
        runtime = self._model.runtime
        results = tuple(running.submit(self._infer, batch) for batch in batches(windows, runtime.tokens, runtime.requests))
        return _Chunk(rows, asked, results)

    def _slot(self, pair: tuple[str, str], new: list[tuple[_Slot, tuple[str, str]]]) -> _Slot:
        question, context = pair
        digest = hashlib.blake2b(f"{len(question)} {question}{context}".encode(errors="surrogatepass"), digest_size=16).digest()
        slot = self._slots.get(digest)
        if slot is None:
            fault = fault_of_pair(question, context)
            weight = self._options.top_k * (_ANSWER_BYTES + min(len(context), ANSWER_LIMIT))
            slot = _Slot(_unanswered(fault.reason) if fault else None, weight)
            if not fault:
                new.append((slot, pair))
            self._remember(digest, slot)
        return slot

    def _remember(self, digest: bytes, slot: _Slot) -> None:
        self._slots[digest] = slot
        self._weight += slot.weight
        while self._weight > _REMEMBERED:
            self._weight -= self._slots.popitem(last=False)[1].weight

    def _infer(self, windows: Sequence[Window]) -> _Results:
        spans = self._model.runtime.best_spans(pad(windows, self._model.layout), windows, self._options)
        return list(zip(windows, spans, strict=True))

    def _finish(self, chunk: _Chunk) -> None:
        of_row: dict[int, list[tuple[int, WindowSpans]]] = collections.defaultdict(list)
        for window, spans in itertools.chain.from_iterable(future.result() for future in chunk.results):
            of_row[window.row].append((window.first, spans))
        for row, asked in enumerate(chunk.asked):
            in_order = [spans for _, spans in sorted(of_row[row], key=lambda entry: entry[0])]
            asked.slot.answer = self._answer(asked, in_order)

    def _answer(self, asked: _Asked, spans: list[WindowSpans]) -> Answer:
        if asked.tokenized.reason:
            return _unanswered(asked.tokenized.reason)
        ranked = merge(asked.context, asked.tokenized, spans, self._options)
        if not ranked.spans:
            return _unanswered(RowReason.UNUSABLE_ANSWER)
        best, *others = (replace(span, score=self._model.calibration.score(span.score)) for span in ranked.spans)
        error = None
        if best.start == best.end:
            error = RowReason.NO_ANSWER
        elif best.score < self._min_score:
            error = RowReason.LOW_SCORE
        return Answer(best.text, best.score, best.start, best.end, error, tuple(others), ranked.margin)


def _unanswered(reason: RowReason) -> Answer:
    return Answer("", 0.0, 0, 0, reason)
