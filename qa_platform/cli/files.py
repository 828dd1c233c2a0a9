"""The commands that work on files: `upload`, `answers`, `retry`.

Each connects to whatever the environment names: the embedded stack inside ``qa-platform local run``, or a deployment.
"""

import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

import click

from qa_platform.cli.arguments import FILE_NAME, OUTPUT, STDIO, is_text
from qa_platform.contract import INCOMING, FileStatus, FileVersion
from qa_platform.errors import InputError, QaPlatformError
from qa_platform.text import escaped

if TYPE_CHECKING:
    from google.cloud import storage

    from qa_platform.cli.status.observe import ObserverSettings

_RENAME = "give it another name with --as"


def _bucket() -> "storage.Bucket":
    from qa_platform.clients.bucket import open_bucket
    from qa_platform.settings import BucketSettings

    return open_bucket(BucketSettings())


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option(
    "--as", "name", type=FILE_NAME, help="Name in the bucket, instead of the file's own. For one file only; standard input needs it."
)
@click.option("--wait", is_flag=True, help="Follow the files, as `status --watch` does, until the platform is done with them.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="With --wait: how long to wait at most.")
def upload(files: tuple[Path, ...], name: str | None, wait: bool, timeout: float | None) -> None:
    """Put CSVs of questions into the bucket; - is standard input.

    The platform finds them there by itself. A file with the name of an earlier one replaces it, and its answers replace the earlier
    ones.

    With --wait the exit status is 0 if every file is finished or unchanged. Otherwise it is 1, and standard error has a line for each
    other file, with its state and the reason. Ctrl-C and --timeout end only the waiting: the uploads stay, and are answered.
    """
    from qa_platform.clients import bucket
    from qa_platform.clients.refusals import bucket_errors
    from qa_platform.settings import WorkSettings

    if timeout is not None and not wait:
        raise click.UsageError("--timeout requires --wait")
    if name is not None and len(files) > 1:
        raise click.UsageError("--as is for one file only")
    if STDIO in files and name is None:
        raise click.UsageError("standard input has no name: give it one with --as")
    targets = {path: path.name if name is None else name for path in files}
    if foreign := [target for target in targets.values() if not is_text(target)]:
        raise click.UsageError(f"the name of '{escaped(foreign[0])}' is not UTF-8: give it another name with --as")
    if twice := [target for target, count in Counter(targets.values()).items() if count > 1]:
        raise click.UsageError(
            f"several files would be called {', '.join(map(escaped, twice))} in the bucket; upload them one by one, with --as"
        )
    suffixes = WorkSettings().suffixes
    for target in targets.values():
        _check_name(target, suffixes)
    # Before the upload, because the settings may be wrong.
    settings = _observer_settings() if wait else None
    versions: list[FileVersion] = []
    for path, target in targets.items():
        with _report_not_uploaded(list(targets)[len(versions) + 1 :]), bucket_errors(f"uploading {path}"):
            gcs_bucket = _bucket()
            with _content(path) as source, _bar(source, target) as counted:
                version = bucket.upload(gcs_bucket, target, counted)
        click.echo(escaped(f"{path} -> gs://{gcs_bucket.name}/{INCOMING}{target} (generation {version.generation})"))
        versions.append(version)
    if settings:
        sys.exit(_wait(settings, tuple(versions), timeout))
    click.echo("`qa-platform status --watch` follows it", err=True)


def _check_name(name: str, suffixes: tuple[str, ...]) -> None:
    """Check that the bucket accepts a name, and that the platform would answer a file with it.

    Raises:
        InputError: it does not.
    """
    from qa_platform.clients import bucket

    most = bucket.OBJECT_NAME_BYTES - len(INCOMING)
    if "\n" in name or "\r" in name:
        raise InputError("a name must not contain a line break", where=name, advice=_RENAME)
    if len(name.encode()) > most:
        raise InputError(f"a name must not be longer than {most} bytes", where=name, advice=_RENAME)
    match bucket.why_ignored(INCOMING + name, suffixes):
        case bucket.Ignored.SUFFIX:
            raise InputError(f"the platform only answers files whose names end in {', '.join(suffixes)}", where=name, advice=_RENAME)
        case bucket.Ignored.TEMPORARY:
            begin, end = " or ".join(bucket.TEMPORARY_PREFIXES), ", ".join(bucket.TEMPORARY_SUFFIXES)
            what = f"files whose names begin with {begin} are taken for temporary files, as are those that end in {end}"
            raise InputError(what, where=name, advice=_RENAME)
        case bucket.Ignored.FOLDER:
            raise InputError("a name must not end with a slash", where=name, advice=_RENAME)
        case bucket.Ignored.NUL:
            raise InputError("a name must not contain a NUL character", where=name, advice=_RENAME)


@contextmanager
def _report_not_uploaded(left: Sequence[Path]) -> Iterator[None]:
    """If the block fails, print the remaining files, which are not uploaded."""
    try:
        yield
    except (QaPlatformError, OSError):
        if left:
            click.echo(f"not uploaded: {', '.join(escaped(str(path)) for path in left)}", err=True)
        raise


def _observer_settings() -> "ObserverSettings":
    from qa_platform.cli.status.observe import ObserverSettings

    return ObserverSettings.from_environment()


def _wait(settings: "ObserverSettings", versions: tuple[FileVersion, ...], timeout: float | None) -> int:
    """Follow uploads until none is in progress. Returns the exit status."""
    from qa_platform.cli.status.follow import follow
    from qa_platform.cli.status.observe import Observer
    from qa_platform.cli.status.render import outcome
    from qa_platform.cli.status.watch import Watch

    try:
        watch = Watch(Observer(settings, versions=versions))
        follow(watch, seconds=math.inf if timeout is None else timeout)
    except KeyboardInterrupt:
        click.echo("the uploads stay, and will be answered; `qa-platform status --watch` follows them", err=True)
        raise
    files = watch.snapshot.files
    click.echo(outcome(files))
    unfinished = [file for file in files if file.state not in (FileStatus.FINISHED, FileStatus.UNCHANGED)]
    for file in unfinished:
        reason = "; ".join(filter(None, (file.note, "the time is up; it will still be answered" if file.in_progress else "")))
        click.echo(f"{file.version.shown}: {file.state}: {reason}", err=True)
    return 1 if unfinished else 0


@contextmanager
def _content(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file. A pipe is copied to a temporary file first: it can be read only once, and Google's client may resend."""
    with nullcontext(sys.stdin.buffer) if path == STDIO else path.open("rb") as source:
        if path != STDIO and path.is_file():
            yield source
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(source, copy)
            copy.seek(0)
            yield copy


@contextmanager
def _bar(source: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """A file that shows a progress bar on standard error as it is read, if that is a terminal."""
    if not sys.stderr.isatty():
        yield source
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from qa_platform.cli.terminal import console, cut

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # The bar must not redirect standard output, which may be a file.
    with Progress(*columns, console=console(stderr=True), transient=True, redirect_stdout=False) as bar:
        yield bar.wrap_file(source, total=os.fstat(source.fileno()).st_size, description=cut(escaped(name), 24))


@click.command()
@click.argument("file", type=FILE_NAME)
@click.option("--rejected", is_flag=True, help="Write a CSV of the rejected rows instead: line, row, column, reason, what to do.")
@click.option("-o", "--output", type=OUTPUT, help="Where to write, instead of standard output; in gzip if the name ends in .gz.")
def answers(file: str, rejected: bool, output: Path | None) -> None:
    """Write the answered CSV of FILE.

    It has the rows in their original order, with answer, score, offsets, model and error.
    """
    from qa_platform.ingest.packing import is_parquet, new_file, packed

    if output and is_parquet(output):
        raise InputError("this is CSV", where=str(output), advice="name it .csv; in Python, frames.read_answers gives a frame")
    if output is None:
        from qa_platform.cli.terminal import rows_out

        _write_answers(file, rows_out(), rejected=rejected)
        sys.stdout.buffer.flush()
        return
    if output.exists() and not output.is_file():
        # A device or a pipe is written directly, not replaced by a file.
        with output.open("wb") as file_or_pipe, packed(file_or_pipe, output.name) as target:
            _write_answers(file, target, rejected=rejected)
        return
    with new_file(output) as target:
        _write_answers(file, target, rejected=rejected)


def _write_answers(file: str, target: IO[bytes], *, rejected: bool) -> None:
    from qa_platform.clients.postgres import connect
    from qa_platform.ledger import Ledger
    from qa_platform.settings import PachydermSettings, PostgresSettings

    if rejected:
        from qa_platform.results.rejected_csv import rejected_report

        with Ledger(PostgresSettings()) as ledger, connect(PostgresSettings()) as connection:
            target.writelines(rejected_report(ledger, connection, file))
        return
    from qa_platform.results.answered_csv import answered_csv
    from qa_platform.results.answered_record import answered_record

    with Ledger(PostgresSettings()) as ledger:
        # The last answers still exist while the file is being answered again.
        record = answered_record(ledger, file)
    target.writelines(answered_csv(PachydermSettings(), PostgresSettings(), record, tell=lambda what: click.echo(what, err=True)))


@click.command()
@click.argument("files", nargs=-1, required=True, type=FILE_NAME)
def retry(files: tuple[str, ...]) -> None:
    """Answer files again, all of them or none.

    Use it for files that failed or were rejected, or to answer files with another model. The newest generation of each is answered.
    A file whose source is gone is refused, with the reason. `qa-platform restore` is for files whose records were lost.
    """
    from qa_platform.batches.retry import request_retries
    from qa_platform.ledger import Ledger
    from qa_platform.settings import PostgresSettings

    with Ledger(PostgresSettings()) as ledger:
        records = request_retries(_bucket(), ledger, list(dict.fromkeys(files)))
    for record in records:
        click.echo(f"{record.version.shown}: generation {record.version.generation} will be answered again")
    click.echo("`qa-platform status --watch` follows it", err=True)


COMMANDS: tuple[click.Command, ...] = (upload, answers, retry)
