"""Finding a model: the bundled one, a folder, or one from the Hugging Face hub, as files on disk.

Only safetensors weights and fast tokenizers are taken, and no code that came with a model is ever run.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qa_platform.contract import ModelChoice
from qa_platform.errors import InputError, TransientError

if TYPE_CHECKING:
    import tokenizers

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).parent / "models" / "bundled"
# Beside the models, not among them: images that answer nothing leave those out, and tell which model answers all the same.
BUNDLED_REVISION_FILE = Path(__file__).parent / "bundled.revision"

# What is fetched from the hub: never pickled weights, never Python.
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
# transformers writes 1e30 where a tokenizer names no limit of its own.
_NO_LIMIT = 10**9
_MAX_SEQ_LEN = 384
# What nearly every family calls the layer that makes the logits.
_HEAD = "qa_outputs.weight"


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. ``revision`` is the hub's commit hash, or for folders the beginning of the weights' SHA-256."""

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
        """The number in ``config.json`` that goes by one of ``names``.

        Raises:
            InputError: it is none, or it is not there and has no ``default``.
        """
        found = next((self.config[name] for name in names if self.config.get(name) is not None), default)
        if isinstance(found, int | float):
            return found
        what = f"has no {names[0]}" if found is None else f"has {found!r} for {names[0]}, which is no number"
        raise InputError(f"model {self.id}: {self.folder / 'config.json'} {what}; take the file that was saved with the weights")

    @property
    def position_offset(self) -> int:
        """What the first token's position is: the RoBERTa line counts from the padding token's id plus one."""
        roberta_like = self.family in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl")
        return int(self.number("pad_token_id", default=1)) + 1 if roberta_like else 0

    @property
    def longest_window(self) -> int:
        """Tokens that a window may have at most: what the position embeddings hold and the tokenizer declares."""
        positions = int(self.number("max_position_embeddings", default=_NO_LIMIT)) - self.position_offset
        if self.family in ("deberta", "deberta-v2") and self.config.get("relative_attention"):
            positions = _NO_LIMIT
        return min(positions, int(min(self.tokenizer_config.get("model_max_length") or _NO_LIMIT, _NO_LIMIT)))

    @property
    def default_window(self) -> int:
        """Tokens of a window where the caller names no number: 384, or less where the model holds less."""
        return min(self.longest_window, _MAX_SEQ_LEN)

    @property
    def takes_token_types(self) -> bool:
        """Whether the model tells question from context by token types (BERT, ALBERT and ELECTRA do)."""
        names = self.tokenizer_config.get("model_input_names")
        if names is not None:
            return "token_type_ids" in names and self.number("type_vocab_size", default=2) > 1
        return self.family in ("bert", "albert", "electra", "convbert", "deberta", "deberta-v2", "mobilebert", "squeezebert")


def bundled_revision() -> str:
    """The revision of the bundled model as it is recorded, also in an installation without its weights."""
    return BUNDLED_REVISION_FILE.read_text(encoding="ascii").strip()


def find_model(choice: ModelChoice) -> ModelFiles:
    """The files of a chosen model, fetched from the hub where it is neither bundled nor a folder.

    Raises:
        InputError: there is no such model or revision, or it is not an extractive model in safetensors.
        TransientError: the hub cannot be reached, and the model is not in the local cache.
    """
    if choice.id == BUNDLED:
        return _at_revision(_read_folder(BUNDLED, BUNDLED_FOLDER), choice.revision)
    if Path(choice.id).is_dir():
        return _at_revision(_read_folder(choice.id, Path(choice.id)), choice.revision)
    if choice.id.startswith((".", "/", "~")):
        raise InputError(f"there is no model folder {choice.id}")
    folder = _from_hub(choice.id, choice.revision)
    return _read_folder(choice.id, folder, revision=folder.name)


def _at_revision(files: ModelFiles, wanted: str) -> ModelFiles:
    if wanted not in ("", files.revision):
        raise InputError(
            f"model {files.id}: its weights have revision {files.revision}, and {wanted} is asked for; only a model of the hub has others, "
            "so name that one, or no revision"
        )
    return files


def _read_folder(model_id: str, folder: Path, *, revision: str = "") -> ModelFiles:
    config = _read_json(folder / "config.json", needed_by=model_id)
    tokenizer_config = folder / "tokenizer_config.json"
    weights = _weights(model_id, folder)
    if "QuestionAnswering" not in str(config.get("architectures")):
        raise InputError(f"model {model_id}: {config.get('architectures')} is not an extractive question-answering model")
    _check_weights(model_id, weights)
    tokenizer = _read_json(tokenizer_config, needed_by=model_id) if tokenizer_config.exists() else {}
    if tokenizer.get("padding_side", "right") != "right":
        raise InputError(f"model {model_id}: models whose windows are padded on the left are not supported")
    return ModelFiles(model_id, folder, revision or _content_hash(weights), config, tokenizer, weights)


def _weights(model_id: str, folder: Path) -> tuple[Path, ...]:
    """The files that transformers would load, in its order of preference; others in the folder are none of the model's business."""
    found = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    index = folder / "model.safetensors.index.json"
    if "model.safetensors" in found:
        return (found["model.safetensors"],)
    if index.exists():
        of_tensor = _read_json(index, needed_by=model_id).get("weight_map")
        names = sorted({str(name) for name in of_tensor.values()}) if isinstance(of_tensor, dict) else []
        missing = [name for name in names if name not in found]
        if missing or not names:
            what = f"names {', '.join(missing)}, not there" if missing else "names no files"
            raise InputError(f"model {model_id}: {index} {what}; fetch the whole model again")
        return tuple(found[name] for name in names)
    if not found:
        raise InputError(f"model {model_id}: no *.safetensors in {folder}; pickled weights are not loaded, so convert them first")
    if len(found) > 1:
        raise InputError(f"model {model_id}: {folder} has {', '.join(found)}; call the one with the weights model.safetensors")
    return tuple(found.values())


def _check_weights(model_id: str, weights: tuple[Path, ...]) -> None:
    """Read the files' headers, which also say how long the files must be."""
    from safetensors import SafetensorError, safe_open

    for path in weights:
        try:
            with safe_open(path, framework="numpy") as file:
                shape = file.get_slice(_HEAD).get_shape() if _HEAD in file.keys() else [2]  # noqa: SIM118  # not a mapping
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"model {model_id}: {path} is no complete safetensors file ({error}); fetch it again, with `git lfs pull` in a clone"
            ) from error
        if shape[:1] != [2]:
            raise InputError(
                f"model {model_id}: {_HEAD} in {path} has shape {shape}; an extractive model gives two numbers per token, "
                "for an answer's start and for its end"
            )


def _read_json(path: Path, *, needed_by: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"model {needed_by}: {path} is missing") from None
    except ValueError as error:
        raise InputError(f"model {needed_by}: {path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"model {needed_by}: {path} is no JSON object; take the file that was saved with the weights")
    return value


@functools.cache
def _hash_of_file(path: Path, _changed: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _content_hash(weights: tuple[Path, ...]) -> str:
    together = hashlib.sha256(b"".join(_hash_of_file(path, path.stat().st_mtime_ns) for path in weights))
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
        # A snapshot's folder is named by the commit that the revision resolved to.
        return Path(snapshot_download(model_id, revision=revision or None, allow_patterns=list(_HUB_FILES)))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InputError(f"model {model_id!r}, revision {revision or 'main'!r}: not on the hub (is it private, or misspelt?)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise TransientError(f"model {model_id!r} cannot be fetched, and is not in the cache: {error}") from error


def load_tokenizer(files: ModelFiles) -> "tokenizers.Tokenizer":
    """The model's fast tokenizer, without truncation and padding.

    A folder without ``tokenizer.json`` is converted by transformers, which is imported only then.

    Raises:
        InputError: the folder has none, or one that cannot be read.
    """
    import tokenizers

    path = files.folder / "tokenizer.json"
    if path.exists():
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # It raises nothing more precise.
        except Exception as error:
            raise InputError(f"model {files.id}: {path} is no tokenizer ({error}); fetch it again") from error
        _apply_bert_options(tokenizer, files.tokenizer_config)
    else:
        tokenizer = _converted_tokenizer(files)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _apply_bert_options(tokenizer: "tokenizers.Tokenizer", config: dict[str, Any]) -> None:
    """Let ``tokenizer_config.json`` win over ``tokenizer.json`` where both say how BERT normalises, as transformers does."""
    import tokenizers

    if not isinstance(tokenizer.normalizer, tokenizers.normalizers.BertNormalizer):
        return
    options = {"do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars"}
    for name, attribute in options.items():
        if name in config and getattr(tokenizer.normalizer, attribute) != config[name]:
            setattr(tokenizer.normalizer, attribute, config[name])


def _converted_tokenizer(files: ModelFiles) -> "tokenizers.Tokenizer":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder, use_fast=True, trust_remote_code=False, local_files_only=True)
    # The libraries that read vocabularies raise what they like.
    except Exception as error:
        raise InputError(
            f"model {files.id}: no tokenizer.json in {files.folder}, and none can be made of what is there ({error}); put one there, as "
            "fast tokenizers of transformers save it, or install what is missing: *.model files take the package sentencepiece"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"model {files.id}: its tokenizer has no fast version, which character offsets need")
    # Without its files transformers makes one that knows no word, and says nothing.
    needed = [name for name in tokenizer.vocab_files_names.values() if name != "tokenizer.json"]
    missing = [name for name in needed if not (files.folder / name).exists()]
    if missing or not needed:
        instead = f", and no {' and no '.join(missing)} to make one from" if missing else ""
        raise InputError(f"model {files.id}: {files.folder} has no tokenizer.json{instead}; put the tokenizer's files there")
    return tokenizer.backend_tokenizer
