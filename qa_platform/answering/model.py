"""Finding a model's files: the bundled model, a folder, or a model on the Hugging Face hub.

Only safetensors weights and fast tokenizers are accepted. Code that comes with a model is never run.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qa_platform.answering.calibration import KEY, Calibration
from qa_platform.contract import ModelChoice
from qa_platform.errors import InputError, TransientError

if TYPE_CHECKING:
    import tokenizers

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).parent / "models" / "bundled"
# Beside the models folder, not in it: images that do not answer leave the models out, but still have to name the bundled one.
BUNDLED_REVISION_FILE = Path(__file__).parent / "bundled.revision"

# The files that are fetched from the hub: no pickled weights, no Python.
_HUB_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
_REVISION_LENGTH = 12
_OWN_FILE = "use the file that was saved with the weights"
_OWN_TOKENIZER = "use the tokenizer that was saved with the weights"
# transformers writes 1e30 for a tokenizer without a limit.
_NO_LIMIT = 10**9
# Families that distinguish question and context by token types. Their tokenizers gave token types in transformers 4, with which most such
# models were trained, unless they say otherwise.
_FAMILIES_WITH_TOKEN_TYPES = (
    *("bert", "albert", "electra", "convbert", "deberta", "deberta-v2", "ernie", "fnet", "layoutlm", "megatron-bert", "mobilebert"),
    *("nezha", "squeezebert", "rembert", "nystromformer", "yoso", "funnel", "roformer", "splinter"),
)
# Families that count positions from the padding token's id plus one.
_ROBERTA_LIKE = (
    *("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet", "data2vec-text", "roberta-prelayernorm", "ibert", "luke", "lilt"),
    "xmod",
)
_MAX_SEQ_LEN = 384
# The weight of the layer that computes the logits, in nearly every family.
_HEAD = "qa_outputs.weight"
# The suffix of the token embeddings' name, in nearly every family.
_EMBEDDINGS = "word_embeddings.weight"


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk.

    ``revision`` is the hub's commit hash or, for a folder, the beginning of a SHA-256 of the weights and the score calibration.
    """

    id: str
    folder: Path
    revision: str
    config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    weights: tuple[Path, ...]

    @property
    def family(self) -> str:
        """The architecture, as ``config.json`` names it: ``bert``, ``roberta`` …"""
        return str(self.config.get("model_type", ""))

    def number(self, *names: str, default: float | None = None) -> float:
        """The number in ``config.json`` under the first of ``names`` that is present.

        Raises:
            InputError: it is not a finite number, or it is missing and there is no ``default``.
        """
        return self._entry(names, default)[1]

    def count(self, *names: str, default: int | None = None, least: int = 0) -> int:
        """Like `number`, for an integer of ``least`` or more.

        Raises:
            InputError: it is not such an integer, or it is missing and there is no ``default``.
        """
        name, value = self._entry(names, default)
        if value < least or value != int(value):
            raise self.bad_value("config.json", name, value, f"an integer of {least} or more")
        return int(value)

    def _entry(self, names: Sequence[str], default: float | None) -> tuple[str, float]:
        name = next((name for name in names if self.config.get(name) is not None), names[0])
        value = default if self.config.get(name) is None else self.config[name]
        if value is None:
            raise InputError(f"{self.folder / 'config.json'} has no {name}", where=f"model {self.id}", advice=_OWN_FILE)
        if not _is_finite(value):
            raise self.bad_value("config.json", name, value, "a finite number")
        return name, value

    def bad_value(self, file: str, name: str, value: object, wanted: str) -> InputError:
        """The error for an entry of one of the model's JSON files."""
        return InputError(
            f"{self.folder / file} has {value!r} for {name}, which is not {wanted}", where=f"model {self.id}", advice=_OWN_FILE
        )

    def damaged_weights(self) -> InputError:
        """The error for weights that give infinite numbers or NaN."""
        return InputError(f"the weights in {self.folder} give infinite numbers or NaN", where=f"model {self.id}", advice="fetch them again")

    @property
    def position_offset(self) -> int:
        """The position of the first token. RoBERTa-like models count from the padding token's id plus one, all others from 0."""
        return self.count("pad_token_id", default=1) + 1 if self.family in _ROBERTA_LIKE else 0

    @property
    def longest_window(self) -> int:
        """The maximum tokens of a window: as many as the position embeddings hold and the tokenizer allows."""
        limit = self.tokenizer_config.get("model_max_length") or _NO_LIMIT
        if not _is_finite(limit):
            raise self.bad_value("tokenizer_config.json", "model_max_length", limit, "a finite number")
        if self.family in ("deberta", "deberta-v2") and self.config.get("relative_attention"):
            positions = _NO_LIMIT
        else:
            positions = self.count("max_position_embeddings", default=_NO_LIMIT) - self.position_offset
        return int(min(positions, limit, _NO_LIMIT))

    @property
    def default_window(self) -> int:
        """The default tokens of a window: 384, or `longest_window` if that is less."""
        return min(self.longest_window, _MAX_SEQ_LEN)

    @property
    def calibration(self) -> Calibration:
        """See `Calibration.of`."""
        return Calibration.of(self.config, model=self.id)

    @property
    def takes_token_types(self) -> bool:
        """Whether the model distinguishes question and context by token types, as BERT, ALBERT and ELECTRA do."""
        names = self.tokenizer_config.get("model_input_names")
        if isinstance(names, list):
            given = "token_type_ids" in names
        else:
            of_bert = str(self.tokenizer_config.get("tokenizer_class")).startswith("BertTokenizer") and "type_vocab_size" in self.config
            given = of_bert or self.family in _FAMILIES_WITH_TOKEN_TYPES
        return given and self.number("type_vocab_size", default=2) > 1

    @property
    def is_decoder(self) -> bool:
        """Whether the config makes the model a decoder, in which a token sees only the tokens to its left."""
        return bool(self.config.get("is_decoder"))


def _is_finite(value: object) -> bool:
    """Whether a value from a JSON file is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def bundled_revision() -> str:
    """The recorded revision of the bundled model, which is known even in an installation without the weights."""
    return BUNDLED_REVISION_FILE.read_text(encoding="ascii").strip()


def find_model(choice: ModelChoice) -> ModelFiles:
    """The files of a model. A model that is neither bundled nor a folder is fetched from the hub.

    Raises:
        InputError: there is no such model or revision, or it is not an extractive model in safetensors.
        TransientError: the hub is unavailable, and the model is not in the local cache.
    """
    if choice.id == BUNDLED:
        return _at_revision(_read_folder(BUNDLED, BUNDLED_FOLDER), choice.revision)
    if Path(choice.id).is_dir():
        return _at_revision(_read_folder(choice.id, Path(choice.id)), choice.revision)
    if choice.id.startswith((".", "/", "~")):
        raise InputError("there is no such model folder", where=choice.id)
    folder = _from_hub(choice.id, choice.revision)
    return _read_folder(choice.id, folder, revision=folder.name)


def _at_revision(files: ModelFiles, wanted: str) -> ModelFiles:
    if wanted not in ("", files.revision):
        raise InputError(
            f"it has revision {files.revision}, and revision {wanted} was asked for",
            where=f"model {files.id}",
            advice="leave the revision out, or name a model of the hub: only those have several revisions",
        )
    return files


def _read_folder(model_id: str, folder: Path, *, revision: str = "") -> ModelFiles:
    config = _read_json(folder / "config.json", needed_by=model_id)
    tokenizer_config = folder / "tokenizer_config.json"
    weights = _weights(model_id, folder)
    if "QuestionAnswering" not in str(config.get("architectures")):
        raise InputError(f"{config.get('architectures')} is not an extractive question-answering model", where=f"model {model_id}")
    _check_weights(model_id, weights)
    tokenizer = _read_json(tokenizer_config, needed_by=model_id) if tokenizer_config.exists() else {}
    if tokenizer.get("padding_side", "right") != "right":
        raise InputError("models whose windows are padded on the left are not supported", where=f"model {model_id}")
    return ModelFiles(model_id, folder, revision or _content_hash(weights, config), config, tokenizer, weights)


def _weights(model_id: str, folder: Path) -> tuple[Path, ...]:
    """The files that transformers would load, in its order of preference. Other files in the folder are ignored."""
    files = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    index = folder / "model.safetensors.index.json"
    if "model.safetensors" in files:
        return (files["model.safetensors"],)
    if index.exists():
        return _indexed_weights(model_id, index, files)
    where = f"model {model_id}"
    if not files:
        raise InputError(f"no *.safetensors in {folder}", where=where, advice="convert pickled weights first: they are never loaded")
    if len(files) > 1:
        raise InputError(f"{folder} has {', '.join(files)}", where=where, advice="rename the file with the weights to model.safetensors")
    return tuple(files.values())


def _indexed_weights(model_id: str, index: Path, files: dict[str, Path]) -> tuple[Path, ...]:
    of_tensor = _read_json(index, needed_by=model_id).get("weight_map")
    names = sorted({str(name) for name in of_tensor.values()}) if isinstance(of_tensor, dict) else []
    missing = [name for name in names if name not in files]
    if missing or not names:
        what = f"names {', '.join(missing)}, which is missing" if missing else "names no files"
        raise InputError(f"{index} {what}", where=f"model {model_id}", advice="fetch the whole model again")
    return tuple(files[name] for name in names)


def _check_weights(model_id: str, weights: tuple[Path, ...]) -> None:
    """Check the files' headers, which also show whether a file was truncated."""
    from safetensors import SafetensorError, safe_open

    for path in weights:
        try:
            with safe_open(path, framework="numpy") as file:
                shape = file.get_slice(_HEAD).get_shape() if _HEAD in file.keys() else [2]  # noqa: SIM118  # not a mapping
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is not a complete safetensors file ({error})",
                where=f"model {model_id}",
                advice="fetch it again, with `git lfs pull` in a clone",
            ) from error
        if shape[:1] != [2]:
            raise InputError(
                f"{_HEAD} in {path} has shape {shape}",
                where=f"model {model_id}",
                advice="use an extractive model: it gives two numbers per token, for an answer's start and for its end",
            )


def _read_json(path: Path, *, needed_by: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing", where=f"model {needed_by}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", where=f"model {needed_by}", advice=_OWN_FILE) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", where=f"model {needed_by}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", where=f"model {needed_by}", advice=_OWN_FILE)
    return value


@functools.cache
def _hash_of_file(path: Path, _changed: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _content_hash(weights: tuple[Path, ...], config: Mapping[str, Any]) -> str:
    """A hash of the weights and of the score calibration, if there is one: with another one, the same answer has another score."""
    together = hashlib.sha256(b"".join(_hash_of_file(path, path.stat().st_mtime_ns) for path in weights))
    if KEY in config:
        together.update(json.dumps(config[KEY], sort_keys=True).encode())
    return together.hexdigest()[:_REVISION_LENGTH]


def _from_hub(model_id: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # A snapshot's folder is named after the commit that the revision resolved to.
        return Path(snapshot_download(model_id, revision=revision or None, allow_patterns=list(_HUB_FILES)))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        where = f"model {model_id!r}, revision {revision or 'main'!r}"
        raise InputError("not on the hub", where=where, advice="check the spelling, and whether the model is private") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise TransientError(f"it cannot be fetched, and is not in the cache: {error}", where=f"model {model_id!r}") from error


def load_tokenizer(files: ModelFiles) -> "tokenizers.Tokenizer":
    """The model's fast tokenizer, without truncation and padding.

    If there is no ``tokenizer.json``, transformers makes one from the tokenizer's other files. It is imported only then.

    Raises:
        InputError: the folder has no tokenizer, it cannot be read, or it has tokens for which the model has no embedding.
    """
    import tokenizers

    path = files.folder / "tokenizer.json"
    if path.exists():
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The library raises nothing more precise.
        except Exception as error:
            raise InputError(f"{path} is not a tokenizer ({error})", where=f"model {files.id}", advice="fetch it again") from error
        _apply_bert_options(tokenizer, files)
        _apply_prefix_space(tokenizer, files)
    else:
        tokenizer = _converted_tokenizer(files)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_tokenizer(tokenizer, files)
    return tokenizer


def _check_tokenizer(tokenizer: "tokenizers.Tokenizer", files: ModelFiles) -> None:
    """Check that the tokenizer can encode a pair of texts, and that the model has an embedding for each of its tokens."""
    try:
        pair = tokenizer.encode("a", "b")
    # The library raises nothing more precise.
    except Exception as error:
        raise InputError(f"its tokenizer fails on a single letter ({error})", where=f"model {files.id}", advice=_OWN_TOKENIZER) from error
    if not {0, 1} <= set(pair.sequence_ids):
        raise InputError("its tokenizer gives no token for a letter", where=f"model {files.id}", advice=_OWN_TOKENIZER)
    # The special tokens of a pair may have ids that are not in the vocabulary.
    rows, largest = _embeddings(files), max(*pair.ids, *tokenizer.get_vocab(with_added_tokens=True).values())
    if rows is not None and largest >= rows:
        raise InputError(
            f"its tokenizer has tokens up to the id {largest}, but its weights have embeddings for only {rows} tokens",
            where=f"model {files.id}",
            advice=_OWN_TOKENIZER,
        )


def _embeddings(files: ModelFiles) -> int | None:
    """The number of tokens with an embedding, from the weights' headers or else from ``config.json``; None if neither says."""
    from safetensors import safe_open

    for path in files.weights:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if name.endswith(_EMBEDDINGS):
                    return int(next(iter(file.get_slice(name).get_shape()), 0))
    return None if files.config.get("vocab_size") is None else files.count("vocab_size")


def _apply_bert_options(tokenizer: "tokenizers.Tokenizer", files: ModelFiles) -> None:
    """Let ``tokenizer_config.json`` override BERT's normalisation options in ``tokenizer.json``, as transformers does."""
    import tokenizers

    if not isinstance(tokenizer.normalizer, tokenizers.normalizers.BertNormalizer):
        return
    options = {"do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars"}
    for name, attribute in options.items():
        value = files.tokenizer_config.get(name)
        if name not in files.tokenizer_config or getattr(tokenizer.normalizer, attribute) == value:
            continue
        try:
            setattr(tokenizer.normalizer, attribute, value)
        except TypeError as error:
            raise files.bad_value("tokenizer_config.json", name, value, "true or false") from error


def _apply_prefix_space(tokenizer: "tokenizers.Tokenizer", files: ModelFiles) -> None:
    """Let ``add_prefix_space`` of ``tokenizer_config.json`` override that of a byte-level pre-tokenizer, as transformers does."""
    import tokenizers

    value = files.tokenizer_config.get("add_prefix_space")
    if not isinstance(tokenizer.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel) or value is None:
        return
    if not isinstance(value, bool):
        raise files.bad_value("tokenizer_config.json", "add_prefix_space", value, "true or false")
    tokenizer.pre_tokenizer.add_prefix_space = value
    # Otherwise the offsets of the first token would be moved by the space that the text does not have.
    if isinstance(tokenizer.post_processor, tokenizers.processors.RobertaProcessing):
        tokenizer.post_processor.add_prefix_space = value


def _converted_tokenizer(files: ModelFiles) -> "tokenizers.Tokenizer":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, use_fast=True, trust_remote_code=False, local_files_only=True)
    # The libraries that read vocabularies raise errors of many types.
    except Exception as error:
        raise InputError(
            f"no tokenizer.json in {files.folder}, and none can be made of its other files ({error})",
            where=f"model {files.id}",
            advice="put one there, as fast tokenizers of transformers save it, or install what is missing: *.model files need the package "
            "sentencepiece",
        ) from error
    if not tokenizer.is_fast:
        raise InputError("its tokenizer has no fast version, which character offsets need", where=f"model {files.id}")
    # Without the files, transformers silently makes a tokenizer without a vocabulary.
    needed = [name for name in tokenizer.vocab_files_names.values() if name != "tokenizer.json"]
    missing = [name for name in needed if not (files.folder / name).exists()]
    if missing or not needed:
        instead = f", and no {' and no '.join(missing)} to make one from" if missing else ""
        raise InputError(
            f"{files.folder} has no tokenizer.json{instead}", where=f"model {files.id}", advice="put the tokenizer's files there"
        )
    return tokenizer.backend_tokenizer
