"""From questions to batches of windows: negative contexts, shortened contexts, masking, and the teacher's guesses."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qa_platform.errors import InputError
from qa_platform.evaluation.gold import GoldQuestion

# Tokens of a window, and those that neighbouring windows share, as in the answering engine.
MAX_LENGTH = 384
STRIDE = 128
# The maximum tokens of an answer, as in the answering engine.
LONGEST_ANSWER = 15
# A few fixed lengths: ever-changing shapes make the allocator and the kernel caches grow without bound.
LENGTHS = (96, 128, 160, 192, 224, 256, 320, 384)
# The file with the weights in a model folder.
WEIGHTS = "model.safetensors"
INPUTS = ("input_ids", "token_type_ids", "attention_mask")


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run. They are printed when it begins, and belong in the model card.

    Args:
        negatives: the share of the questions that are also asked about another paragraph.
        masked: the maximum share of a window's tokens that is masked.
        left_out: the maximum share of the sentences without an answer that is left out.
    """

    epochs: int
    learning_rate: float
    tokens_per_batch: int
    weight_decay: float
    negatives: float
    masked: float
    left_out: float
    seed: int


def arithmetic(device: str) -> torch.dtype:
    """The dtype that training computes in: bfloat16, or float32 on a CPU without AVX-512, which emulates bfloat16 number by number."""
    emulated = torch.device(device).type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return torch.float32 if emulated else torch.bfloat16


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A model folder's tokenizer, without truncation and padding."""
    tokenizer = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(folder))
    # all-MiniLM-L6-v2 bakes in truncation and padding to 128 tokens, fit for sentences only.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = 512
    return tokenizer


@dataclass(frozen=True)
class Guess:
    """A teacher's guess at the answer to a question.

    ``odds`` has shape (characters, 2): for every character of the context, the log odds, in nats and relative to "no answer", that the
    token that begins (or ends) there begins (or ends) the answer; `teacher.UNLIKELY` where no token begins (or ends).
    """

    odds: np.ndarray

    def of_tokens(self, offsets: np.ndarray) -> np.ndarray:
        """The odds of a window's tokens, which lie at ``offsets`` (see `Feature`): shape (tokens, 2), -inf outside the context."""
        first, after = offsets[:, 0], offsets[:, 1]
        odds = np.stack([self.odds[first, 0], self.odds[after - 1, 1]], axis=1)
        return np.where((after > first)[:, None], odds, np.float16(-np.inf))


@dataclass(frozen=True)
class Example:
    """A question to train on, with the teacher's guess if there is one."""

    gold: GoldQuestion
    guess: Guess | None = None


@dataclass(frozen=True)
class Feature:
    """One window of a question and its context.

    ``ids`` and ``types``: shape (tokens,). ``spans``: the right answers as (first token, last token, share of the annotators).
    ``offsets``: for every token, its first character in the context and the one after its last, shape (tokens, 2); (0, 0) for other tokens.
    ``odds``: the teacher's guess, see `Guess.of_tokens`.
    """

    ids: np.ndarray
    types: np.ndarray
    spans: tuple[tuple[int, int, float], ...]
    offsets: np.ndarray
    odds: np.ndarray | None = None


def features(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[list[Feature]]:
    """The windows of every question, in order. A window without the answer has its target on token 0, [CLS].

    Raises:
        InputError: a question leaves too little of a window to its context.
    """
    questions = [example.gold for example in examples]
    _check_lengths(tokenizer, questions)
    encoded = tokenizer(
        [q.question.strip() for q in questions],
        [q.context for q in questions],
        truncation="only_second",
        max_length=MAX_LENGTH,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows: list[list[Feature]] = [[] for _ in questions]
    for index, owner in enumerate(encoded["overflow_to_sample_mapping"]):
        encoding = encoded.encodings[index]
        spans = _spans(questions[owner], encoding.offsets, encoding.sequence_ids)
        of_context = np.array([sequence == 1 for sequence in encoding.sequence_ids])
        offsets = np.array(encoding.offsets, np.int32) * of_context[:, None]
        guess = examples[owner].guess
        odds = guess.of_tokens(offsets) if guess else None
        windows[owner].append(Feature(np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int8), spans, offsets, odds))
    return windows


def _check_lengths(tokenizer: PreTrainedTokenizerFast, questions: Sequence[GoldQuestion]) -> None:
    """Check that every question leaves room for its context: the tokenizer panics if a window cannot advance by its stride."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = MAX_LENGTH - special - STRIDE
    for question in questions:
        # No token is shorter than a character.
        if len(question.question) < room:
            continue
        asked, context = (
            len(tokenizer(text, add_special_tokens=False).input_ids) for text in (question.question.strip(), question.context)
        )
        if asked >= room and asked + context + special > MAX_LENGTH:
            raise InputError(f"its {asked} tokens leave no room for the context; {room - 1} may be asked", where=f"question {question.id}")


def _spans(question: GoldQuestion, offsets: list[tuple[int, int]], sequence_ids: list[int | None]) -> tuple[tuple[int, int, float], ...]:
    spans = []
    context_tokens = [i for i, s in enumerate(sequence_ids) if s == 1]
    for answer in question.answers:
        assert answer.start is not None
        begin, end = answer.start, answer.start + len(answer.text.rstrip())
        covered = [i for i in context_tokens if offsets[i][1] > begin and offsets[i][0] < end]
        if covered and offsets[covered[0]][0] <= begin and offsets[covered[-1]][1] >= end:
            spans.append((covered[0], covered[-1]))
    given = [span for span in spans if span[1] - span[0] < LONGEST_ANSWER] or [(first, first + LONGEST_ANSWER - 1) for first, _ in spans]
    return tuple((first, last, count / len(given)) for (first, last), count in Counter(given).items()) or ((0, 0, 1.0),)


def negatives(questions: list[GoldQuestion], share: float, rng: random.Random) -> list[GoldQuestion]:
    """A ``share`` of the questions, each with a random paragraph of its article. Paragraphs that hold an answer's text are left out."""
    contexts = defaultdict(list)
    for question in questions:
        contexts[question.group].append(question.context)
    chosen = []
    for question in rng.sample(questions, int(share * len(questions))):
        context = rng.choice(contexts[question.group])
        if not any(answer.text.lower() in context.lower() for answer in question.answers):
            chosen.append(GoldQuestion(question.id, question.group, question.question, context, ()))
    return chosen


def shortened(example: Example, share: float, rng: random.Random) -> Example:
    """The question with a random part, up to ``share``, of the sentences without an answer removed from its context."""
    share *= rng.random()
    question = example.gold
    context, kept, moved = "", [], [0] * len(question.answers)
    places = [(answer.start or 0, (answer.start or 0) + len(answer.text)) for answer in question.answers]
    for start, end in _sentences(question.context):
        if any(begin < end and stop > start for begin, stop in places) or rng.random() >= share:
            moved = [len(context) - start + begin if start <= begin < end else m for m, (begin, _) in zip(moved, places, strict=True)]
            context += question.context[start:end]
            kept.append(slice(start, end))
    answers = tuple(replace(a, start=m) for a, m in zip(question.answers, moved, strict=True))
    guess = Guess(np.concatenate([example.guess.odds[part] for part in kept])) if example.guess and context else None
    return Example(replace(question, context=context, answers=answers), guess)


def _sentences(context: str) -> Iterator[tuple[int, int]]:
    """The spans of the context's sentences, in characters, judged by end punctuation alone. They cover the whole context."""
    start = 0
    for end in [match.end() for match in re.finditer(r"[.!?][\"')\]]*\s+", context)]:
        yield start, end
        start = end
    yield start, len(context)


def check_answers(questions: Sequence[GoldQuestion]) -> None:
    """Check that every answer stands at its offset.

    Raises:
        InputError: it does not, or has no offset.
    """
    for question in questions:
        for answer in question.answers:
            if answer.start is None:
                raise InputError("training needs the offset of every answer, as SQuAD JSON has it", where=f"question {question.id}")
            if answer.start < 0 or not question.context.startswith(answer.text, answer.start):
                raise InputError(f"its answer {answer.text!r} does not stand at {answer.start}", where=f"question {question.id}")


def schedule_of(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], recipe: Recipe) -> list[list[Feature]]:
    """The batches of all epochs, in order."""
    schedule = []
    for epoch in range(recipe.epochs):
        rng = random.Random(f"{recipe.seed}-{epoch}")
        asked = [shortened(example, recipe.left_out, rng) for example in examples]
        asked += map(Example, negatives([example.gold for example in examples], recipe.negatives, rng))
        schedule += batches(features(tokenizer, asked), recipe, rng)
    return schedule


def batches(asked: list[list[Feature]], recipe: Recipe, rng: random.Random) -> list[list[Feature]]:
    """The batches of one epoch, in random order. The windows of a batch have about the same length."""
    by_length: dict[int, list[Feature]] = defaultdict(list)
    for windows in asked:
        for feature in windows:
            by_length[min(length for length in LENGTHS if length >= len(feature.ids))].append(feature)
    grouped = []
    for length, group in sorted(by_length.items()):
        rng.shuffle(group)
        size = max(1, recipe.tokens_per_batch // length)
        grouped += [group[i : i + size] for i in range(0, len(group), size)]
    rng.shuffle(grouped)
    return grouped


def tensors(batch: list[Feature], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """A batch as tensors.

    Those of `INPUTS` that the tokenizer's model takes have shape (windows, length). ``first``, ``last`` and ``share`` of the right answers
    have shape (windows, most answers). The teacher's ``odds`` have shape (windows, length, 2); ``taught``, shape (windows,), says which
    windows have any.
    """
    pad = tokenizer.pad_token_id
    length = min(n for n in LENGTHS if n >= max(len(f.ids) for f in batch))
    shape = (len(batch), length)
    ids, types = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
    answers = (len(batch), max(len(f.spans) for f in batch))
    first, last, share = torch.zeros(answers, dtype=torch.long), torch.zeros(answers, dtype=torch.long), torch.zeros(answers)
    odds = torch.full((*shape, 2), -torch.inf)
    for row, feature in enumerate(batch):
        if feature.odds is not None:
            odds[row, : len(feature.odds)] = torch.from_numpy(feature.odds)
        ids[row, : len(feature.ids)] = torch.from_numpy(feature.ids)
        types[row, : len(feature.types)] = torch.from_numpy(feature.types)
        for column, span in enumerate(feature.spans):
            first[row, column], last[row, column], share[row, column] = span
    inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": (ids != pad).long()}
    inputs = {name: inputs[name] for name in INPUTS if name in tokenizer.model_input_names}
    # The first token stands for "no answer", to which the odds are relative.
    odds[:, 0] = 0
    taught = torch.tensor([feature.odds is not None for feature in batch])
    return inputs | {"first": first, "last": last, "share": share, "odds": odds, "taught": taught}


def masked(batch: dict[str, torch.Tensor], share: float, mask: int, special: Sequence[int]) -> dict[str, torch.Tensor]:
    """The batch with a random part, up to ``share``, of each window's tokens replaced by ``mask``, the id of [MASK].

    Tokens of the right answers and ``special`` tokens ([CLS], [SEP], [PAD]) are never replaced.
    """
    places = torch.arange(batch["input_ids"].shape[1])
    spared = ((places >= batch["first"][..., None]) & (places <= batch["last"][..., None])).any(1)
    spared |= torch.isin(batch["input_ids"], torch.tensor(special))
    chosen = torch.rand(batch["input_ids"].shape) < share * torch.rand(len(spared), 1)
    return batch | {"input_ids": batch["input_ids"].masked_fill(chosen & ~spared, mask)}
