"""The commands that need a model but no service: ``answer``, ``evaluate`` and ``tune``."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from qa_platform.cli.arguments import OUTPUT
from qa_platform.contract import PRECISIONS, ModelChoice
from qa_platform.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qa_platform.answering.engine import Answerer, AnswerOptions
    from qa_platform.answering.rows import AskedRow, Counts
    from qa_platform.evaluation.evaluate import Evaluation, Figures
    from qa_platform.evaluation.no_answer import ThresholdComparison
    from qa_platform.ingest import TextLimits

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
# The exit status that shells report after Ctrl-C.
_INTERRUPTED = 130
# Leaves room for the text beside it in 80 columns.
_BAR_WIDTH = 30


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--model", help="`bundled`, a folder, or a Hugging Face id  [QA_MODEL, or bundled]"),
        click.option("--revision", help="Commit, tag or branch of a Hugging Face model  [QA_MODEL_REVISION]"),
        click.option("--threads", type=click.IntRange(0), default=0, help="Threads; 0 uses every core."),
        click.option("--device", default="cpu", show_default=True, help="cpu, or a GPU as torch names it: cuda."),
    )
    for option in reversed(options):
        command = option(command)
    return command


_precision_option = click.option(
    "--precision", type=click.Choice([*PRECISIONS, "auto"]), help="auto: what `tune` found  [QA_PRECISION, or fp32]"
)

_align_option = click.option(
    "--align-to-words/--no-align-to-words", default=None, help="Widen answers to whole words  [QA_ALIGN_TO_WORDS, or yes]"
)


def _aligned(align_to_words: bool | None) -> bool:
    from qa_platform.settings import ModelSettings

    return ModelSettings().align_to_words if align_to_words is None else align_to_words


def _choice(*, model: str | None, revision: str | None, precision: str | None = None, **_: Any) -> ModelChoice:
    from qa_platform.settings import ModelSettings

    default = ModelSettings().choice
    if model and model != default.id:
        # A revision and a threshold belong to their model: those of the settings do not apply to another one.
        default = ModelChoice(model, precision=default.precision)
    return replace(default, revision=revision or default.revision, precision=precision or default.precision)


@click.command()
@click.argument("file", type=_FILE)
@click.option("-o", "--output", type=OUTPUT, help="Write here, instead of to standard output; in gzip if the name ends in .gz.")
@_model_options
@_precision_option
@click.option("--top-k", type=click.IntRange(1), default=1, show_default=True, help="Answers per row; the others go into `alternatives`.")
@click.option("--min-score", type=click.FloatRange(0, 1), default=0.0, help="Flag answers below this probability as low_score.")
@click.option("--impossible", is_flag=True, help="Let the model say that a context has no answer  [yes if QA_NO_ANSWER_THRESHOLD is set]")
@_align_option
def answer(file: Path, output: Path | None, **values: Any) -> None:
    """Answer the CSV FILE on this machine, without any service.

    With -o, repeating the command continues an interrupted run.

    FILE and the output may be Parquet, if their names end in .parquet. Then all rows are held in memory, and an interrupted run starts
    over.
    """
    from qa_platform.answering import AnswerOptions
    from qa_platform.cli.terminal import rows_out
    from qa_platform.ingest import FileRejected, TextLimits
    from qa_platform.ingest.packing import is_parquet
    from qa_platform.settings import IngestSettings

    options = AnswerOptions(
        top_k=values["top_k"],
        min_score=values["min_score"],
        handle_impossible_answer=values["impossible"] or None,
        align_to_words=_aligned(values["align_to_words"]),
    )
    limits = TextLimits.of(IngestSettings())
    has_parquet = is_parquet(file) or (output is not None and is_parquet(output))
    if has_parquet:
        _need_parquet()
    if output is None:
        # Before hours are spent on the answers.
        rows_out()
    answerer = _answerer(**values)
    try:
        if has_parquet:
            from qa_platform import frames

            counts = frames.answer_file(answerer, file, output, options, limits=limits)
        else:
            counts = _answer_csv(answerer, file, output, options, limits)
        sys.stdout.buffer.flush()
    except FileRejected as error:
        raise error.of_file(str(file)) from error
    except KeyboardInterrupt:
        again = "; the same command continues from here" if output and not has_parquet else ""
        click.echo(f"stopped{again}", err=True)
        sys.exit(_INTERRUPTED)
    _summarize(counts)


def _need_parquet() -> None:
    if missing := [library for library in ("pandas", "pyarrow", "tqdm") if find_spec(library) is None]:
        raise InputError(f"Parquet needs {' and '.join(missing)}", advice="pip install 'qa-platform[frames]'")


def _answer_csv(answerer: "Answerer", file: Path, output: Path | None, options: "AnswerOptions", limits: "TextLimits") -> "Counts":
    from qa_platform.answering.csvfile import answer_file, answer_stream

    # A bar must not share a terminal with the rows.
    shown = output is not None or not sys.stdout.isatty()
    with _progress(file.stat().st_size, unit="rows", shown=shown) as bar:

        def report(row: "AskedRow") -> None:
            bar(row.size)

        def skipped(row: "AskedRow") -> None:
            bar(row.size, skipped=True)

        if output:
            return answer_file(answerer, file, output, options, report, skipped=skipped, limits=limits)
        with file.open("rb") as source:
            return answer_stream(answerer, source, sys.stdout.buffer, options, report, limits=limits)


def _answerer(*, threads: int, device: str, **values: Any) -> "Answerer":
    from qa_platform.answering import Answerer

    answerer = Answerer(_choice(**values), threads=threads, device=device, processes=0)
    answerer.warm_up()
    return answerer


def _summarize(counts: "Counts") -> None:
    parts = [f"{counts.rows} rows", f"{counts.answered} answered", f"{counts.no_answer} without answer", f"{counts.rejected} rejected"]
    click.echo(", ".join(parts), err=True)


class _Advance(Protocol):
    """Called after each row or question with its share of the total. ``skipped``: an earlier run has answered it."""

    def __call__(self, size: int, *, skipped: bool = False) -> None: ...


@contextmanager
def _progress(total: int, *, unit: str, shown: bool) -> Iterator[_Advance]:
    """A progress bar on standard error, with the speed and the time left. Shows nothing if standard error is not a terminal.

    Skipped rows count as done, but not for the speed: they all come first, and take no time.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda size, *, skipped=False: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    from qa_platform.cli.terminal import console

    text = TextColumn(f"{{task.fields[count]}} {unit}, {{task.fields[rate]:.0f}}/s, {{task.fields[left]}} left")
    # The bar must not redirect standard output, which may be a file.
    with Progress(BarColumn(_BAR_WIDTH), TaskProgressColumn(), text, console=console(stderr=True), redirect_stdout=False) as bar:
        task = bar.add_task("", total=total, count=0, rate=0.0, left="-:--:--")
        begun = time.monotonic()
        count = done = count_before = done_before = 0

        def advance(size: int, *, skipped: bool = False) -> None:
            nonlocal begun, count, done, count_before, done_before
            count += 1
            done += size
            if skipped:
                begun, count_before, done_before = time.monotonic(), count, done
                bar.update(task, completed=done, count=count)
                return
            # The average speed of the run: answers come in bursts, and the speed of a burst predicts nothing.
            seconds = max(time.monotonic() - begun, 1e-6)
            left = timedelta(seconds=math.ceil(max(total - done, 0) * seconds / (done - done_before)))
            bar.update(task, completed=done, count=count, rate=(count - count_before) / seconds, left=left)

        yield advance
        bar.update(task, completed=total)


@click.command()
@click.argument("gold", type=_FILE)
@_model_options
@_precision_option
@click.option("--held-out", is_flag=True, help="Ask only the sixth of the paragraphs that the bundled model was not trained on.")
@click.option(
    "--impossible/--no-impossible",
    default=None,
    help="Whether the model may say that there is no answer  [if the gold set has such questions]",
)
@click.option("--remember", is_flag=True, help="Store the no-answer threshold with the best F1, for this model on this machine.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
@_align_option
def evaluate(
    gold: Path, held_out: bool, impossible: bool | None, remember: bool, as_json: bool, align_to_words: bool | None, **values: Any
) -> None:
    """Measure exact match and F1 of a model on a gold set.

    GOLD is SQuAD JSON, or a CSV with the columns question, context and answers. If it has questions without an answer, the command finds
    the threshold with the best F1: how much likelier "no answer" must be than the best answer. --remember stores it for
    `answer --impossible`.
    """
    from qa_platform.answering.model import find_model
    from qa_platform.answering.tuned import remember_threshold
    from qa_platform.cli.json_output import json_document
    from qa_platform.evaluation import evaluate as evaluation
    from qa_platform.evaluation import gold as squad

    questions = [question for question in squad.read_gold(gold) if not held_out or squad.held_out(question)]
    if not questions:
        raise InputError(f"it has no {'held-out ' if held_out else ''}question", where=str(gold))
    if remember and (impossible is False or not evaluation.has_both_kinds(questions)):
        advice = "use a gold set that has questions with and without an answer, and omit --no-impossible"
        raise InputError("there is no threshold to store", where=str(gold), advice=advice)
    answerer = _answerer(**values)
    with _progress(len(questions), unit="questions", shown=True) as bar:
        aligned = _aligned(align_to_words)
        result = evaluation.evaluate(
            answerer, questions, handle_impossible_answer=impossible, align_to_words=aligned, report=lambda: bar(1)
        )
    if remember and result.no_answer:
        remember_threshold(find_model(_choice(**values)), values["device"], result.no_answer.best.threshold)
    if as_json:
        click.echo(json_document(result))
    else:
        _show(result, remembered=remember)


def _show(result: "Evaluation", *, remembered: bool) -> None:
    from qa_platform.cli.terminal import console, one_line

    out = console()
    model = result.model
    out.print(one_line(f"model {model.id}, revision {model.revision}, {model.precision}"), soft_wrap=True)
    _print_figures(out, "all questions", "", (result.total,))
    if result.rejected:
        out.print(f"{result.rejected} of them cannot be asked, and count as wrong", soft_wrap=True)
    _print_figures(out, "by characters of the context", "characters", result.by_context)
    _print_figures(out, "by score, a tenth of the questions each", "score", result.by_score)
    out.print(f"\nmean distance between score and exact match, by decile: {result.calibration_error:.3f}", soft_wrap=True)
    if result.no_answer:
        _print_thresholds(out, result.no_answer, remembered=remembered)


def _print_thresholds(out: "Console", found: "ThresholdComparison", *, remembered: bool) -> None:
    from qa_platform.cli.terminal import table

    headers = ("threshold", "exact match %", "F1 %", "F1 % answerable", "F1 % unanswerable")
    cells = []
    for name, row in (("default", found.default), ("best F1", found.best)):
        figures = (row.exact_match, row.f1, row.f1_answerable, row.f1_unanswerable)
        cells.append((f"{name}: {row.threshold:g}", *(f"{figure:.1f}" for figure in figures)))
    out.print('\nby the threshold that "no answer" has to exceed', style="italic")
    for line in table(headers, cells, width=out.width if out.is_terminal else None, right=range(1, len(headers))):
        out.print(line, soft_wrap=True)
    if found.in_use:
        out.print(f"\nall figures above this table are for the threshold in use, {found.in_use!r}", soft_wrap=True)
    out.print("\nthe best threshold " + _use_of(found.best.threshold, remembered=remembered), soft_wrap=True)


def _use_of(threshold: float, *, remembered: bool) -> str:
    stored = "is stored for this model on this machine" if remembered else "is not stored; --remember stores it for this machine"
    return f"{stored}. `qa-platform answer --impossible` uses a stored one. For the pipelines set QA_NO_ANSWER_THRESHOLD={threshold!r}"


def _print_figures(out: "Console", title: str, group: str, rows: tuple["Figures", ...]) -> None:
    from qa_platform.cli.terminal import table

    headers = (group, "questions", "exact match %", "F1 %", "mean score")
    cells = [(row.group, str(row.questions), f"{row.exact_match:.1f}", f"{row.f1:.1f}", f"{row.score:.3f}") for row in rows]
    out.print(f"\n{title}", style="italic")
    for line in table(headers, cells, width=out.width if out.is_terminal else None, right=range(1, len(headers))):
        out.print(line, soft_wrap=True)


@click.command()
@click.argument("gold", type=_FILE, default=Path("samples/gold.csv"))
@_model_options
def tune(gold: Path, **values: Any) -> None:
    """Find a model's fastest precision on this machine.

    The command stores the fastest one that passes the gate on GOLD (as for `evaluate`). The precision `auto` means it from then on. GOLD
    defaults to samples/gold.csv in the current folder.
    """
    from qa_platform.evaluation import gold as squad
    from qa_platform.evaluation.tune import tune as run

    result = run(_choice(**values), squad.read_gold(gold), threads=values["threads"], device=values["device"])
    for trial in result.trials:
        verdict = "passes" if result.passes(trial) else "fails the gate"
        click.echo(f"{trial.precision}: {trial.questions_per_second:.1f} questions/s, F1 {trial.f1:.2f}, {verdict}")
    click.echo(f"auto means {result.chosen} for this model on this machine")


COMMANDS = (answer, evaluate, tune)
