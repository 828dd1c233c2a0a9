"""Tiny random models of every supported family, with tokenizers trained on the spot, and texts to ask them about. No network."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (
    "harbour lighthouse keeper Marta Olsen river Tamsin orchard 1987 42 copper kettle museum, opened; northern! line's "
    "co-operative (founded) Zürich naïve façade Ærø Łódź Straße İstanbul Москва Київ Αθήνα ירושלים القاهرة नमस्ते दुनिया 東京 大阪市 한국어 "
    "ภาษาไทย ქართული ሰላም 👩‍🚀 🇳🇴 👍🏽 e\u0301t\u00e9 a\u0308\u0323 \ufb01n ½ ² x\u200by zero\u00a0width $5 50% C++ foo_bar https://example.org/a?b=c antidisestablishmentarianism"
).split(" ")

FAMILIES = ("bert", "distilbert", "roberta", "albert", "electra", "deberta", "deberta-v2")


@dataclass(frozen=True)
class _Kind:
    """How a family tokenises, and what its tokenizer class is called."""

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
    """Word salad from many scripts, with punctuation glued on and odd white space between."""
    rng = random.Random(seed)
    for _ in range(count):
        words = [rng.choice(WORDS) + rng.choice(["", "", "", ",", ".", "?"]) for _ in range(rng.randint(1, longest))]
        yield "".join(word + rng.choice([" ", " ", " ", "  ", "\n", "\t", "\u3000"]) for word in words)


def pairs(count: int, *, seed: int = 7, longest: int = 60) -> list[tuple[str, str]]:
    """Questions and contexts; no question is long, and neither is blank."""
    questions = texts(count, seed=seed, longest=6)
    contexts = texts(count, seed=seed + 1, longest=longest)
    return list(zip(questions, contexts, strict=True))


def make_tokenizer(family: str) -> tokenizers.Tokenizer:
    """A fast tokenizer as the family has it, with a small vocabulary."""
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
    ids = {token: tokenizer.token_to_id(token) for token in (cls, sep)}
    if family == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing((sep, ids[sep]), (cls, ids[cls]), trim_offsets=True, add_prefix_space=False)
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=list(ids.items())
        )
    return tokenizer


def make_model(family: str, folder: Path, *, seed: int = 3, positions: int = 512) -> Path:
    """Write a tiny random model of a family into ``folder``, as the hub would have it."""
    import torch
    import transformers

    kind = _KINDS[family]
    tokenizer = make_tokenizer(family)
    pad = tokenizer.token_to_id(kind.specials[0])
    vocabulary = tokenizer.get_vocab_size()
    torch.manual_seed(seed)
    common = {"vocab_size": vocabulary, "pad_token_id": pad, "max_position_embeddings": positions}
    bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
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
    model = transformers.AutoModelForQuestionAnswering.from_config(config)
    with torch.no_grad():
        # Random weights of the usual size answer everything alike; wider ones make up their minds.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2.0 if name.startswith("qa_outputs") else 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
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
    return folder
