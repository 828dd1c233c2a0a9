"""Tiny random models of every supported family, with tokenizers trained on the spot, and texts for them. No network needed."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from qa_platform.answering.engine import Answerer, LoadedModel

_PLAIN = "harbour lighthouse keeper Marta Olsen river Tamsin orchard 1987 42 copper kettle museum, opened; northern! line's co-operative"
_SCRIPTS = (
    "Zürich naïve façade Ærø Łódź Straße İstanbul Москва Київ Αθήνα ירושלים القاهرة नमस्ते दुनिया 東京 大阪市 한국어 ภาษาไทย ქართული ሰላም"
)
_ODD = "👩\u200d🚀 🇳🇴 👍🏽 e\u0301t\u00e9 a\u0308\u0323 \ufb01n ½ ² x\u200by zero\u00a0width $5 50% C++ foo_bar https://example.org/a?b=c"
WORDS = [word for line in (_PLAIN, _SCRIPTS, _ODD, "antidisestablishmentarianism") for word in line.split(" ")]

FAMILIES = ("bert", "distilbert", "roberta", "albert", "electra", "deberta", "deberta-v2")


@dataclass(frozen=True)
class _Kind:
    """The tokenizer of a family: its class name, special tokens and algorithm."""

    tokenizer: str
    specials: tuple[str, str, str, str, str]
    algorithm: str


_BERT_SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
_KINDS = {
    "bert": _Kind("BertTokenizer", _BERT_SPECIALS, "wordpiece"),
    "distilbert": _Kind("DistilBertTokenizer", _BERT_SPECIALS, "wordpiece"),
    "electra": _Kind("ElectraTokenizer", _BERT_SPECIALS, "wordpiece"),
    "roberta": _Kind("RobertaTokenizer", ("<pad>", "<s>", "</s>", "<unk>", "<mask>"), "bytes"),
    "deberta": _Kind("DebertaTokenizer", _BERT_SPECIALS, "bytes"),
    "albert": _Kind("AlbertTokenizer", ("<pad>", "[CLS]", "[SEP]", "<unk>", "[MASK]"), "unigram"),
    "deberta-v2": _Kind("DebertaV2Tokenizer", _BERT_SPECIALS, "unigram"),
}


def texts(count: int, *, seed: int = 7, longest: int = 60) -> Iterator[str]:
    """Word salad in many scripts, with punctuation attached to words and unusual white space between them."""
    rng = random.Random(seed)
    for _ in range(count):
        words = [rng.choice(WORDS) + rng.choice(["", "", "", ",", ".", "?"]) for _ in range(rng.randint(1, longest))]
        yield "".join(word + rng.choice([" ", " ", " ", "  ", "\n", "\t", "\u3000"]) for word in words)


def pairs(count: int, *, seed: int = 7, longest: int = 60) -> list[tuple[str, str]]:
    """Questions and contexts. Questions are short, and no text is blank."""
    questions = texts(count, seed=seed, longest=6)
    contexts = texts(count, seed=seed + 1, longest=longest)
    return list(zip(questions, contexts, strict=True))


def make_tokenizer(family: str) -> tokenizers.Tokenizer:
    """A fast tokenizer of the family's kind, with a small vocabulary."""
    kind = _KINDS[family]
    pad, cls, sep, unknown, mask = kind.specials
    if kind.algorithm == "wordpiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=400, special_tokens=[pad, unknown, cls, sep, mask])
    elif kind.algorithm == "bytes":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[cls, pad, sep, unknown, mask], initial_alphabet=alphabet)
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=[pad, unknown, cls, sep, mask], unk_token=unknown)
    tokenizer.train_from_iterator(texts(300, seed=1), trainer)
    ids: dict[str, int] = {token: int(tokenizer.token_to_id(token) or 0) for token in (cls, sep)}
    if family == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing((sep, ids[sep]), (cls, ids[cls]), trim_offsets=True, add_prefix_space=False)
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=list(ids.items())
        )
    return tokenizer


def make_bert(folder: Path, *, width: int = 16, layers: int = 1, positions: int = 512, seed: int = 3) -> Path:
    """Write a tiny random BERT. It needs no torch and takes no time."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    tokenizer = make_tokenizer("bert")
    vocabulary = tokenizer.get_vocab_size()
    names = {"embeddings.word_embeddings.weight": (vocabulary, width), "embeddings.position_embeddings.weight": (positions, width)}
    names["embeddings.token_type_embeddings.weight"] = (2, width)
    dense = {"attention.self.query": (width, width), "attention.self.key": (width, width), "attention.self.value": (width, width)}
    dense |= {"attention.output.dense": (width, width), "intermediate.dense": (2 * width, width), "output.dense": (width, 2 * width)}
    tensors = {f"bert.{name}": rng.normal(0, 1, shape) for name, shape in names.items()}
    for layer in range(layers):
        for name, shape in dense.items():
            tensors[f"bert.encoder.layer.{layer}.{name}.weight"] = rng.normal(0, 0.5, shape)
            tensors[f"bert.encoder.layer.{layer}.{name}.bias"] = rng.normal(0, 0.1, shape[0])
    norms = ["embeddings", *(f"encoder.layer.{n}.{part}" for n in range(layers) for part in ("attention.output", "output"))]
    for name in norms:
        tensors[f"bert.{name}.LayerNorm.weight"] = np.ones(width)
        tensors[f"bert.{name}.LayerNorm.bias"] = np.zeros(width)
    tensors |= {"qa_outputs.weight": rng.normal(0, 2, (2, width)), "qa_outputs.bias": np.zeros(2)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "bert", "architectures": ["BertForQuestionAnswering"], "hidden_size": width, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 2, "intermediate_size": 2 * width, "vocab_size": vocabulary, "max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder, "bert", tokenizer, positions)
    return folder


def make_model(family: str, folder: Path, *, seed: int = 3, positions: int = 512) -> Path:
    """Write a tiny random model of a family into ``folder``, with the files of a model on the hub."""
    import torch
    import transformers

    kind = _KINDS[family]
    tokenizer = make_tokenizer(family)
    pad = tokenizer.token_to_id(kind.specials[0])
    vocabulary = tokenizer.get_vocab_size()
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": vocabulary, "pad_token_id": pad, "max_position_embeddings": positions}
    bert: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config: Any
    if family == "distilbert":
        config = transformers.DistilBertConfig(**common, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    elif family == "roberta":
        config = transformers.RobertaConfig(**{**common, **bert, "max_position_embeddings": positions + 2, "type_vocab_size": 1})
    elif family == "albert":
        config = transformers.AlbertConfig(**common, **bert, embedding_size=16)
    elif family == "electra":
        config = transformers.ElectraConfig(**common, **bert, embedding_size=16)
    elif family == "deberta":
        config = transformers.DebertaConfig(**common, **bert, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0)
    elif family == "deberta-v2":
        config = transformers.DebertaV2Config(**common, **bert, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0)
    else:
        config = transformers.BertConfig(**common, **bert)
    _write_model(config, folder)
    _write_tokenizer(folder, family, tokenizer, positions)
    return folder


def make_with_berts_tokenizer(config: str, folder: Path, values: Mapping[str, Any]) -> Path:
    """Write a tiny random model with BERT's tokenizer. ``config`` is the name of its class in transformers."""
    import torch
    import transformers

    tokenizer = make_tokenizer("bert")
    torch.manual_seed(3)
    common = {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": 0, "max_position_embeddings": 512}
    common |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    _write_model(getattr(transformers, config)(**{**common, **values}), folder)
    _write_tokenizer(folder, "bert", tokenizer, 512)
    return folder


def _write_model(config: Any, folder: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForQuestionAnswering.from_config(config)
    with torch.no_grad():
        # With random weights of the usual scale, all answers have about the same score. Larger weights give clear winners.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2.0 if name.startswith("qa_outputs") else 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)


def _write_tokenizer(folder: Path, family: str, tokenizer: tokenizers.Tokenizer, positions: int) -> None:
    kind = _KINDS[family]
    tokenizer.save(str(folder / "tokenizer.json"))
    pad_token, cls, sep, unknown, mask = kind.specials
    values = {
        "tokenizer_class": kind.tokenizer,
        "model_max_length": positions,
        "pad_token": pad_token,
        "cls_token": cls,
        "sep_token": sep,
        "bos_token": cls,
        "eos_token": sep,
        "unk_token": unknown,
        "mask_token": mask,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def model_of(answerer: Answerer) -> LoadedModel:
    """The model that an answerer has loaded in this process."""
    model = answerer._warm().model
    assert isinstance(model, LoadedModel)
    return model
