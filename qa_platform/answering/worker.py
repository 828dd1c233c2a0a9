"""The pipeline's entry point, ``python -m qa_platform.answering.worker``: one process, one model, many datums.

It speaks Pachyderm's datum batching: each NextDatum completes the datum before it and brings the next one's environment; a
non-empty error fails it, and Pachyderm tries it again. Only broken infrastructure is such an error; what is wrong with a row
is in that row's answer. The process ends by being killed while it waits.
"""

import logging
import shutil
import sys
from pathlib import Path, PurePosixPath

import grpc
from pachyderm_sdk.api.worker import WorkerStub

from qa_platform.answering.engine import Answerer
from qa_platform.answering.shard import answer_shard
from qa_platform.contract import BLAMELESS, MANIFEST, QUESTIONS_REPO, SHARD_INFO, ModelChoice, ShardInfo
from qa_platform.errors import InputError, TransientError
from qa_platform.settings import WorkerSettings

_log = logging.getLogger(__name__)

# Where Pachyderm puts a datum's files; a server without containers puts them below QA_PFS_ROOT.
_PFS = PurePosixPath("/pfs")


class Worker:
    """Answers datums below ``root``: a shard's folder, or a manifest, which is copied through. Keeps one model loaded."""

    def __init__(self, root: Path, *, threads: int = 0) -> None:
        self._root = root
        self._threads = threads
        self._wanted: ModelChoice | None = None
        self._answerer: Answerer | None = None

    def do(self, datum: str) -> None:
        """Work on one datum. ``datum`` is the path of the matched item, as Pachyderm's environment gives it.

        Raises:
            InputError, TransientError, OSError: the datum cannot be worked on.
        """
        source = self._source(datum)
        target = self._root / "out" / source.relative_to(self._root / QUESTIONS_REPO)
        if source.name == MANIFEST:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            _log.info("%s: passed through", datum)
            return
        wanted = ShardInfo.from_json((source / SHARD_INFO).read_bytes()).model
        done = answer_shard(self._answerer_for(wanted), source, target)
        rate = done.rows / max(done.seconds, 1e-3)
        _log.info(
            "%s: %d rows in %.1f s (%.1f rows/s): %d answered, %d without answer, %d rejected",
            *(datum, done.rows, done.seconds, rate, done.answered, done.no_answer, done.rejected),
        )

    def _source(self, datum: str) -> Path:
        path = Path(datum)
        if not path.is_relative_to(self._root) and path.is_relative_to(_PFS):
            path = self._root / path.relative_to(_PFS)
        if not path.is_relative_to(self._root / QUESTIONS_REPO):
            raise InputError(f"datum {datum} does not lie in {self._root / QUESTIONS_REPO}")
        return path

    def _answerer_for(self, wanted: ModelChoice) -> Answerer:
        if self._answerer is None or wanted != self._wanted:
            self._answerer = None
            try:
                answerer = Answerer(wanted, threads=self._threads)
                answerer.warm_up()
            except Exception as error:
                raise TransientError(f"the model {wanted.id!r} cannot be loaded; check QA_MODEL and QA_MODEL_REVISION: {error}") from error
            self._wanted, self._answerer = wanted, answerer
            found = answerer.identity
            _log.info("model %s, revision %s, %s, by %s", found.id, found.revision, found.precision, answerer.runtime)
        return self._answerer


def serve(worker: Worker, port: int) -> None:
    """Work on datum after datum until the process is killed, or Pachyderm's worker goes away."""
    with grpc.insecure_channel(f"localhost:{port}") as channel:
        stub = WorkerStub(channel)
        error = ""
        while True:
            environment = dict(entry.split("=", 1) for entry in stub.next_datum(error=error).env)
            error = _attempt(worker, environment)


def _attempt(worker: Worker, environment: dict[str, str]) -> str:
    """The error that NextDatum reports, empty for success."""
    try:
        worker.do(environment[QUESTIONS_REPO])
    except Exception as error:
        _log.exception("datum failed")
        if isinstance(error, (TransientError, OSError)):
            _log.error("%s%s", BLAMELESS, " ".join(str(error).split()))
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    """Read the settings and serve. Logs go to standard output, which Pachyderm keeps."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = WorkerSettings()
    serve(Worker(settings.pfs_root, threads=settings.threads), settings.grpc_port)


if __name__ == "__main__":
    main()
