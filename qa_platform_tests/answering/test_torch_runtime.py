"""The torch runtime with a GPU's portions, on the CPU."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qa_platform.answering import Answerer
from qa_platform.answering.model import find_model
from qa_platform.answering.runtimes import torch as torch_runtime
from qa_platform.answering.runtimes.base import WindowBatch, pad
from qa_platform.answering.runtimes.decoding import spans_of, torch_spans
from qa_platform.answering.runtimes.torch import TorchRuntime, torch_device
from qa_platform.answering.spans import SpanOptions, best_spans
from qa_platform.answering.windows import Layout, Window
from qa_platform.contract import ModelChoice
from qa_platform.datum_batching import fault_of
from qa_platform.errors import DeviceFailed, InputError, TransientError
from qa_platform_tests.answering_models import make_bert, make_model, model_of, pairs

# With this name for it BERT too is run by torch.
ON_TORCH = "cpu:0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"), positions=500)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_runtime._PORTIONS, "cpu", torch_runtime._PORTIONS["cuda"])


def runtime_of(folder: Path) -> TorchRuntime:
    return TorchRuntime(find_model(ModelChoice(str(folder))), precision="fp32", threads=1, device="cpu")


def shapes_of(monkeypatch: pytest.MonkeyPatch, runtime: Any, *, memory: int = 2**40) -> list[tuple[int, ...]]:
    """Grows by the shape of every batch that the model computes. It has memory for so many tokens, as a small GPU has."""
    shapes: list[tuple[int, ...]] = []
    forward = runtime._model.forward

    def counted(**inputs: torch.Tensor) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        if inputs["input_ids"].numel() > memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return forward(**inputs)

    monkeypatch.setattr(runtime._model, "forward", counted)
    return shapes


@st.composite
def decoded(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.float32], list[Window], SpanOptions]:
    contexts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    offsets = [draw(st.integers(1, 4)) for _ in contexts]
    tokens = max(offset + length for offset, length in zip(offsets, contexts, strict=True)) + draw(st.integers(0, 5))
    # Few values, so that many spans are as good as each other; values that are near; and none that is a number.
    values = draw(
        st.sampled_from([st.integers(-2, 2), st.floats(-30, 30, width=32), st.sampled_from([1.0, 0.1, 0.2, float("nan"), -np.inf, np.inf])])
    )
    start, end = (
        np.array([[draw(values) for _ in range(tokens)] for _ in contexts], np.float32).reshape(len(contexts), tokens) for _ in range(2)
    )
    windows = [
        Window(row, np.zeros(tokens, np.int32), offset, 7 * row, length)
        for row, (offset, length) in enumerate(zip(offsets, contexts, strict=True))
    ]
    return start, end, windows, SpanOptions(top_k=draw(st.sampled_from([1, 3, 40])), max_answer_len=draw(st.sampled_from([1, 3, 15])))


@given(decoded())
@pytest.mark.filterwarnings("error")
def test_torch_finds_the_spans_that_numpy_finds_ties_included(
    case: tuple[NDArray[np.float32], NDArray[np.float32], list[Window], SpanOptions],
) -> None:
    start, end, windows, options = case
    context_ranges = torch.tensor([(window.offset, window.length) for window in windows], dtype=torch.int32)
    width = int(context_ranges[:, 1].max())
    found = torch_spans(torch.from_numpy(start), torch.from_numpy(end), context_ranges, width, options)
    for ours, theirs in zip(spans_of(found.numpy(), windows), best_spans(start, end, windows, options), strict=True):
        assert ours.starts.tolist() == theirs.starts.tolist()
        assert ours.ends.tolist() == theirs.ends.tolist()
        assert ours.scores == pytest.approx(theirs.scores, rel=1e-9)
        assert ours.null_probability == pytest.approx(theirs.null_probability, rel=1e-9, nan_ok=True)
        assert 0 <= theirs.null_probability <= 1 + 1e-9 or (np.isnan(theirs.null_probability) and not theirs.starts.size)


@pytest.mark.parametrize("family", ["bert", pytest.param("deberta-v2", marks=pytest.mark.slow)])
def test_answers_are_the_same_in_a_gpus_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, like_a_gpu: None, family: str) -> None:
    rows = pairs(150, longest=200)
    model = str(make_model(family, tmp_path))
    answerer = Answerer(model, threads=1, device=ON_TORCH)
    shapes = shapes_of(monkeypatch, model_of(answerer).runtime)
    ours = list(answerer.answer(rows, top_k=2))
    monkeypatch.undo()
    theirs = list(Answerer(model, threads=1).answer(rows, top_k=2))
    assert [(answer.answer, answer.start) for answer in ours] == [(answer.answer, answer.start) for answer in theirs]
    assert [answer.score for answer in ours] == pytest.approx([answer.score for answer in theirs], rel=1e-2)
    assert {length % 32 for _, length in shapes} == {0}
    assert max(windows * length for windows, length in shapes) > 4096, "larger batches than a CPU's, out of a larger chunk"


def test_lengths_are_rounded_up_to_the_longest_window_at_most(folder: Path, monkeypatch: pytest.MonkeyPatch, like_a_gpu: None) -> None:
    runtime = runtime_of(folder)
    shapes = shapes_of(monkeypatch, runtime)
    for length in (1, 33, 499):
        ids = np.full((2, length), 5, np.int32)
        start, end = runtime.run(WindowBatch(ids, np.zeros_like(ids), np.array([length, 1], np.int32)))
        assert start.shape == end.shape == ids.shape
    assert shapes == [(2, 32), (2, 64), (2, 500)]


def batch_of(lengths: Sequence[int]) -> tuple[WindowBatch, list[Window]]:
    rng = np.random.default_rng(4)
    windows = [Window(row, rng.integers(5, 60, length, np.int32), 3, 0, length - 4) for row, length in enumerate(lengths)]
    return pad(windows, Layout((), (), (), 0, 1)), windows


def test_without_the_memory_batches_are_halved_until_they_fit_which_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = runtime_of(folder)
    batch, windows = batch_of([90, 80, 70, 60, 50])
    expected = runtime.best_spans(batch, windows, SpanOptions())
    shapes = shapes_of(monkeypatch, runtime, memory=200)
    with caplog.at_level(logging.WARNING):
        found = runtime.best_spans(batch, windows, SpanOptions())
    assert [spans.starts.tolist() for spans in found] == [spans.starts.tolist() for spans in expected]
    assert [spans.null_probability for spans in found] == pytest.approx([spans.null_probability for spans in expected], rel=1e-4)
    assert shapes == [(5, 90), (2, 90), (3, 90), (1, 90), (2, 90)]
    assert runtime.tokens == 135
    assert [record.message for record in caplog.records] == [
        "cpu has no memory for a batch of 450 tokens: batches are halved until they fit"
    ]


def test_batches_grow_again_when_memory_was_short_for_a_moment_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, like_a_gpu: None
) -> None:
    runtime = runtime_of(folder)
    most, (batch, windows) = runtime.tokens, batch_of([90, 80, 70, 60, 50])
    with monkeypatch.context() as short:
        shapes_of(short, runtime, memory=200)
        runtime.best_spans(batch, windows, SpanOptions())
    assert runtime.tokens < 200
    batches = 0
    while runtime.tokens < most:
        runtime.best_spans(*batch_of([20]), SpanOptions())
        batches += 1
    assert runtime.tokens == most
    assert batches < 1000


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_device_that_fails_is_to_blame_not_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    runtime = runtime_of(folder)
    batch, windows = batch_of([20, 30])

    def failing(**_: object) -> None:
        raise error

    monkeypatch.setattr(runtime._model, "forward", failing)
    reason = str(error).partition("\n")[0]
    for compute in (lambda: runtime.run(batch), lambda: runtime.best_spans(batch, windows, SpanOptions())):
        with pytest.raises(DeviceFailed) as caught:
            compute()
        fault = fault_of(caught.value)
        assert (fault.blameless, fault.cause) == (True, f"cpu: the device failed: {reason}")


def test_a_device_that_fails_while_the_model_is_loaded_is_to_blame(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.nn.Module, "to", busy)
    with pytest.raises(DeviceFailed, match="cpu: the device failed: CUDA error: all CUDA-capable"):
        runtime_of(folder)


def test_a_device_that_fails_while_its_memory_is_freed_is_to_blame(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    runtime = runtime_of(folder)
    monkeypatch.setattr(runtime, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", failing)
    with pytest.raises(DeviceFailed, match="illegal memory access"):
        runtime._halve(100)


def test_errors_of_the_program_are_not_the_devices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of(folder)

    def mistaken(**_: object) -> None:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(runtime._model, "forward", mistaken)
    with pytest.raises(RuntimeError, match="must match") as caught:
        runtime.best_spans(*batch_of([20]), SpanOptions())
    assert not fault_of(caught.value).blameless


def test_without_the_memory_for_the_first_batch_the_device_is_to_blame(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of(folder)
    shapes_of(monkeypatch, runtime, memory=10)
    batch, _ = batch_of([20, 20])
    with pytest.raises(TransientError, match="cpu: it has no memory for a batch"):
        runtime.run(batch)


def test_a_gpu_that_cuda_cannot_use_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update your GPU driver")

    # As with an old driver: it lists the GPU, and CUDA cannot use it.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    with pytest.raises(InputError) as caught:
        torch_device("cuda")
    assert caught.value.cause == (
        f"device 'cuda': torch {torch.__version__} cannot use it: The NVIDIA driver on your system is too old (found version 12020)."
    )
    assert "use cpu" in caught.value.advice


@pytest.mark.parametrize("name", ["meta", "xpu", "cuda:99", "no-such-device"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=name) as caught:
        torch_device(name)
    assert "use cpu" in caught.value.advice


def test_without_the_memory_for_a_window_the_device_is_to_blame(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of(folder)
    shapes_of(monkeypatch, runtime, memory=10)
    with pytest.raises(TransientError, match="cpu: it has no memory for one window"):
        runtime.best_spans(*batch_of([20, 20]), SpanOptions())


def test_without_the_memory_for_the_model_the_device_is_to_blame(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(TransientError, match="cpu: it has no memory for the model"):
        runtime_of(folder)


def test_attention_that_plans_for_every_shape_is_off(folder: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    runtime_of(folder)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_mask_is_in_the_form_of_which_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    def asked(*_: object, **__: object) -> bool:
        raise AssertionError("to answer this transformers waits for the device")

    monkeypatch.setattr(masking_utils, "_ignore_bidirectional_mask_sdpa", asked)
    for family in ("bert", "distilbert", "roberta", "albert", "electra"):
        runtime_of(make_model(family, tmp_path / family)).best_spans(*batch_of([20, 30]), SpanOptions())
