"""How rows become windows: the windows cover the whole context, and its length bounds the work."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qa_platform.answering import Answerer
from qa_platform.answering.runtimes.base import WindowBatch
from qa_platform.answering.windows import Layout, Tokenized, WindowSize, tokenize
from qa_platform.contract import RowReason
from qa_platform_tests.answering_models import make_bert, make_tokenizer, model_of

TOKENIZER = make_tokenizer("bert")
LAYOUT = Layout.of(TOKENIZER)


def windows_of(question: int, context: int, size: WindowSize) -> Tokenized:
    """The windows of a row of so many tokens."""
    (row,) = tokenize(TOKENIZER, LAYOUT, [("? " * question, ". " * context)], size)
    return row


@st.composite
def sizes(draw: st.DrawFn) -> WindowSize:
    length = draw(st.integers(4, 512))
    return WindowSize(length, draw(st.integers(0, length)))


@given(question=st.integers(1, 520), context=st.integers(1, 3000), size=sizes())
def test_the_work_of_a_row_is_linear_in_its_context_whatever_question_and_stride(question: int, context: int, size: WindowSize) -> None:
    row = windows_of(question, context, size)
    assert sum(len(window.ids) for window in row.windows) <= size.length + 16 * context
    assert bool(row.windows) == (row.reason is None)


@given(question=st.integers(1, 520), context=st.integers(1, 3000), size=sizes())
def test_windows_leave_out_no_token_and_overlap_by_half_their_room_at_most(question: int, context: int, size: WindowSize) -> None:
    row = windows_of(question, context, size)
    if row.reason:
        assert row.reason is RowReason.QUESTION_EXCEEDS_WINDOW
        return
    assert row.windows[0].first == 0
    assert row.windows[-1].first + row.windows[-1].length == context
    for before, after in zip(row.windows, row.windows[1:], strict=False):
        assert before.first < after.first <= before.first + before.length
        assert 2 * (after.first - before.first) >= before.length


@pytest.mark.parametrize(
    ("question", "context", "windows"),
    [
        pytest.param(250, 5000, 75, id="windows that the stride would let advance by three tokens"),
        pytest.param(333, 5000, 208, id="the least useful room"),
        pytest.param(334, 5000, 0, id="less than a useful room"),
        pytest.param(334, 47, 1, id="less, and all that the context needs"),
        pytest.param(381, 1, 0, id="no room"),
    ],
)
def test_a_long_question_costs_few_windows_or_is_refused(question: int, context: int, windows: int) -> None:
    row = windows_of(question, context, WindowSize.of(384, None))
    assert len(row.windows) == windows
    assert row.reason is (None if windows else RowReason.QUESTION_EXCEEDS_WINDOW)


def test_the_model_computes_no_more_than_the_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = Answerer(str(make_bert(tmp_path)), threads=1)
    answerer.warm_up()
    runtime = model_of(answerer).runtime
    computed: list[int] = []
    run = runtime.run

    def counted(batch: WindowBatch) -> object:
        computed.append(int(np.prod(batch.ids.shape)))
        return run(batch)

    monkeypatch.setattr(runtime, "run", counted)
    (answer,) = answerer.answer([("? " * 250, ". " * 5000)])
    assert answer.error is None
    assert sum(computed) <= 384 + 16 * 5000
