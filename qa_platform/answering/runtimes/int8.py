"""The precision int8 on OpenVINO: the layers' products in 8-bit integers, everything else as in bf16.

Weights are rounded with one scale per output. The input of a product is rounded with a single scale, fixed in advance, so that it does
not depend on the other rows of the batch. If a few channels are far wider than the others, they are divided by a factor before rounding,
and the weights are multiplied by it (SmoothQuant, Xiao et al., 2023). This costs nothing after a norm or an activation. The input of the
second feed-forward layer is often too uneven even then: rounding it would be noisier than `_NOISE`. Its few widest channels are then
computed separately, in bf16 (LLM.int8(), Dettmers et al., 2022). A product that is still too noisy runs in bf16.

The ranges are measured in bf16 on the texts of ``calibration.csv`` whenever a model is loaded: a stored file could belong to another
model or version.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from qa_platform.answering.model import ModelFiles, load_tokenizer
from qa_platform.answering.runtimes.base import WindowBatch, pad
from qa_platform.answering.runtimes.graph import ACTIVATION_TYPES, Builder, compile_graph, inputs_of
from qa_platform.answering.windows import Layout, WindowSize, tokenize
from qa_platform.errors import InputError

_TEXTS = Path(__file__).parent / "calibration.csv"
# SmoothQuant's alpha: how much of the difficulty moves from the channels of the input into the weights. The logits of the bundled
# model are most accurate with 0.75 to 0.85.
_SMOOTHING = 0.8
_STEPS = 127
# The noise that rounding a product's input may add to its results, as a share of their energy: -30 dB. In the bundled model a few
# products are noisier, and cause most of the error in its logits.
_NOISE = 1e-3
# The share of a second feed-forward layer's channels that are computed separately if rounding them too would be too noisy.
_WIDEST = 1 / 96
# A lower bound on the width of a channel, so that nothing is divided by zero.
_NARROWEST = 1e-5


@dataclass(frozen=True)
class Seen:
    """Observations of the products of one input.

    ``low`` and ``high``: the lowest and highest value of every channel of the input, shape (channels,). ``energy``: the sum of the
    squares of the results. ``tokens``: the number of tokens observed.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    energy: float
    tokens: int

    def __or__(self, other: "Seen") -> "Seen":
        return Seen(
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.energy + other.energy,
            self.tokens + other.tokens,
        )

    def __getitem__(self, channels: NDArray[np.intp]) -> "Seen":
        return replace(self, low=self.low[channels], high=self.high[channels])

    def widths(self) -> NDArray[np.float32]:
        """The largest absolute value of every channel, shape (channels,)."""
        return np.maximum(np.maximum(-self.low, self.high), _NARROWEST)


def quantized(files: ModelFiles) -> ov.Model:
    """The graph of a model with its layers' products in int8. Compile it for bf16.

    Raises:
        InputError: the weights do not fit the model's ``config.json``, or the calibration texts give no ranges.
    """
    return _Quantizer(files, _observed(files)).build()


def _observed(files: ModelFiles) -> list[Seen]:
    """The observations of the layers' products, in order, over all calibration texts."""
    request = compile_graph(_Observer(files).build(), precision="bf16", threads=1).create_infer_request()
    observed: list[Seen] = []
    for batch in _batches(files):
        request.infer(inputs_of(batch, files))
        results = iter([tensor.data.copy() for tensor in request.output_tensors[1:]])
        found = [Seen(low, high, float(energy), batch.ids.size) for low, high, energy in zip(results, results, results, strict=True)]
        observed = [known | new for known, new in zip(observed, found, strict=True)] if observed else found
    if not observed:
        what = f"its windows of {files.default_window} tokens are too short for the texts that int8 is calibrated on"
        raise InputError(what, where=f"model {files.id}", advice="use bf16 or fp32")
    if not all(np.isfinite(seen.low).all() and np.isfinite(seen.high).all() for seen in observed):
        raise files.damaged_weights()
    return observed


def _batches(files: ModelFiles) -> Iterator[WindowBatch]:
    """The windows of every text, and of all texts joined. Each is a batch of its own: padding would add ranges that no text has."""
    with _TEXTS.open(newline="", encoding="utf-8") as file:
        pairs = [(row["question"], row["context"]) for row in csv.DictReader(file)]
    pairs.append((pairs[0][0], "\n".join(context for _, context in pairs)))
    tokenizer = load_tokenizer(files)
    layout = Layout.of(tokenizer)
    for row in tokenize(tokenizer, layout, pairs, WindowSize.of(files.default_window, None)):
        for window in row.windows:
            yield pad([window], layout)


class _Observer(Builder):
    """Builds the usual graph with three more results for each input of the layers' products: the first three fields of `Seen`."""

    def __init__(self, files: ModelFiles) -> None:
        super().__init__(files)
        self._results: list[ov.Node] = []

    def _products(self, value: ov.Node, *names: str) -> list[ov.Node]:
        tokens = op.constant([0])
        products = super()._products(value, *names)
        energies = [op.reduce_sum(op.multiply(product, product), op.constant([0, 1])) for product in products]
        self._results += [op.reduce_min(value, tokens), op.reduce_max(value, tokens), reduce(op.add, energies)]
        return products

    def _extra_results(self) -> list[ov.Node]:
        return self._results


@dataclass(frozen=True)
class _Norm:
    """A norm's result before scale and shift, and the two themselves."""

    normal: ov.Node
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]


@dataclass(frozen=True)
class _Input:
    """The input of products, with its channels divided by ``divisors`` and rounded to 256 steps; unchanged if ``divisors`` is None."""

    value: ov.Node
    divisors: NDArray[np.float32] | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether the input is in int8."""
        return self.divisors is not None

    def times(self, weight: NDArray[np.float32]) -> ov.Node:
        right = op.constant(np.ascontiguousarray(weight)) if self.divisors is None else rounded_weight(weight * self.divisors)
        return op.matmul(self.value, right, False, True)


class _Quantizer(Builder):
    """Builds the graph with the layers' products in int8, given what was ``observed`` of them, in order."""

    # OpenVINO's rounding takes a tenth of the time if the tokens are not the leading dimension.
    _rows = (1, -1)

    def __init__(self, files: ModelFiles, observed: list[Seen]) -> None:
        super().__init__(files)
        self._observed = iter(observed)
        self._norms: dict[str, _Norm] = {}
        self._divided: dict[str, tuple[ov.Node, NDArray[np.float32]]] = {}

    def _norm(self, value: ov.Node, name: str) -> ov.Node:
        normal = op.mvn(value, op.constant([-1]), True, self._shape.epsilon, "inside_sqrt")
        norm = _Norm(normal, *self._scale_and_shift(value, name))
        result = op.add(op.multiply(normal, op.constant(norm.scale)), op.constant(norm.shift))
        self._norms[result.get_friendly_name()] = norm
        return result

    def _products(self, value: ov.Node, *names: str) -> list[ov.Node]:
        linears = [self._linear(name) for name in names]
        taken = self._input(value, np.concatenate([weight for weight, _ in linears]), next(self._observed))
        return [op.add(taken.times(weight), op.constant(bias)) for weight, bias in linears]

    def _feed_forward(self, hidden: ov.Node, first: str, second: str) -> ov.Node:
        (weight, bias), (outer, outer_bias) = self._linear(first), self._linear(second)
        taken, seen = self._input(hidden, weight, next(self._observed)), next(self._observed)

        def activated(channels: NDArray[np.intp]) -> ov.Node:
            return self._activate(op.add(taken.times(weight[channels]), op.constant(bias[channels])))

        def inner(channels: NDArray[np.intp]) -> _Input:
            return self._input(activated(channels), outer[:, channels], seen[channels])

        every = inner(np.arange(len(bias)))
        narrow, widest = _parted(outer, seen)
        if every.is_rounded or not (most := inner(narrow)).is_rounded:
            return op.add(every.times(outer), op.constant(outer_bias))
        # The few widest channels in bf16, beside all others in int8.
        in_bf16 = _Input(activated(widest)).times(outer[:, widest])
        return op.add(op.add(most.times(outer[:, narrow]), op.constant(outer_bias)), in_bf16)

    def _input(self, value: ov.Node, weight: NDArray[np.float32], seen: Seen) -> _Input:
        """``value`` as the input of products with ``weight``: rounded, or unchanged if rounding would be too noisy."""
        free = value.get_friendly_name() in self._norms or value.get_type_name() in ACTIVATION_TYPES
        # Nothing is divided where that would cost another pass over the data.
        divisors = _smoothing(weight, seen) if free else np.ones_like(seen.low)
        low, high = bounds(float((seen.low / divisors).min()), float((seen.high / divisors).max()))
        # The mean squared error of rounding is a twelfth of the squared step.
        noise = seen.tokens * ((high - low) / (2 * _STEPS + 1)) ** 2 / 12 * float(np.square(weight * divisors).sum())
        if noise > _NOISE * seen.energy:
            return _Input(value)
        return _Input(rounded(self._divide(value, divisors), low=low, high=high), divisors)

    def _divide(self, value: ov.Node, divisors: NDArray[np.float32]) -> ov.Node:
        name = value.get_friendly_name()
        if norm := self._norms.get(name):
            # `_residual` uses this result too, times the divisors. If only the product used it, OpenVINO would merge the division into
            # the rounding, and could not compile the result.
            divided = op.add(op.multiply(norm.normal, op.constant(norm.scale / divisors)), op.constant(norm.shift / divisors))
            self._divided[name] = (divided, divisors)
            return divided
        return value if (divisors == 1).all() else op.multiply(value, op.constant(1 / divisors))

    def _residual(self, value: ov.Node, hidden: ov.Node) -> ov.Node:
        if divided := self._divided.get(hidden.get_friendly_name()):
            hidden = op.multiply(divided[0], op.constant(divided[1]))
        return op.add(value, hidden)


def _smoothing(weight: NDArray[np.float32], seen: Seen) -> NDArray[np.float32]:
    """SmoothQuant's factors, one per channel, with a geometric mean of 1."""
    of_weight = np.maximum(np.abs(weight).max(axis=0), _NARROWEST)
    factors = np.log(seen.widths()) * _SMOOTHING - np.log(of_weight) * (1 - _SMOOTHING)
    return np.exp(factors - factors.mean()).astype(np.float32)


def _parted(weight: NDArray[np.float32], seen: Seen) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """All channels but the few widest, and those few, each in order. Widths are compared after smoothing."""
    by_width = (seen.widths() / _smoothing(weight, seen)).argsort(kind="stable")
    few = math.ceil(_WIDEST * len(by_width))
    return np.sort(by_width[:-few]), np.sort(by_width[-few:])


def bounds(low: float, high: float) -> tuple[float, float]:
    """The ends of 256 steps that cover ``low`` to ``high``. Zero is one of the steps."""
    low, high = min(low, 0.0), max(high, 0.0)
    if -low > high / 8:
        # Wide on both sides of zero: with zero in the middle, the product is cheaper.
        step = max(-low, high, _NARROWEST) / _STEPS
        return -step * (_STEPS + 1), step * _STEPS
    step = max(high - low, _NARROWEST) / (2 * _STEPS + 1)
    below = round(-low / step)
    return -step * below, step * (2 * _STEPS + 1 - below)


def rounded(value: ov.Node, *, low: float, high: float) -> ov.Node:
    """``value`` rounded to 256 steps from ``low`` to ``high``; see `bounds`."""
    ends = [op.constant(np.float32(end)) for end in (low, high)]
    return op.fake_quantize(value, *ends, *ends, 2 * _STEPS + 2)


def rounded_weight(weight: NDArray[np.float32]) -> ov.Node:
    """A weight of shape (outputs, channels) as int8 with one scale per output."""
    step = np.maximum(np.abs(weight).max(axis=1, keepdims=True), _NARROWEST) / _STEPS
    return op.multiply(op.convert(op.constant(np.round(weight / step).astype(np.int8)), np.float32), op.constant(step.astype(np.float32)))
