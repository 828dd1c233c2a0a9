"""OpenVINO graphs of BERT-like models (BERT, ELECTRA, RoBERTa, DistilBERT, ALBERT), built straight from their safetensors.

A graph is built here rather than converted from torch: a process starts in one second instead of ten, needs neither torch nor
transformers, and can choose the layout that is fastest on a CPU. The architecture is that of Devlin et al., 2018. The tests compare the
results with those of transformers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from qa_platform.answering.model import ModelFiles
from qa_platform.answering.runtimes.base import WindowBatch
from qa_platform.answering.runtimes.weights import Weights
from qa_platform.contract import Precision
from qa_platform.errors import InputError

# Added to the attention scores of padded positions: far below any score, far above bfloat16's lowest number.
_MASKED = -1e9
# Question and context.
_TOKEN_TYPES = 2


@dataclass(frozen=True)
class _Names:
    """A family's names for its weights. ``{i}`` is the layer's number."""

    prefix: str
    layer: str
    query: str
    key: str
    value: str
    attention_out: str
    attention_norm: str
    ffn_in: str
    ffn_out: str
    ffn_norm: str


_BERT_LAYER = {
    "layer": "encoder.layer.{i}.",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_NAMES = {
    "bert": _Names(prefix="bert.", **_BERT_LAYER),
    "electra": _Names(prefix="electra.", **_BERT_LAYER),
    "roberta": _Names(prefix="roberta.", **_BERT_LAYER),
    "xlm-roberta": _Names(prefix="roberta.", **_BERT_LAYER),
    "camembert": _Names(prefix="roberta.", **_BERT_LAYER),
    "distilbert": _Names(
        prefix="distilbert.",
        layer="transformer.layer.{i}.",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_out="attention.out_lin",
        attention_norm="sa_layer_norm",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        ffn_norm="output_layer_norm",
    ),
    "albert": _Names(
        prefix="albert.",
        layer="encoder.albert_layer_groups.0.albert_layers.0.",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_out="attention.dense",
        attention_norm="attention.LayerNorm",
        ffn_in="ffn",
        ffn_out="ffn_output",
        ffn_norm="full_layer_layer_norm",
    ),
}
_ACTIVATIONS: dict[str, Callable[[ov.Node], ov.Node]] = {
    "gelu": lambda x: op.gelu(x, "erf"),
    "gelu_new": lambda x: op.gelu(x, "tanh"),
    "gelu_pytorch_tanh": lambda x: op.gelu(x, "tanh"),
    "relu": op.relu,
}


# OpenVINO's types of the nodes that the activations create.
ACTIVATION_TYPES = ("Gelu", "Relu")


@dataclass(frozen=True)
class _Shape:
    """The dimensions of a model, independent of its family's names for them."""

    layers: int
    heads: int
    epsilon: float
    activation: str

    @classmethod
    def of(cls, files: ModelFiles) -> "_Shape":
        return cls(
            files.count("num_hidden_layers", "n_layers", least=1),
            files.count("num_attention_heads", "n_heads", least=1),
            float(files.number("layer_norm_eps", default=1e-12)),
            str(files.config.get("hidden_act") or files.config.get("activation") or "gelu"),
        )


def supports(files: ModelFiles) -> bool:
    """Whether `Builder` can build this model. torch runs the others."""
    config = files.config
    return (
        files.family in _NAMES
        and not files.is_decoder
        and config.get("position_embedding_type", "absolute") == "absolute"
        and _Shape.of(files).activation in _ACTIVATIONS
        and files.number("num_hidden_groups", default=1) == 1
        and files.number("inner_group_num", default=1) == 1
    )


class Builder:
    """Builds a model's graph.

    The inputs are ids, types and positions, each of shape (windows, tokens), and a mask of shape (windows, 1, 1, tokens); see `inputs_of`.
    The first result is the logits, of shape (windows * tokens, 2). Between the embeddings and the logits, all tokens of a batch are rows
    of one matrix, the fastest layout for matrix products on a CPU.

    Subclasses that compute the same in another precision override `_products`, `_feed_forward`, `_residual` and ``_rows``.

    Raises:
        InputError: from `build`: the weights lack a tensor, or do not fit the model's ``config.json``.
    """

    # The leading dimensions of the matrix of all tokens.
    _rows: tuple[int, ...] = (-1,)

    def __init__(self, files: ModelFiles) -> None:
        self._model = files.id
        self._folder = files.folder
        self._weights = Weights(files)
        self._names = _NAMES[files.family]
        self._shape = _Shape.of(files)
        self._takes_types = files.takes_token_types
        self._positions = max(files.count("max_position_embeddings", default=0), files.position_offset + files.default_window)

    def build(self) -> ov.Model:
        try:
            return self._build()
        # If shapes do not match, NumPy raises ValueError and OpenVINO RuntimeError.
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"the weights in {self._folder} do not fit its config.json: {reason}", where=f"model {self._model}") from error

    def _build(self) -> ov.Model:
        ids, types, positions = (op.parameter([-1, -1], np.int32, name=name) for name in ("ids", "types", "positions"))
        mask = op.parameter([-1, 1, 1, -1], np.float32, name="mask")
        windows = op.shape_of(ids)
        hidden = self._embed(*(op.reshape(part, op.constant(list(self._rows)), False) for part in (ids, types, positions)))
        for number in range(self._shape.layers):
            hidden = self._layer(hidden, mask, windows, self._names.prefix + self._names.layer.format(i=number))
        return ov.Model([op.result(self._dense(hidden, "qa_outputs")), *self._extra_results()], [ids, types, positions, mask], "extractive")

    def _embed(self, ids: ov.Node, types: ov.Node, positions: ov.Node) -> ov.Node:
        folder = self._names.prefix + "embeddings."
        embeddings = self._tensor(folder + "position_embeddings.weight", 2)
        if len(embeddings) < self._positions:
            raise ValueError(f"{folder}position_embeddings.weight has {len(embeddings)} positions of {self._positions}")
        total = op.add(self._gather(folder + "word_embeddings", ids), self._gather(folder + "position_embeddings", positions))
        kinds = folder + "token_type_embeddings"
        if kinds + ".weight" in self._weights:
            if self._takes_types and len(self._tensor(kinds + ".weight", 2)) < _TOKEN_TYPES:
                raise ValueError(f"{kinds}.weight has fewer than {_TOKEN_TYPES} types")
            total = op.add(total, self._gather(kinds, types))
        hidden = self._norm(total, folder + "LayerNorm")
        for projection in ("embeddings_project", "encoder.embedding_hidden_mapping_in"):
            if self._names.prefix + projection + ".weight" in self._weights:
                hidden = self._dense(hidden, self._names.prefix + projection)
        return hidden

    def _layer(self, hidden: ov.Node, mask: ov.Node, windows: ov.Node, folder: str) -> ov.Node:
        names = self._names
        (attended,) = self._products(self._attend(hidden, mask, windows, folder), folder + names.attention_out)
        hidden = self._norm(self._residual(attended, hidden), folder + names.attention_norm)
        transformed = self._feed_forward(hidden, folder + names.ffn_in, folder + names.ffn_out)
        return self._norm(self._residual(transformed, hidden), folder + names.ffn_norm)

    def _attend(self, hidden: ov.Node, mask: ov.Node, windows: ov.Node, folder: str) -> ov.Node:
        width, heads = _width(hidden), self._shape.heads
        if width % heads:
            raise InputError(
                f"the width of its weights, {width}, is not a multiple of the {heads} heads in its config.json",
                where=f"model {self._model}",
            )
        size = width // heads
        names = (folder + name for name in (self._names.query, self._names.key, self._names.value))
        by_head = op.concat([windows, op.constant(np.array([heads, size], np.int64))], 0)
        # Three products of shape (windows * tokens, width): one product of all three would have to be split, which takes longer.
        query, key, value = (
            op.transpose(op.reshape(product, by_head, False), op.constant([0, 2, 1, 3])) for product in self._products(hidden, *names)
        )
        scores = op.multiply(op.matmul(query, key, False, True), op.constant(np.float32(1 / math.sqrt(size))))
        attended = op.matmul(op.softmax(op.add(scores, mask), -1), value, False, False)
        return op.reshape(op.transpose(attended, op.constant([0, 2, 1, 3])), op.constant([*self._rows, width]), False)

    def _products(self, value: ov.Node, *names: str) -> list[ov.Node]:
        """A layer's products of one input with the weights of ``names``."""
        return [self._dense(value, name) for name in names]

    def _feed_forward(self, hidden: ov.Node, first: str, second: str) -> ov.Node:
        """A layer's last two products, those with the weights ``first`` and ``second``."""
        (inner,) = self._products(hidden, first)
        (result,) = self._products(self._activate(inner), second)
        return result

    def _activate(self, value: ov.Node) -> ov.Node:
        return _ACTIVATIONS[self._shape.activation](value)

    def _residual(self, value: ov.Node, hidden: ov.Node) -> ov.Node:
        """The sum of both. ``hidden`` is a norm's result that is also the input of a product."""
        return op.add(value, hidden)

    def _extra_results(self) -> list[ov.Node]:
        """Additional results of the graph, for subclasses that observe it."""
        return []

    def _dense(self, value: ov.Node, name: str) -> ov.Node:
        weight, bias = self._linear(name)
        return op.add(op.matmul(value, op.constant(weight), False, True), op.constant(bias))

    def _linear(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A product's weight, shape (outputs, channels), and bias, shape (outputs,)."""
        weight = self._tensor(name + ".weight", 2)
        return weight, self._tensor(name + ".bias", 1, len(weight))

    def _tensor(self, name: str, dimensions: int, length: int | None = None) -> NDArray[np.float32]:
        """A tensor of the weights. Its shape is checked, because one with too few dimensions, or of length 1, would be broadcast."""
        tensor = self._weights[name]
        if tensor.ndim != dimensions or (length is not None and len(tensor) != length):
            raise ValueError(f"{name} has shape {list(tensor.shape)}")
        return tensor

    def _gather(self, name: str, indices: ov.Node) -> ov.Node:
        return op.gather(op.constant(self._tensor(name + ".weight", 2)), indices, op.constant(0))

    def _norm(self, value: ov.Node, name: str) -> ov.Node:
        normal = op.mvn(value, op.constant([-1]), True, self._shape.epsilon, "inside_sqrt")
        scale, shift = self._scale_and_shift(value, name)
        return op.add(op.multiply(normal, op.constant(scale)), op.constant(shift))

    def _scale_and_shift(self, value: ov.Node, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The scale and shift of the norm of ``value``, each of shape (width,)."""
        width = _width(value)
        return self._tensor(name + ".weight", 1, width), self._tensor(name + ".bias", 1, width)


def _width(value: ov.Node) -> int:
    return int(value.get_output_partial_shape(0)[-1].get_length())


def compile_graph(model: ov.Model, *, precision: Precision, threads: int, counted: bool = False) -> ov.CompiledModel:
    """Compile a graph for this CPU and ``threads`` concurrent single-threaded requests. With ``counted``, operations are profiled."""
    options = {
        "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": threads,
        # Keeps attention as separate products and a softmax. OpenVINO's fused kernel was slower on processors with AVX-512 but no AMX, and
        # not measurably faster on one with AMX.
        "SNIPPETS_MODE": "DISABLE",
        "PERF_COUNT": counted,
    }
    return ov.Core().compile_model(model, "CPU", options)


def inputs_of(batch: WindowBatch, files: ModelFiles) -> list[NDArray[Any]]:
    """The inputs of a model's `Builder` graph, in order: ids, types, positions and mask."""
    columns = np.arange(batch.ids.shape[1], dtype=np.int32)
    mask = np.where(columns < batch.lengths[:, None], np.float32(0), np.float32(_MASKED))[:, None, None, :]
    positions = np.broadcast_to(columns, batch.ids.shape)
    types = batch.types if files.takes_token_types else np.zeros_like(batch.types)
    if position_offset := files.position_offset:
        # RoBERTa-like models do not count padding tokens, not even one that a text spells out.
        real = batch.ids != position_offset - 1
        positions = real.cumsum(axis=1, dtype=np.int32) * real + np.int32(position_offset - 1)
    return [batch.ids, types, np.ascontiguousarray(positions), mask]
