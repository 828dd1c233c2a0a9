import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from openvino import opset13 as op

from qa_platform.answering import Answer, Answerer, AnswerOptions, chunks
from qa_platform.answering.chunks import ChunkSize, batches, chunked, padded
from qa_platform.answering.model import ModelFiles, find_model, load_tokenizer
from qa_platform.answering.runtimes import int8, openvino
from qa_platform.answering.runtimes.base import WindowBatch, pad, widened
from qa_platform.answering.runtimes.graph import Builder, compile_graph, inputs_of
from qa_platform.answering.spans import Span
from qa_platform.answering.windows import Layout, Window, WindowSize, tokenize
from qa_platform.contract import CONTEXT_LIMIT, PRECISIONS, QUESTION_LIMIT, ModelChoice, Precision, RowReason
from qa_platform.errors import InputError
from qa_platform.evaluation.gold import GoldAnswer, GoldQuestion
from qa_platform.evaluation.tune import tune
from qa_platform_tests.answering_models import make_bert, model_of, pairs

QUESTION = "Who keeps the lighthouse?"
CONTEXT = "The lighthouse on Ferris Rock is kept by Marta Olsen, who took over in 1987."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Answerer:
    return Answerer(str(folder), threads=2)


@pytest.fixture(scope="module")
def bundled() -> Answerer:
    return Answerer("bundled", threads=2)


def one(answerer: Answerer, question: str, context: str, **options: Any) -> Answer:
    (answer,) = answerer.answer([(question, context)], **options)
    return answer


def close(ours: Answer, theirs: Answer, *, tolerance: float = 1e-4) -> bool:
    return (ours.answer, ours.start, ours.error) == (theirs.answer, theirs.start, theirs.error) and abs(
        ours.score - theirs.score
    ) < tolerance


def test_the_bundled_model_answers(bundled: Answerer) -> None:
    answer = one(bundled, QUESTION, CONTEXT)
    assert (answer.answer, answer.error) == ("Marta Olsen", None)
    assert CONTEXT[answer.start : answer.end] == "Marta Olsen"


def test_the_identity_names_what_answers(folder: Path, bundled: Answerer) -> None:
    assert bundled.identity == ModelChoice("bundled", bundled.identity.revision, "fp32")
    assert len(bundled.identity.revision) == 12
    assert Answerer(ModelChoice(str(folder), "", "bf16")).identity.precision == "bf16"


def test_making_an_answerer_does_nothing_and_importing_it_little() -> None:
    code = (
        "import sys; from qa_platform.answering import Answerer; Answerer('no/such/model');"
        "assert not {'torch', 'transformers', 'openvino', 'tokenizers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.text(max_size=30), st.text(max_size=200)), max_size=5))
def test_offsets_always_point_at_the_answer(tiny: Answerer, rows: list[tuple[str, str]]) -> None:
    answers = list(tiny.answer(rows))
    assert len(answers) == len(rows)
    for (_, context), answer in zip(rows, answers, strict=True):
        assert context[answer.start : answer.end] == answer.answer
        assert 0 <= answer.score <= 1
        assert (answer.error is None) == bool(answer.answer)


def test_offsets_point_at_the_answer_in_every_script(tiny: Answerer) -> None:
    rows = pairs(200, seed=11, longest=400)
    for (_, context), answer in zip(rows, tiny.answer(rows, top_k=3), strict=True):
        spans = (Span(answer.answer, answer.score, answer.start, answer.end), *answer.alternatives)
        assert all(context[span.start : span.end] == span.text and 0 <= span.score <= 1 for span in spans)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_has_the_same_answer_whatever_its_neighbours(folder: Path, precision: Precision) -> None:
    answerer = Answerer(ModelChoice(str(folder), precision=precision), threads=2)
    rows = pairs(120, seed=5, longest=300)
    alone = [one(answerer, *row) for row in rows]
    together = list(answerer.answer(rows))
    backwards = list(answerer.answer(rows[::-1]))[::-1]
    assert all(close(a, b) for a, b in zip(alone, together, strict=True))
    assert all(close(a, b) for a, b in zip(alone, backwards, strict=True))


@pytest.mark.parametrize(
    ("question", "context", "reason"),
    [
        ("", CONTEXT, RowReason.EMPTY_QUESTION),
        (" \n", CONTEXT, RowReason.EMPTY_QUESTION),
        (QUESTION, "", RowReason.EMPTY_CONTEXT),
        (QUESTION, " \u3000\t", RowReason.EMPTY_CONTEXT),
        (QUESTION, "\u200b\u200b", RowReason.EMPTY_CONTEXT),
        ("why " * 400, CONTEXT, RowReason.QUESTION_EXCEEDS_WINDOW),
        ("w" * (QUESTION_LIMIT + 1), CONTEXT, RowReason.QUESTION_TOO_LONG),
        (QUESTION, "c" * (CONTEXT_LIMIT + 1), RowReason.CONTEXT_TOO_LONG),
        (QUESTION, "a\0b", RowReason.NUL_CHARACTER),
        (QUESTION, "a\ud800b", RowReason.LONE_SURROGATE),
    ],
)
def test_a_row_that_cannot_be_answered_says_why_and_harms_no_other(tiny: Answerer, question: str, context: str, reason: RowReason) -> None:
    before, bad, after = tiny.answer([(QUESTION, CONTEXT), (question, context), ("Where?", CONTEXT)])
    assert bad == Answer("", 0.0, 0, 0, reason)
    assert before.answer
    assert after.answer


def test_a_stride_beyond_the_room_after_the_question_is_lowered(tiny: Answerer) -> None:
    answer = one(tiny, "why " * 10, CONTEXT * 10, max_seq_len=80, doc_stride=79)
    assert answer.answer


def test_the_largest_context_is_answered(tiny: Answerer) -> None:
    context = ("The keeper waits. " * 30_000)[:CONTEXT_LIMIT]
    answer = one(tiny, QUESTION, context)
    assert context[answer.start : answer.end] == answer.answer != ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": "3"}, "top_k"),
        ({"max_answer_len": 0}, "max_answer_len"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"max_seq_len": 513}, "max_seq_len"),
        ({"doc_stride": -1}, "doc_stride"),
        ({"max_seq_len": 100, "doc_stride": 101}, "doc_stride"),
        ({"min_score": -0.1}, "min_score"),
        ({"min_score": 7}, "min_score"),
        ({"min_score": float("nan")}, "min_score"),
    ],
)
def test_options_out_of_range_are_refused_at_once_and_by_name(tiny: Answerer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.answer([], **options)


def test_options_are_given_in_one_way_only(tiny: Answerer) -> None:
    with pytest.raises(TypeError, match="top_k"):
        tiny.answer([], AnswerOptions(), top_k=5)


def test_a_negative_number_of_threads_is_refused() -> None:
    with pytest.raises(InputError, match="threads"):
        Answerer("bundled", threads=-1)


def certain(monkeypatch: pytest.MonkeyPatch, answerer: Answerer, *places: int) -> None:
    """Have the model say that an answer begins and ends at one of the windows' ``places``, each as likely; with none, anywhere."""

    def run(batch: WindowBatch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        logits = np.zeros(batch.ids.shape, np.float32)
        logits[:, places] = 50
        return logits, logits.copy()

    monkeypatch.setattr(model_of(answerer).runtime, "run", run)


def test_no_answer_wins_where_it_is_allowed_and_likelier(tiny: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    certain(monkeypatch, tiny, 0)
    silent = one(tiny, QUESTION, CONTEXT, handle_impossible_answer=True)
    assert replace(silent, null_margin=None) == Answer("", 1.0, 0, 0, RowReason.NO_ANSWER)
    assert one(tiny, QUESTION, CONTEXT).answer


def test_no_answer_wins_above_the_threshold_of_the_models_choice(tiny: Answerer, folder: Path) -> None:
    asked = pairs(20, longest=200)
    by_default = list(tiny.answer(asked, handle_impossible_answer=True, top_k=3))
    margins = [answer.null_margin for answer in by_default if answer.null_margin is not None]
    assert len(margins) == len(asked)
    assert [answer.error is RowReason.NO_ANSWER for answer in by_default] == [margin > 0 for margin in margins]
    for threshold in (min(margins) - 1, sorted(margins)[7], max(margins)):
        answerer = Answerer(ModelChoice(str(folder), no_answer_threshold=threshold), threads=2)
        answers = list(answerer.answer(asked, top_k=3))
        assert [answer.error is RowReason.NO_ANSWER for answer in answers] == [margin > threshold for margin in margins]
        # The order of all others is the same.
        for answer, before in zip(answers, by_default, strict=True):
            texts, texts_before = ([span.answer, *(other.text for other in span.alternatives)] for span in (answer, before))
            assert [text for text in texts if text][:2] == [text for text in texts_before if text][:2]
            assert answer.null_margin == before.null_margin
        assert all(answer.answer and answer.null_margin is None for answer in answerer.answer(asked, handle_impossible_answer=False))


def test_no_answer_that_loses_against_a_threshold_comes_after_the_best_answer(
    tiny: Answerer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = Answerer(ModelChoice(str(folder), no_answer_threshold=200.0), threads=2)
    certain(monkeypatch, answerer, 0)
    answer = one(answerer, QUESTION, CONTEXT, top_k=3)
    assert answer.answer
    assert [other.text for other in answer.alternatives].index("") == 0


def test_no_answer_loses_where_the_model_knows_one(bundled: Answerer) -> None:
    assert one(bundled, QUESTION, CONTEXT, handle_impossible_answer=True).answer == "Marta Olsen"


def test_ties_go_to_the_earlier_place(tiny: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(model_of(tiny).tokenizer.encode("?").ids)  # special tokens around it, too: [CLS] ? [SEP]
    certain(monkeypatch, tiny, before + 1, before + 3)
    answer = one(tiny, "?", ". ; , ! ?", top_k=2, max_answer_len=1)
    assert [answer.answer, *(span.text for span in answer.alternatives)] == [";", "!"]


def test_ties_go_to_the_earlier_window(tiny: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    certain(monkeypatch, tiny)
    answer = one(tiny, "?", ". ; , ! ? ( ) - :", top_k=9, max_answer_len=1, max_seq_len=7, doc_stride=0)
    assert [answer.answer, *(span.text for span in answer.alternatives)] == [".", ";", ",", "!", "?", "(", ")", "-", ":"]


@pytest.mark.parametrize("context", ["[CLS] [SEP] Olsen [MASK]", "kept[SEP]by Marta[PAD]Olsen"])
def test_special_tokens_in_a_text_are_words_like_others(tiny: Answerer, context: str) -> None:
    answer = one(tiny, "[SEP]?", context, top_k=5)
    assert all(context[span.start : span.end] == span.text for span in answer.alternatives)
    assert answer.answer


def test_low_scores_are_flagged_and_kept(bundled: Answerer) -> None:
    flagged = one(bundled, QUESTION, CONTEXT, min_score=1.0)
    assert (flagged.answer, flagged.error) == ("Marta Olsen", RowReason.LOW_SCORE)


def test_alternatives_are_other_texts_and_at_most_top_k(tiny: Answerer) -> None:
    answer = one(tiny, QUESTION, CONTEXT, top_k=4)
    texts = [answer.answer.lower(), *(span.text.lower() for span in answer.alternatives)]
    assert len(texts) == len(set(texts)) == 4
    assert one(tiny, QUESTION, "Olsen", top_k=4).alternatives == ()


def test_rows_are_read_as_they_are_answered(tiny: Answerer) -> None:
    read = 0

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield QUESTION, f"{CONTEXT} {read}"

    answers = tiny.answer(endless())
    assert next(answers).answer
    answers.close()  # type: ignore[attr-defined]
    assert read < 5000


def test_an_error_of_the_source_reaches_the_caller(tiny: Answerer) -> None:
    def broken() -> Iterator[tuple[str, str]]:
        yield QUESTION, CONTEXT
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(tiny.answer(broken()))


def test_rows_read_before_an_error_of_the_source_are_answered_first(tiny: Answerer) -> None:
    def broken() -> Iterator[tuple[str, str]]:
        yield from ((f"Who keeps {number}?", CONTEXT) for number in range(200))
        raise OSError("the disk is gone")

    answers = tiny.answer(broken())
    assert len([next(answers) for _ in range(200)]) == 200
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)


def test_equal_pairs_are_asked_once(tiny: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = counted_windows(monkeypatch, tiny)
    answers = list(tiny.answer([(QUESTION, CONTEXT), ("Where?", CONTEXT)] * 3000))
    assert sum(windows) == 2
    assert len(answers) == 6000
    assert len(set(answers)) == 2


def counted_windows(monkeypatch: pytest.MonkeyPatch, answerer: Answerer) -> list[int]:
    """Grows by the windows of every batch that the model is asked about."""
    runtime = model_of(answerer).runtime
    windows: list[int] = []
    run = runtime.run

    def counted(batch: WindowBatch) -> Any:
        windows.append(len(batch.ids))
        return run(batch)

    monkeypatch.setattr(runtime, "run", counted)
    return windows


@pytest.mark.parametrize(("top_k", "asked"), [(1, 1100), (100, 1101)])
def test_fewer_rows_are_remembered_the_more_answers_each_has(
    tiny: Answerer, monkeypatch: pytest.MonkeyPatch, top_k: int, asked: int
) -> None:
    windows = counted_windows(monkeypatch, tiny)
    rows = [("Who?", f"Marta {number}") for number in range(1100)]
    assert len(list(tiny.answer([*rows, rows[0]], top_k=top_k))) == 1101
    assert sum(windows) == asked


def test_pairs_that_are_alike_only_when_joined_are_different_pairs(tiny: Answerer) -> None:
    errors = [answer.error for answer in tiny.answer([("", "abc"), ("ab", "c"), ("a", "bc"), ("abc", "")])]
    assert errors == [RowReason.EMPTY_QUESTION, None, None, RowReason.EMPTY_CONTEXT]


@given(lengths=st.lists(st.integers(1, 512), max_size=40), tokens=st.integers(1, 2048), threads=st.integers(1, 8))
def test_batches_hold_every_window_once_and_no_more_tokens_than_allowed(lengths: list[int], tokens: int, threads: int) -> None:
    windows = [window_of(length) for length in lengths]
    portions = list(batches(windows, tokens, threads))
    assert sorted(id(window) for batch in portions for window in batch) == sorted(map(id, windows))
    assert all(len(batch) == 1 or len(batch) * max(len(window.ids) for window in batch) <= tokens for batch in portions)


def test_any_number_of_rows_makes_few_shapes_of_batches() -> None:
    # A runtime keeps kernels for each shape, so its memory grows with their number.
    rng = random.Random(1)
    windows = [window_of(min(384, max(20, round(rng.gauss(170, 60))))) for _ in range(20_000)]
    portions = [batch for begin in range(0, len(windows), 256) for batch in batches(windows[begin : begin + 256], 1024, 1)]
    shapes = Counter((len(batch), padded(len(batch[0].ids))) for batch in portions)
    assert len(shapes) < 150 < len(portions) / 10
    assert sum(count for _, count in shapes.most_common(50)) > 0.95 * len(portions)


def test_the_runtime_computes_batches_of_these_shapes(bundled: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[WindowBatch] = []

    def noted(batch: WindowBatch, files: ModelFiles) -> list[NDArray[Any]]:
        computed.append(batch)
        return inputs_of(batch, files)

    monkeypatch.setattr(openvino, "inputs_of", noted)
    answers = bundled.answer([(QUESTION, CONTEXT + " The sea is wide." * number) for number in range(40)])
    assert all(answer.answer == "Marta Olsen" for answer in answers)
    assert len({batch.ids.shape[1] for batch in computed}) > 3
    assert all(batch.ids.shape[1] % 8 == 0 for batch in computed)


def test_a_batch_is_widened_no_further_than_the_models_longest_window() -> None:
    batch = pad([window_of(20), window_of(11)], Layout((), (), (), 0, 1))
    assert widened(batch, 512).ids.shape == widened(batch, 512).types.shape == (2, 24)
    assert widened(batch, 22).ids.shape == (2, 22)
    assert widened(widened(batch, 512), 512).ids.shape == (2, 24)
    assert (widened(batch, 512).lengths == [20, 11]).all()


@given(rows=st.integers(1, 16), length=st.integers(1, 60), threads=st.integers(1, 8))
def test_a_few_rows_are_spread_evenly_over_the_threads(rows: int, length: int, threads: int) -> None:
    portions = [len(batch) for batch in batches([window_of(length)] * rows, 1024, threads)]
    assert max(portions) == math.ceil(rows / threads)


def window_of(length: int) -> Window:
    return Window(row=0, ids=np.zeros(length, dtype=np.int32), offset=0, first=0, length=length)


def test_chunks_are_bounded_in_rows_characters_and_what_is_kept() -> None:
    limit = ChunkSize().characters
    rows = [("q", "c")] * 300 + [("q", "c" * (limit // 2))] * 5 + [("q", "c" * CONTEXT_LIMIT)] * 3 + [("q", "c")] * 300
    portions = list(chunked(rows))
    assert [row for chunk in portions for row in chunk] == rows
    assert [len(chunk) for chunk in portions] == [32, 256, 13, 1, 1, 1, 1, 1, 1, 1, 256, 44]
    heavy = chunked([("q", "c")] * 40, lambda: chunks._CHUNK_KEPT // 8)
    assert [len(chunk) for chunk in heavy] == [8] * 5


LARGEST_ROWS = """
import io, sys
from qa_platform.answering import Answerer, AnswerOptions
from qa_platform.answering.csvfile import answer_stream

class Source:
    def __init__(self):
        # Contexts at the limit, of which every character is a token; then a column so wide that a row is at its limit, which one
        # character makes four times as large in memory, in rows that are asked and in rows that are rejected.
        lines = ["question,context,note"]
        lines += [f"Who {n}?,{chr(0x4e00 + n) * 500_000}," for n in range(4)]
        lines += [f"{'' if n % 2 else 'Who?'},Marta {n},WIDE" for n in range(60)]
        self.lines = iter(lines)
        self.rest = b""

    def read(self, size):
        if not self.rest:
            line = next(self.lines, "")
            self.rest = (line.replace("WIDE", "🚀" + "x" * 4_000_000) + "\\n").encode() if line else b""
        block, self.rest = self.rest[:size], self.rest[size:]
        return block

class Nowhere(io.RawIOBase):
    def write(self, line):
        return len(line)

counts = answer_stream(Answerer(sys.argv[1], threads=2), Source(), Nowhere(), AnswerOptions())
assert (counts.rows, counts.rejected) == (64, 30), counts
# The high-water mark of this process alone: getrusage's begins with that of the one it was forked from.
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak) // 1024)
"""


@pytest.mark.slow
def test_memory_stays_bounded_over_the_largest_rows(folder: Path) -> None:
    peak = subprocess.run([sys.executable, "-c", LARGEST_ROWS, str(folder)], check=True, capture_output=True, text=True).stdout
    assert int(peak) < 600


@pytest.mark.parametrize(
    ("config", "message"),
    [("{}", "not an extractive"), ("{", "not JSON"), ('{"architectures": ["BertForMaskedLM"]}', "not an extractive")],
)
def test_an_unusable_folder_is_refused_by_name(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=message):
        Answerer(str(tmp_path)).warm_up()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertForQuestionAnswering"]}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickled"):
        Answerer(str(tmp_path)).warm_up()


def test_a_missing_folder_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(InputError, match="no such model folder"):
        Answerer("./no-such-folder").warm_up()


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tiny-bert"
    make_bert(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = (
        "from qa_platform.answering import Answerer\n"
        "from qa_platform.contract import ModelChoice\n"
        "from qa_platform.errors import TransientError\n"
        f"assert Answerer('someone/tiny-bert').identity == ModelChoice('someone/tiny-bert', '{commit}', 'fp32')\n"
        f"assert Answerer(ModelChoice('someone/tiny-bert', '{commit}')).identity.revision == '{commit}'\n"
        "try: Answerer('someone/absent').warm_up()\n"
        "except TransientError as error: assert 'someone/absent' in str(error)\n"
        "else: raise AssertionError\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_a_faster_precision_answers_nearly_like_fp32(bundled: Answerer, precision: Precision) -> None:
    rows = [(QUESTION, CONTEXT), ("When did she take over?", CONTEXT), ("Where is the lighthouse?", CONTEXT)]
    fast = Answerer(ModelChoice("bundled", precision=precision), threads=1)
    assert fast.identity.precision == precision
    assert all(close(a, b, tolerance=0.1) for a, b in zip(fast.answer(rows), bundled.answer(rows), strict=True))


def test_int8_offsets_point_at_the_answer(folder: Path) -> None:
    rows = pairs(100, seed=13, longest=400)
    for (_, context), answer in zip(rows, Answerer(ModelChoice(str(folder), precision="int8"), threads=1).answer(rows), strict=True):
        assert context[answer.start : answer.end] == answer.answer


def test_int8_answers_the_same_whenever_it_is_loaded() -> None:
    rows = [(QUESTION, CONTEXT), ("When did she take over?", CONTEXT)]
    loaded = [Answerer(ModelChoice("bundled", precision="int8"), threads=threads) for threads in (1, 2)]
    assert list(loaded[0].answer(rows)) == list(loaded[1].answer(rows))


def test_what_rounding_would_spoil_stays_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    files = find_model(ModelChoice("bundled"))
    layout = Layout.of(tokenizer := load_tokenizer(files))
    (row,) = tokenize(tokenizer, layout, [(QUESTION, CONTEXT)], WindowSize.of(384, None))
    batch = pad(row.windows, layout)

    def logits(model: ov.Model, precision: Precision) -> NDArray[np.float32]:
        return next(iter(compile_graph(model, precision=precision, threads=1)(inputs_of(batch, files)).values()))

    exact = logits(Builder(files).build(), "fp32")
    usual, rounded, widest, errors = int8._NOISE, [], [], []
    for noise in (0.0, usual, np.inf):
        monkeypatch.setattr(int8, "_NOISE", noise)
        model = int8.quantized(files)
        rounded.append(sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops()))
        # The bundled model's second feed-forward layers have 1,536 channels, of which the 16 widest may be computed beside the others.
        widest.append(sum(node.get_type_name() == "Constant" and list(node.shape) == [384, 16] for node in model.get_ops()))
        errors.append(np.square(logits(model, "int8") - exact).mean())
    assert rounded[0] == 0
    assert rounded[2] == 4 * 6
    assert 20 <= rounded[1] <= rounded[2]
    assert widest[0] == widest[2] == 0
    assert 2 <= widest[1] <= 6
    # By how much depends on the processor: one without VNNI adds errors of its own to all of them.
    assert errors[0] < errors[1] < errors[2]


def test_a_rounding_that_openvino_cannot_compile_is_named_so_that_tune_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_channel(value: ov.Node, *, low: float, high: float) -> ov.Node:
        width = value.get_output_partial_shape(0)[-1].get_length()
        bounds = [op.constant(np.full((1, 1, width), bound) * np.linspace(1, 2, width, dtype=np.float32)) for bound in (low, high)]
        return op.fake_quantize(value, *bounds, *bounds, 256)

    monkeypatch.setattr(int8, "rounded", by_channel)
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path))
    with pytest.raises(InputError, match="cannot run it in int8"):
        Answerer(ModelChoice(str(folder), precision="int8"), threads=1).warm_up()
    gold = GoldQuestion("1", "g", QUESTION, CONTEXT, (GoldAnswer("Marta Olsen", None),))
    assert [trial.precision for trial in tune(ModelChoice(str(folder)), [gold], threads=1).trials] == ["fp32", "bf16"]


def test_an_unknown_precision_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match="int4; use fp32, bf16, int8 or auto"):
        Answerer(ModelChoice("bundled", precision="int4")).warm_up()


def test_the_work_of_a_row_is_linear_also_where_one_character_fills_it(tmp_path: Path) -> None:
    answerer = Answerer(str(make_bert(tmp_path / "model")), threads=1)
    taken = []
    for count in (50_000, 200_000):
        began = time.process_time()
        (answer,) = answerer.answer([("Who?", "x " + "\u203c\u200d" * (count // 2))])
        taken.append(time.process_time() - began)
        assert answer.error is RowReason.UNUSABLE_ANSWER
    assert taken[1] < 6 * taken[0] + 0.2, taken
