"""Train the bundled model: SQuAD JSON in, a Hugging Face model folder out.

    python -m qa_platform.answering.train --start FOLDER --data A.json B.json --out FOLDER

Start is an encoder with WordPiece tokens, of the families BERT or MPNet (the bundled model starts from all-MiniLM-L6-v2, its teacher
from all-mpnet-base-v2). What this recipe does beyond plain fine-tuning:

* Every annotator's answer is right: the loss is the negative logarithm of the probability of all of them together, as the
  metric takes the best of them (the marginal likelihood of Clark and Gardner, 2018, with the annotators' shares as weights).
  The model need not hedge between a short and a long answer to the same question.
* An answer is never longer than `LONGEST_ANSWER`, so the model learns what it can give: of an annotator's longer answer only the
  beginning, and that only where no annotator has a shorter one.
* The F1 that is expected of the model's answers is part of the loss: what counts is the span, not the start and the end each for itself.
* No epoch sees a question as the one before did, so that few questions are not learnt by heart: sentences without an answer
  are left out (`shortened`), and tokens of the context and of the question are masked.
* Negative contexts: some questions are asked of another paragraph of the same article, with the target on [CLS], so that the
  model learns to find nothing in a window that has no answer.
* With `--teacher`, a larger model that this script trained before, its probabilities are learnt beside the annotators' answers
  (distillation, Hinton et al., 2015). It is asked once, about whole contexts, and its word is taken to hold also where sentences are
  left out; it is not asked about the negative contexts.
* The learning rate stays at its peak and falls to nothing over the last steps (`DECAY`): until then a run does not depend on how
  long it will be.
* The weights that are kept are an exponential moving average over the last steps (`AVERAGED`).
* Several runs that differ in their seeds alone are averaged, weight by weight (`--members`; the uniform soup of Wortsman et al.,
  2022). They start from the same weights, so their average lies in the same valley, and answers better than each. With `--rounds`
  the average is what the next runs start from, for one epoch at half the rate.

The model computes in bfloat16 throughout, with float32 master weights for the optimizer: on a CPU with AMX that takes two
thirds of the time of automatic mixed precision. Attention is the plain one: the backward pass of PyTorch's fused attention
takes half of a step there.

One paragraph in six (`squad.held_out`) is never trained on. Resumable: run the same command again
after a kill. Figures go to standard output and to ``train_log.jsonl`` in each run's checkpoint folder.
"""

import argparse
import copy
import hashlib
import json
import random
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from qa_platform.answering.squad import GoldQuestion, held_out, read_gold
from qa_platform.errors import InputError

MAX_LENGTH = 384
STRIDE = 128
LONGEST_ANSWER = 15
# A few fixed lengths: ever-changing shapes make the allocator and the kernel caches grow without bound.
LENGTHS = (96, 128, 160, 192, 224, 256, 320, 384)
# The steps over whose weights those that are kept are averaged, as a share of all steps.
AVERAGED = 0.25
HIDDEN_DROPOUT = 0.1
WARM_UP_STEPS = 250
DECAY = 0.4
CHECKPOINT_STEPS = 200
TEMPERATURE = 2.0
# The least that a teacher's guess says of a token, against "no answer", in nats.
UNLIKELY = -20.0
GUESSED_TOGETHER = 2048
WINDOWS_TOGETHER = 32
WEIGHTS = "model.safetensors"
_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run; they are written into the log and belong into the model card."""

    epochs: int
    learning_rate: float
    tokens_per_batch: int
    weight_decay: float
    negatives: float
    masked: float
    left_out: float
    seed: int


@dataclass(frozen=True)
class Guess:
    """What a teacher thinks of a question: for every character of the context, by how much (in nats) a token that begins or ends
    with it is likelier to begin or end the answer than there is to be none; shape (characters, 2). `UNLIKELY` where no token does."""

    odds: np.ndarray

    def of_tokens(self, offsets: np.ndarray) -> np.ndarray:
        """The same of a window's tokens, which lie at ``offsets`` (see `Feature`); shape (tokens, 2), -inf for those that are not the
        context's."""
        first, after = offsets[:, 0], offsets[:, 1]
        found = np.stack([self.odds[first, 0], self.odds[after - 1, 1]], axis=1)
        return np.where((after > first)[:, None], found, np.float16(-np.inf))


@dataclass(frozen=True)
class Example:
    """A question that is trained on, and what the teacher, if there is one, thinks of it."""

    gold: GoldQuestion
    guess: Guess | None = None


@dataclass(frozen=True)
class Feature:
    """One window: token ids; the right answers as (first token, last token, annotators' share); ``offsets`` of the tokens in the
    context's characters, shape (tokens, 2), (0, 0) for those of anything else; and what the teacher guesses of them (`Guess.of_tokens`).
    """

    ids: np.ndarray
    types: np.ndarray
    spans: tuple[tuple[int, int, float], ...]
    offsets: np.ndarray
    odds: np.ndarray | None = None


def features(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[list[Feature]]:
    """The windows of every question, in order. A window without the answer has its target on token 0, [CLS]."""
    questions = [example.gold for example in examples]
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


def _spans(question: GoldQuestion, offsets: list[tuple[int, int]], sequence_ids: list[int | None]) -> tuple[tuple[int, int, float], ...]:
    spans = []
    context_tokens = [i for i, s in enumerate(sequence_ids) if s == 1]
    for answer in question.answers:
        if answer.start is None:
            raise InputError(f"question {question.id}: training needs the offset of every answer, as SQuAD JSON has it")
        begin, end = answer.start, answer.start + len(answer.text.rstrip())
        covered = [i for i in context_tokens if offsets[i][1] > begin and offsets[i][0] < end]
        if covered and offsets[covered[0]][0] <= begin and offsets[covered[-1]][1] >= end:
            spans.append((covered[0], covered[-1]))
    given = [span for span in spans if span[1] - span[0] < LONGEST_ANSWER] or [(first, first + LONGEST_ANSWER - 1) for first, _ in spans]
    return tuple((first, last, count / len(given)) for (first, last), count in Counter(given).items()) or ((0, 0, 1.0),)


def negatives(questions: list[GoldQuestion], share: float, rng: random.Random) -> list[GoldQuestion]:
    """Questions asked of another paragraph of the same article, unless that paragraph holds the answer's text too."""
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
    """The question with up to ``share`` of the sentences without an answer left out of its context, how many drawn at random."""
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
    """Spans of characters that cover the context: its sentences, as far as full stops tell."""
    start = 0
    for end in [match.end() for match in re.finditer(r"[.!?][\"')\]]*\s+", context)]:
        yield start, end
        start = end
    yield start, len(context)


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
    """One epoch's batches of the windows of all that is asked: windows of like length together, in random order."""
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
    """What the tokenizer's model takes of `_INPUTS`, each of shape (windows, length); first, last and share of the right
    answers, each of shape (windows, most answers); the teacher's odds, shape (windows, length, 2), and for which windows it has
    any, shape (windows,)."""
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
    inputs = {name: inputs[name] for name in _INPUTS if name in tokenizer.model_input_names}
    # "No answer" stands on the first token, and the odds are against it.
    odds[:, 0] = 0
    taught = torch.tensor([feature.odds is not None for feature in batch])
    return inputs | {"first": first, "last": last, "share": share, "odds": odds, "taught": taught}


def masked(batch: dict[str, torch.Tensor], share: float, mask: int, special: Sequence[int]) -> dict[str, torch.Tensor]:
    """The batch with up to ``share`` of a window's tokens, how many drawn at random, replaced by [MASK].

    Tokens of the right answers and the ``special`` ones, [CLS], [SEP] and [PAD], are spared.
    """
    places = torch.arange(batch["input_ids"].shape[1])
    spared = ((places >= batch["first"][..., None]) & (places <= batch["last"][..., None])).any(1)
    spared |= torch.isin(batch["input_ids"], torch.tensor(special))
    chosen = torch.rand(batch["input_ids"].shape) < share * torch.rand(len(spared), 1)
    return batch | {"input_ids": batch["input_ids"].masked_fill(chosen & ~spared, mask)}


def loss_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the windows of three terms: the negative log likelihood, in nats, of all right answers together (an answer's is that
    of its start and its end); 1 less the F1 that is expected of an answer drawn as the engine weighs them; and `divergence`, where
    there is a teacher's guess."""
    out = model(**{name: batch[name] for name in _INPUTS if name in batch})
    padded = (batch["attention_mask"] == 0)[..., None]
    logits = torch.stack([out.start_logits, out.end_logits], -1).float().masked_fill(padded, -1e4)
    start, end = torch.log_softmax(logits, dim=1).unbind(-1)
    likely = batch["share"].log() + start.gather(1, batch["first"]) + end.gather(1, batch["last"])
    loss = -likely.logsumexp(-1) + 1 - expected_f1(start, end, batch["first"], batch["last"], batch["share"] > 0)
    return (loss + batch["taught"] * divergence(logits, batch["odds"])).mean()


def divergence(logits: torch.Tensor, odds: torch.Tensor) -> torch.Tensor:
    """How far the model is from its teacher, start and end together: the Kullback-Leibler divergence in nats, both made softer by
    `TEMPERATURE`, times its square (Hinton et al., 2015). Both arguments have shape (windows, tokens, 2), the result (windows,)."""
    ours, theirs = ((values / TEMPERATURE).log_softmax(1) for values in (logits, odds))
    return TEMPERATURE**2 * torch.where(theirs.isfinite(), theirs.exp() * (theirs - ours), 0.0).sum((1, 2))


def expected_f1(start: torch.Tensor, end: torch.Tensor, first: torch.Tensor, last: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The expected F1, in tokens, against the best of the right answers, of spans of up to `LONGEST_ANSWER` tokens.

    ``start`` and ``end`` are log probabilities of shape (windows, tokens), ``first``, ``last`` and ``right`` (whether it is an answer,
    not padding) have shape (windows, answers). The result has shape (windows,).
    """
    tokens = start.shape[1]
    begin = torch.arange(tokens)[:, None]
    stop = begin + torch.arange(LONGEST_ANSWER)
    # (windows, tokens, lengths)
    score = start[:, :, None] + end[:, stop.clamp(max=tokens - 1)]
    weight = score.masked_fill(stop >= tokens, -1e4).flatten(1).softmax(-1).view(score.shape)
    best = torch.zeros(score.shape)
    for column in range(first.shape[1]):
        left, till = first[:, column, None, None], last[:, column, None, None]
        common = (torch.minimum(stop, till) - torch.maximum(begin, left) + 1).clamp(min=0)
        f1 = 2 * common / (stop - begin + 1 + till - left + 1)
        best = torch.maximum(best, f1 * right[:, column, None, None])
    return (weight * best).flatten(1).sum(-1)


class PooledDropout(torch.nn.Module):
    """Dropout whose masks are random slices of one pool made beforehand.

    On a CPU, drawing the random numbers of ordinary dropout takes a third of a training step; slices cost one multiplication.
    """

    POOL_ELEMENTS = 2**24

    def __init__(self, probability: float) -> None:
        super().__init__()
        keep = torch.rand(self.POOL_ELEMENTS) >= probability
        self._pool = (keep / (1 - probability)).to(torch.bfloat16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return hidden
        offset = int(torch.randint(self.POOL_ELEMENTS - hidden.numel(), ()))
        return hidden * self._pool[offset : offset + hidden.numel()].view_as(hidden)


def with_pooled_dropout(model: PreTrainedModel, probability: float) -> None:
    """Replace the dropout of hidden states; that of attention is off."""
    shared = PooledDropout(probability)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Dropout) and child.p > 0:
                setattr(module, name, shared)


class Checkpoint:
    """The state of a run on disk, replaced atomically, so that a killed run goes on where it was."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "checkpoint.pt"

    def save(self, **state: object) -> None:
        partial = self._path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._path)

    def load(self) -> dict | None:
        return torch.load(self._path, weights_only=True) if self._path.exists() else None


def taught(teacher: Path, questions: Sequence[GoldQuestion]) -> list[Example]:
    """The questions with the guesses of ``teacher``, a model folder. They are kept in ``<teacher>.guesses``: what these weights have
    guessed before is not guessed again."""
    weights = hashlib.sha256((teacher / WEIGHTS).read_bytes()).hexdigest()
    kept = teacher.with_name(teacher.name + ".guesses") / weights
    kept.mkdir(parents=True, exist_ok=True)
    known: dict[str, np.ndarray] = {}
    for path in kept.glob("*.npz"):
        with np.load(path) as arrays:
            known.update(arrays)
    asked = {_key(question): question for question in questions}
    missing = [key for key in asked if key not in known]
    if missing:
        tokenizer = _tokenizer(teacher)
        model = AutoModelForQuestionAnswering.from_pretrained(teacher, dtype=torch.bfloat16, attn_implementation="eager").eval()
    for first in range(0, len(missing), GUESSED_TOGETHER):
        part = missing[first : first + GUESSED_TOGETHER]
        new = dict(zip(part, _guesses(model, tokenizer, [asked[key] for key in part]), strict=True))
        partial = kept / "partial"
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **new)
        partial.replace(kept / f"{part[0]}.npz")
        known.update(new)
        print({"guessed": first + len(part), "of": len(missing)}, flush=True)
    guesses = [known[_key(question)] for question in questions]
    return [Example(question, Guess(odds) if len(odds) else None) for question, odds in zip(questions, guesses, strict=True)]


def _key(question: GoldQuestion) -> str:
    return hashlib.sha256(repr((question.question, question.context)).encode()).hexdigest()


@torch.inference_mode()
def _guesses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[GoldQuestion]) -> list[np.ndarray]:
    """The odds of a `Guess` for every question: where windows overlap, the highest."""
    guesses = [np.full((len(question.context), 2), UNLIKELY, np.float16) for question in questions]
    windows = [(row, window) for row, of in enumerate(features(tokenizer, [Example(question) for question in questions])) for window in of]
    windows.sort(key=lambda entry: len(entry[1].ids))
    for first in range(0, len(windows), WINDOWS_TOGETHER):
        batch = windows[first : first + WINDOWS_TOGETHER]
        inputs = tensors([window for _, window in batch], tokenizer)
        out = model(**{name: inputs[name] for name in _INPUTS if name in inputs})
        logits = torch.stack([out.start_logits, out.end_logits], -1).float()
        odds = (logits - logits[:, :1]).clamp(min=UNLIKELY).numpy()
        for (row, window), found in zip(batch, odds, strict=True):
            tokens = (window.offsets[:, 1] > window.offsets[:, 0]).nonzero()[0]
            begins, ends = window.offsets[tokens, 0], window.offsets[tokens, 1] - 1
            np.maximum.at(guesses[row][:, 0], begins, found[tokens, 0].astype(np.float16))
            np.maximum.at(guesses[row][:, 1], ends, found[tokens, 1].astype(np.float16))
    return guesses


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(folder))
    # all-MiniLM-L6-v2 bakes in truncation and padding to 128 tokens, fit for sentences only.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = 512
    return tokenizer


def train_averaged(start: Path, examples: Sequence[Example], out: Path, recipe: Recipe, *, members: int, rounds: int) -> None:
    """Train ``members`` models ``rounds`` times, each round from the average of the one before, and write the last average to ``out``.

    Rounds after the first have one epoch, at half the rate. The members lie in ``<out>.round-R.member-M``, with their checkpoints:
    what is finished is not trained again.
    """
    for number in range(rounds):
        folders = [out.with_name(f"{out.name}.round-{number + 1}.member-{member + 1}") for member in range(members)]
        for member, folder in enumerate(folders):
            train(start, examples, folder, replace(recipe, seed=recipe.seed + number * members + member))
        if number == 0:
            recipe = replace(recipe, epochs=1, learning_rate=recipe.learning_rate / 2)
        start = out if number + 1 == rounds else out.with_name(f"{out.name}.round-{number + 1}")
        average(folders, start)


def average(folders: Sequence[Path], out: Path) -> None:
    """Write the model whose weights are the mean of those of ``folders``, which have the same architecture and tokenizer."""
    tensors = [load_file(folder / WEIGHTS) for folder in folders]
    mean = {name: torch.stack([of[name].float() for of in tensors]).mean(0).half() for name in tensors[0]}
    shutil.copytree(folders[0], out, dirs_exist_ok=True)
    save_file(mean, out / WEIGHTS, metadata={"format": "pt"})


def train(start: Path, examples: Sequence[Example], out: Path, recipe: Recipe) -> None:
    """Train on ``examples`` and write the model folder ``out``; checkpoints and the log lie in ``<out>.work``."""
    torch.manual_seed(recipe.seed)
    tokenizer = _tokenizer(start)
    master = AutoModelForQuestionAnswering.from_pretrained(
        start, dtype=torch.float32, attention_probs_dropout_prob=0.0, attn_implementation="eager"
    ).train()
    followed = copy.deepcopy(master)
    model = copy.deepcopy(master).to(torch.bfloat16)
    with_pooled_dropout(model, HIDDEN_DROPOUT)
    decayed = [p for p in master.parameters() if p.dim() > 1]
    plain = [p for p in master.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)

    work = out.with_name(out.name + ".work")
    checkpoint = Checkpoint(work)
    schedule = schedule_of(tokenizer, examples, recipe)
    total, done = len(schedule), 0
    if state := checkpoint.load():
        master.load_state_dict(state["master"])
        followed.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        done = state["step"]
    with (work / "train_log.jsonl").open("a") as log:
        begun, running = time.monotonic(), []
        for step in range(done, total):
            scale = min(1.0, (step + 1) / WARM_UP_STEPS, (total - step) / (DECAY * total))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * scale
            model.load_state_dict(master.state_dict())
            batch = masked(tensors(schedule[step], tokenizer), recipe.masked, tokenizer.mask_token_id, tokenizer.all_special_ids)
            loss = loss_of(model, batch)
            loss.backward()
            for ours, theirs in zip(master.parameters(), model.parameters(), strict=True):
                ours.grad = None if theirs.grad is None else theirs.grad.float()
                theirs.grad = None
            torch.nn.utils.clip_grad_norm_(master.parameters(), 1.0)
            optimizer.step()
            _follow(followed, master, max(0.9, 1 - 1 / (AVERAGED * total)) if step > total // 2 else 0.9)
            running.append(loss.item())
            if (step + 1) % 50 == 0 or step + 1 == total:
                entry = {
                    "step": step + 1,
                    "of": total,
                    "loss": round(sum(running) / len(running), 4),
                    "seconds": round(time.monotonic() - begun, 1),
                }
                print(json.dumps(entry), file=log, flush=True)
                print(entry, flush=True)
                running.clear()
            if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == total:
                checkpoint.save(
                    master=master.state_dict(),
                    average=followed.state_dict(),
                    optimizer=optimizer.state_dict(),
                    rng=torch.get_rng_state(),
                    step=step + 1,
                )
    followed.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def _follow(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.lerp_(theirs, 1 - decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="folder of the encoder to start from")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="SQuAD JSON files")
    parser.add_argument("--repeat", type=Path, nargs="*", default=[], help="files among --data whose questions count twice")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="folder of a larger model, trained on the same, whose guesses are learnt too")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--tokens-per-batch", type=int, default=6144)
    parser.add_argument("--negatives", type=float, default=0.05)
    parser.add_argument("--masked", type=float, default=0.4, help="share of a window's tokens that is masked, at most")
    parser.add_argument("--left-out", type=float, default=0.6, help="share of the sentences without an answer that is left out, at most")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--members", type=int, default=2, help="runs that are averaged")
    parser.add_argument("--rounds", type=int, default=1, help="how often that is done, each time from the last average")
    args = parser.parse_args()
    if strange := {*args.repeat} - {*args.data}:
        parser.error(f"--repeat is for files among --data, and these are not: {', '.join(sorted(map(str, strange)))}")
    recipe = Recipe(args.epochs, args.learning_rate, args.tokens_per_batch, 0.01, args.negatives, args.masked, args.left_out, args.seed)
    of_path: dict[Path, list[Example]] = {}
    for path in args.data:
        questions = [question for question in read_gold(path) if not held_out(question)]
        of_path[path] = taught(args.teacher, questions) if args.teacher else [Example(question) for question in questions]
    examples = [example for path in [*args.data, *args.repeat] for example in of_path[path]]
    print(recipe, len(examples), "questions", flush=True)
    train_averaged(args.start, examples, args.out, recipe, members=args.members, rounds=args.rounds)


if __name__ == "__main__":
    main()
