"""The guesses of a teacher, a larger trained model. It is asked once per question and weights."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerFast

from qa_platform.evaluation.gold import GoldQuestion
from qa_platform.training.data import INPUTS, WEIGHTS, Example, Guess, arithmetic, features, load_tokenizer, tensors

# The lowest log odds of a guess, in nats.
UNLIKELY = -20.0
# Questions whose guesses are written at once, and windows of a batch.
GUESSED_TOGETHER = 2048
WINDOWS_TOGETHER = 32


def taught(teacher: Path, questions: Sequence[GoldQuestion], *, device: str = "cpu") -> list[Example]:
    """The questions with the guesses of ``teacher``, a model folder.

    Guesses are stored in ``<teacher>.guesses``, by the hash of the weights, and are not computed twice.
    """
    store = _Store(teacher)
    asked = {_key(question): question for question in questions}
    missing = [key for key in asked if key not in store.guesses]
    if missing:
        tokenizer = load_tokenizer(teacher)
        model = AutoModelForQuestionAnswering.from_pretrained(teacher, dtype=arithmetic(device), attn_implementation="eager")
        model = model.to(device).eval()
    for first in range(0, len(missing), GUESSED_TOGETHER):
        part = missing[first : first + GUESSED_TOGETHER]
        store.add(dict(zip(part, _guesses(model, tokenizer, [asked[key] for key in part]), strict=True)))
        print({"guessed": first + len(part), "of": len(missing)}, flush=True)
    guesses = [store.guesses[_key(question)] for question in questions]
    return [Example(question, Guess(odds) if len(odds) else None) for question, odds in zip(questions, guesses, strict=True)]


class _Store:
    """The guesses of one teacher on disk: ``guesses`` maps a question's key to the odds of its `Guess`."""

    def __init__(self, teacher: Path) -> None:
        weights = hashlib.sha256((teacher / WEIGHTS).read_bytes()).hexdigest()
        self._folder = teacher.with_name(teacher.name + ".guesses") / weights
        self._folder.mkdir(parents=True, exist_ok=True)
        self.guesses: dict[str, np.ndarray] = {}
        for path in self._folder.glob("*.npz"):
            with np.load(path) as arrays:
                self.guesses.update(arrays)

    def add(self, new: dict[str, np.ndarray]) -> None:
        """Write new guesses, all or none."""
        partial = self._folder / "partial"
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **new)
        partial.replace(self._folder / f"{next(iter(new))}.npz")
        self.guesses.update(new)


def _key(question: GoldQuestion) -> str:
    return hashlib.sha256(repr((question.question, question.context)).encode()).hexdigest()


@torch.inference_mode()
def _guesses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[GoldQuestion]) -> list[np.ndarray]:
    """The odds of a `Guess` for every question. Where windows overlap, the higher odds count."""
    guesses = [np.full((len(question.context), 2), UNLIKELY, np.float16) for question in questions]
    asked = features(tokenizer, [Example(question) for question in questions])
    windows = [(row, window) for row, of_row in enumerate(asked) for window in of_row]
    windows.sort(key=lambda entry: len(entry[1].ids))
    for first in range(0, len(windows), WINDOWS_TOGETHER):
        batch = windows[first : first + WINDOWS_TOGETHER]
        inputs = tensors([window for _, window in batch], tokenizer)
        out = model(**{name: inputs[name].to(model.device) for name in INPUTS if name in inputs})
        logits = torch.stack([out.start_logits, out.end_logits], -1).float()
        odds = (logits - logits[:, :1]).clamp(min=UNLIKELY).cpu().numpy()
        for (row, window), of_window in zip(batch, odds, strict=True):
            tokens = (window.offsets[:, 1] > window.offsets[:, 0]).nonzero()[0]
            begins, ends = window.offsets[tokens, 0], window.offsets[tokens, 1] - 1
            np.maximum.at(guesses[row][:, 0], begins, of_window[tokens, 0].astype(np.float16))
            np.maximum.at(guesses[row][:, 1], ends, of_window[tokens, 1].astype(np.float16))
    return guesses
