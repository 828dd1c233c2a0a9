"""The pipeline's entry point, ``python -m qa_platform.answering.worker``: one process, one model, many datums.

A datum is a shard. It fails only if something that the worker needs is broken; a bad row gets its reason in its answer.
"""

import logging
import shutil
import sys
from pathlib import Path

from qa_platform.answering.engine import Answerer
from qa_platform.answering.shard import answer_shard
from qa_platform.contract import MANIFEST, QUESTIONS_REPO, SHARD_INFO, ModelChoice, ShardInfo
from qa_platform.datum_batching import path_of, serve
from qa_platform.errors import TransientError
from qa_platform.settings import WorkerSettings

_log = logging.getLogger(__name__)


class Worker:
    """Answers shards below ``root``, and copies the manifest that a file's first shard carries. Keeps one model loaded."""

    def __init__(self, root: Path, *, threads: int = 0, device: str = "cpu") -> None:
        self._root = root
        self._threads = threads
        self._device = device
        self._wanted: ModelChoice | None = None
        self._answerer: Answerer | None = None

    def do(self, datum: str) -> None:
        """Answer one shard. ``datum`` is the path of its folder, as Pachyderm's environment gives it.

        Raises:
            InputError: the datum lies elsewhere, or does not match its ``shard.json``.
            TransientError: the model cannot be loaded, or not on this device.
            OSError: a file cannot be read or written.
        """
        questions = self._root / QUESTIONS_REPO
        source = path_of(datum, self._root, within=questions)
        target = self._root / "out" / source.relative_to(questions)
        wanted = ShardInfo.from_json((source / SHARD_INFO).read_bytes()).model
        done = answer_shard(self._answerer_for(wanted), source, target)
        if (source / MANIFEST).exists():
            shutil.copyfile(source / MANIFEST, target.parent / MANIFEST)
        rate = done.rows / max(done.seconds, 1e-3)
        _log.info(
            "%s: %d rows in %.1f s (%.1f rows/s): %d answered, %d without answer, %d rejected",
            *(datum, done.rows, done.seconds, rate, done.answered, done.no_answer, done.rejected),
        )

    def _answerer_for(self, wanted: ModelChoice) -> Answerer:
        if self._answerer is None or wanted != self._wanted:
            self._answerer = None
            try:
                answerer = Answerer(wanted, threads=self._threads, device=self._device, processes=0)
                answerer.warm_up()
            except Exception as error:
                raise TransientError(
                    f"it cannot be loaded: {error}",
                    where=f"model {wanted.id!r}",
                    advice=f"check QA_MODEL, QA_MODEL_REVISION and the workers' QA_DEVICE, which is {self._device}",
                ) from error
            self._wanted, self._answerer = wanted, answerer
            model = answerer.identity
            about = (model.id, model.revision, model.precision, answerer.runtime, self._device)
            _log.info("model %s, revision %s, %s, by %s; QA_DEVICE is %s", *about)
        return self._answerer


def main() -> None:
    """Read the settings and serve. Logs go to standard output, which Pachyderm keeps."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = WorkerSettings()
    worker = Worker(settings.pfs_root, threads=settings.threads, device=settings.device)
    serve(lambda environment: worker.do(environment[QUESTIONS_REPO]), settings.grpc_port)


if __name__ == "__main__":
    main()
