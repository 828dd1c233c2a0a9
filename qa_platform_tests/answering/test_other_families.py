"""Models that differ from their families, and families without a specific runtime: they answer as in transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from qa_platform.answering import Answerer
from qa_platform.answering.model import find_model
from qa_platform.answering.runtimes.base import pad
from qa_platform.answering.windows import WindowSize, tokenize
from qa_platform.contract import PRECISIONS, ModelChoice, Precision
from qa_platform.errors import InputError
from qa_platform_tests.answering_models import make_bert, make_with_berts_tokenizer, model_of, pairs

pytestmark = pytest.mark.slow

# By name: the class of the configuration in transformers, and what differs from the usual values.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Its one row of token types is all that it has, whatever its tokenizer gives.
    "a roberta with the tokenizer of bert": ("RobertaConfig", {"type_vocab_size": 1, "max_position_embeddings": 514}),
    "a roberta with the tokenizer of bert and two types": ("RobertaConfig", {"type_vocab_size": 2, "max_position_embeddings": 514}),
    "a bert that sees what is left of a token": ("BertConfig", {"is_decoder": True}),
    # Families whose tokenizers give token types, without saying so.
    "ernie": ("ErnieConfig", {}),
    "megatron-bert": ("MegatronBertConfig", {}),
    # Its attention has windows, which are another mask than that of padding.
    "modernbert": (
        "ModernBertConfig",
        {
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
    ),
    # They see padding, through convolutions or pools.
    "convbert": ("ConvBertConfig", {"embedding_size": 32}),
    "mobilebert": ("MobileBertConfig", {"embedding_size": 32, "intra_bottleneck_size": 16}),
    "fnet": ("FNetConfig", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_each_row_by_itself_in_transformers(name: str, tmp_path: Path) -> None:
    config, values = MODELS[name]
    _equal_to_transformers(make_with_berts_tokenizer(config, tmp_path / "model", values))


def test_a_bert_whose_tokenizer_gives_no_token_types_gets_none(tmp_path: Path) -> None:
    folder = make_with_berts_tokenizer("BertConfig", tmp_path / "model", {})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": ["input_ids", "attention_mask"]}))
    _equal_to_transformers(folder)


def _equal_to_transformers(folder: Path) -> None:
    rows = pairs(12, longest=40)
    files = find_model(ModelChoice(str(folder)))
    model = model_of(Answerer(str(folder), threads=1))
    tokenized = tokenize(model.tokenizer, model.layout, rows, WindowSize.of(files.default_window, None))
    windows = [window for row in tokenized for window in row.windows]
    assert len(windows) == len(rows)
    assert len({len(window.ids) for window in windows}) > 1, "rows of different lengths are padded"
    starts, ends = model.runtime.run(pad(windows, model.layout))
    tokenizer, theirs = AutoTokenizer.from_pretrained(folder), AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    for row, pair in enumerate(rows):
        inputs = dict(tokenizer(*pair, return_tensors="pt"))
        if getattr(theirs.config, "type_vocab_size", 2) == 1:
            # Of which transformers has no row.
            del inputs["token_type_ids"]
        with torch.inference_mode():
            out = theirs(**inputs)
        for ours, expected in ((starts[row], out.start_logits[0].numpy()), (ends[row], out.end_logits[0].numpy())):
            np.testing.assert_allclose(ours[: len(expected)], expected, atol=2e-3 * np.abs(expected).max())


def test_a_model_that_would_fail_on_what_a_context_spells_out_is_refused_by_name(tmp_path: Path) -> None:
    values = {"max_position_embeddings": 514, "attention_window": 16}
    folder = make_with_berts_tokenizer("LongformerConfig", tmp_path / "model", values)
    with pytest.raises(InputError, match="Longformer is not supported"):
        Answerer(str(folder), threads=1).warm_up()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_damaged_weights_are_named_when_they_are_loaded(tmp_path: Path, precision: Precision) -> None:
    folder = make_bert(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["qa_outputs.bias"] = np.full(2, np.nan, np.float32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"give infinite numbers or NaN; fetch them again"):
        Answerer(ModelChoice(str(folder), precision=precision), threads=1).warm_up()


def test_a_table_of_token_types_that_is_too_short_is_named(tmp_path: Path) -> None:
    folder = make_bert(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "bert.embeddings.token_type_embeddings.weight"
    weights[name] = np.ascontiguousarray(weights[name][:1])
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=rf"do not fit its config\.json: {name} has fewer than 2 types"):
        Answerer(str(folder), threads=1).warm_up()
