"""Train the bundled model: SQuAD JSON in, a Hugging Face model folder out.

    python -m qa_platform.training.train --start FOLDER --data A.json B.json --out FOLDER

``--start`` is an encoder with WordPiece tokens, of the family BERT or MPNet. The bundled model starts from all-MiniLM-L6-v2, its teacher
from all-mpnet-base-v2. The recipe differs from plain fine-tuning as follows:

* Every annotator's answer is right, as the metric takes the best of them: the loss is the negative logarithm of the probability of
  all of them together (the marginal likelihood of Clark and Gardner, 2018, with the annotators' shares as weights). The model need
  not hedge between a short and a long answer to the same question.
* The engine gives no answer longer than `LONGEST_ANSWER` tokens, so longer ones are not taught. If all annotators' answers are
  longer, their beginnings are taught.
* The expected F1 of the model's answers is part of the loss: what counts is the span, not the start and the end on their own.
* Each epoch sees a question in a new form, so that the model does not memorise a small set: sentences without an answer are left
  out (`shortened`), and tokens of the context and of the question are masked.
* Negative contexts: some questions are asked about another paragraph of the same article, with the target on [CLS], so that the
  model learns to find nothing in a window without an answer.
* With ``--teacher``, the probabilities of a larger model, trained by this script before, are learnt beside the annotators' answers
  (distillation, Hinton et al., 2015). The teacher is asked once, about whole contexts. Its guesses are used for shortened contexts
  too, but not for negative ones.
* The learning rate stays at its peak and falls to zero over the last steps (`DECAY`). Until then a run does not depend on its length.
* The weights that are written are an exponential moving average over the last steps (`AVERAGED`).
* Several runs that differ only in their seeds are averaged, weight by weight (``--members``; the uniform soup of Wortsman et al.,
  2022). They start from the same weights, so their average lies in the same valley of the loss, and answers better than any of them.
  With ``--rounds``, the next runs start from that average, for one epoch at half the rate.

The model computes in bfloat16 throughout, with float32 master weights for the optimizer: on a CPU with AMX that takes two
thirds of the time of automatic mixed precision. Attention is not fused: the backward pass of PyTorch's fused attention
takes half of a step there. A CPU without AVX-512 computes in float32, as it has to emulate bfloat16. Training uses a GPU if there is
one (``--device``). All random numbers are drawn on the CPU, so a run that began on one device may be resumed on another.

One paragraph in six (`gold.held_out`) is never trained on. The same command resumes a killed run. Figures go to standard output and to
``train_log.jsonl`` in each run's checkpoint folder.
"""

import argparse
import copy
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from qa_platform.answering.calibration import KEY
from qa_platform.answering.runtimes.torch import torch_device
from qa_platform.errors import InputError
from qa_platform.evaluation.gold import held_out, read_gold
from qa_platform.training.data import WEIGHTS, Example, Recipe, arithmetic, check_answers, load_tokenizer, masked, schedule_of, tensors
from qa_platform.training.losses import loss_of
from qa_platform.training.teacher import taught

# The written weights are averaged over the last steps; this is their share of all steps.
AVERAGED = 0.25
HIDDEN_DROPOUT = 0.1
WEIGHT_DECAY = 0.01
WARM_UP_STEPS = 250
# The learning rate falls over the last steps; this is their share of all steps.
DECAY = 0.4
LOG_STEPS = 50
CHECKPOINT_STEPS = 200


class PooledDropout(torch.nn.Module):
    """Dropout whose masks are random slices of one pool, made in advance.

    On a CPU, drawing the random numbers of ordinary dropout takes a third of a training step; slices cost one multiplication.
    """

    POOL_ELEMENTS = 2**24

    def __init__(self, probability: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        keep = torch.rand(self.POOL_ELEMENTS) >= probability
        self._pool = (keep / (1 - probability)).to(device, dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return hidden
        offset = int(torch.randint(self.POOL_ELEMENTS - hidden.numel(), ()))
        return hidden * self._pool[offset : offset + hidden.numel()].view_as(hidden)


def with_pooled_dropout(model: PreTrainedModel, probability: float) -> None:
    """Replace the dropout layers of a model by one `PooledDropout`."""
    shared = PooledDropout(probability, model.device, model.dtype)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Dropout) and child.p > 0:
                setattr(module, name, shared)


class Checkpoint:
    """The state of a run on disk, replaced atomically, so that a killed run can be resumed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "checkpoint.pt"

    def __str__(self) -> str:
        return str(self._path)

    def save(self, **state: object) -> None:
        partial = self._path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._path)

    def load(self) -> dict | None:
        return torch.load(self._path, weights_only=True, map_location="cpu") if self._path.exists() else None


def train_averaged(
    start: Path, examples: Sequence[Example], out: Path, recipe: Recipe, *, members: int, rounds: int, device: str = "cpu"
) -> None:
    """Train ``members`` models ``rounds`` times, each round from the average of the one before, and write the last average to ``out``.

    Rounds after the first have one epoch, at half the rate. The members lie in ``<out>.round-R.member-M``, with their checkpoints;
    finished members are not trained again.
    """
    for number in range(rounds):
        folders = [out.with_name(f"{out.name}.round-{number + 1}.member-{member + 1}") for member in range(members)]
        for member, folder in enumerate(folders):
            train(start, examples, folder, replace(recipe, seed=recipe.seed + number * members + member), device=device)
        if number == 0:
            recipe = replace(recipe, epochs=1, learning_rate=recipe.learning_rate / 2)
        start = out if number + 1 == rounds else out.with_name(f"{out.name}.round-{number + 1}")
        average(folders, start)


def average(folders: Sequence[Path], out: Path) -> None:
    """Write the model whose weights are the mean of those of ``folders``. All have the same architecture and tokenizer."""
    tensors = [load_file(folder / WEIGHTS) for folder in folders]
    mean = {name: torch.stack([weights[name].float() for weights in tensors]).mean(0).half() for name in tensors[0]}
    shutil.copytree(folders[0], out, dirs_exist_ok=True)
    save_file(mean, out / WEIGHTS, metadata={"format": "pt"})


def train(start: Path, examples: Sequence[Example], out: Path, recipe: Recipe, *, device: str = "cpu") -> None:
    """Train on ``examples`` and write the model folder ``out``. Checkpoints and the log lie in ``<out>.work``.

    Args:
        device: the torch name of the device.
    """
    torch.manual_seed(recipe.seed)
    work = out.with_name(out.name + ".work")
    run = _Run(start, examples, recipe, Checkpoint(work), device)
    run.resume()
    with (work / "train_log.jsonl").open("a") as log:
        run.finish(log)
    run.save(out)


class _Run:
    """One training run. ``done`` counts the finished steps of the ``schedule``.

    ``master`` holds the float32 weights. ``model``, its copy in the dtype of `arithmetic`, computes. ``average`` follows ``master``, and is
    the result.
    """

    def __init__(self, start: Path, examples: Sequence[Example], recipe: Recipe, checkpoint: Checkpoint, device: str) -> None:
        self.recipe = recipe
        self.checkpoint = checkpoint
        self.tokenizer = load_tokenizer(start)
        master = AutoModelForQuestionAnswering.from_pretrained(
            start, dtype=torch.float32, attention_probs_dropout_prob=0.0, attn_implementation="eager"
        )
        # The calibration belongs to the weights before training.
        vars(master.config).pop(KEY, None)
        self.master = master.to(device).train()
        self.average = copy.deepcopy(self.master)
        self.model = copy.deepcopy(self.master).to(arithmetic(device))
        with_pooled_dropout(self.model, HIDDEN_DROPOUT)
        self.optimizer = _optimizer(self.master, recipe)
        self.schedule = schedule_of(self.tokenizer, examples, recipe)
        self.done = 0
        self.origin = _origin(start, examples, recipe)

    def resume(self) -> None:
        """Go back to the last checkpoint, if there is one."""
        if state := self.checkpoint.load():
            if state.get("of") != self.origin:
                raise InputError("its checkpoint belongs to other data, weights or options", where=str(self.checkpoint), advice="remove it")
            self.master.load_state_dict(state["master"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            self.done = state["step"]

    def finish(self, log: TextIO) -> None:
        """Run the remaining steps, with a line in the log and a checkpoint every few steps."""
        total, begun, losses = len(self.schedule), time.monotonic(), []
        while self.done < total:
            losses.append(self._step())
            self.done += 1
            if self.done % LOG_STEPS == 0 or self.done == total:
                mean, seconds = round(sum(losses) / len(losses), 4), round(time.monotonic() - begun, 1)
                entry = {"step": self.done, "of": total, "loss": mean, "seconds": seconds}
                print(json.dumps(entry), file=log, flush=True)
                print(entry, flush=True)
                losses.clear()
            if self.done % CHECKPOINT_STEPS == 0 or self.done == total:
                self._keep()

    def save(self, out: Path) -> None:
        """Write the averaged model and the tokenizer, as an ordinary model folder."""
        self.average.half().save_pretrained(out)
        self.tokenizer.save_pretrained(out)

    def _step(self) -> float:
        """Train on the next batch; returns its loss."""
        step, total = self.done, len(self.schedule)
        scale = min(1.0, (step + 1) / WARM_UP_STEPS, (total - step) / (DECAY * total))
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * scale
        self.model.load_state_dict(self.master.state_dict())
        loss = loss_of(self.model, self._batch(step))
        loss.backward()
        for ours, theirs in zip(self.master.parameters(), self.model.parameters(), strict=True):
            ours.grad = None if theirs.grad is None else theirs.grad.float()
            theirs.grad = None
        torch.nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        self.optimizer.step()
        _follow(self.average, self.master, max(0.9, 1 - 1 / (AVERAGED * total)) if step > total // 2 else 0.9)
        return float(loss.item())

    def _batch(self, step: int) -> dict[str, torch.Tensor]:
        batch = tensors(self.schedule[step], self.tokenizer)
        batch = masked(batch, self.recipe.masked, self.tokenizer.mask_token_id, self.tokenizer.all_special_ids)
        return {name: values.to(self.master.device) for name, values in batch.items()}

    def _keep(self) -> None:
        self.checkpoint.save(
            master=self.master.state_dict(),
            average=self.average.state_dict(),
            optimizer=self.optimizer.state_dict(),
            rng=torch.get_rng_state(),
            step=self.done,
            of=self.origin,
        )


def _origin(start: Path, examples: Sequence[Example], recipe: Recipe) -> str:
    """A hash of all that a run's weights depend on, apart from the device."""
    found = hashlib.sha256(repr((recipe, [example.gold for example in examples])).encode(errors="surrogatepass"))
    for path in sorted(start.glob("*.safetensors")):
        found.update(path.read_bytes())
    for example in examples:
        found.update(example.guess.odds.tobytes() if example.guess else b"-")
    return found.hexdigest()


def _optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW without weight decay for biases and norms, which have one dimension."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


@torch.no_grad()
def _follow(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.lerp_(theirs, 1 - decay)


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--rounds", type=int, default=1, help="how often members are trained and averaged, each time from the last average")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="torch device; default cuda if there is a GPU, else cpu (here %(default)s)",
    )
    return parser


def _examples(args: argparse.Namespace) -> list[Example]:
    """The examples of all files, those of ``--repeat`` twice."""
    of_path: dict[Path, list[Example]] = {}
    for path in args.data:
        questions = [question for question in read_gold(path) if not held_out(question)]
        check_answers(questions)
        untaught = [Example(question) for question in questions]
        of_path[path] = taught(args.teacher, questions, device=args.device) if args.teacher else untaught
    return [example for path in [*args.data, *args.repeat] for example in of_path[path]]


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if strange := {*args.repeat} - {*args.data}:
        parser.error(f"--repeat is for files among --data, and these are not: {', '.join(sorted(map(str, strange)))}")
    try:
        torch_device(args.device)
    except InputError as error:
        parser.error(str(error))
    recipe = Recipe(
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        tokens_per_batch=args.tokens_per_batch,
        weight_decay=WEIGHT_DECAY,
        negatives=args.negatives,
        masked=args.masked,
        left_out=args.left_out,
        seed=args.seed,
    )
    try:
        examples = _examples(args)
        print(recipe, len(examples), "questions, on", args.device, flush=True)
        train_averaged(args.start, examples, args.out, recipe, members=args.members, rounds=args.rounds, device=args.device)
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
