"""Assembles the parts of one pachd."""

from pathlib import Path

from qa_platform.embedded.pachd import pfs, pps, secrets
from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.execution.cron import CronClock
from qa_platform.embedded.pachd.execution.jobs import Executor
from qa_platform.embedded.pachd.pfs import Pfs
from qa_platform.embedded.pachd.pps import Pps
from qa_platform.embedded.pachd.protocol import authentication
from qa_platform.embedded.pachd.protocol.authentication import OWNER, Authentication, read_tokens
from qa_platform.embedded.pachd.protocol.cluster_api import ClusterApi
from qa_platform.embedded.pachd.protocol.pfs_api import PfsApi
from qa_platform.embedded.pachd.protocol.pps_api import PpsApi
from qa_platform.embedded.pachd.protocol.rpc import Handlers, start_server
from qa_platform.embedded.pachd.protocol.worker_api import WorkerEndpoint
from qa_platform.embedded.pachd.secrets import Secrets
from qa_platform.embedded.pachd.storage.garbage import EXPIRY_SECONDS, Collector
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.supervise import try_lock
from qa_platform.settings import EmbeddedPachdSettings

_SCHEMA = "".join(part.SCHEMA for part in (pfs, pps, secrets, authentication)) + "CREATE TABLE IF NOT EXISTS cluster (id TEXT NOT NULL);"


class PachdServer:
    """A pachd, which serves from its creation. It continues the unfinished jobs of an earlier server.

    Args:
        token: the token of a robot with the roles of the platform's user. If it is empty and the options have no tokens, the server is
            open to everyone.

    Raises:
        PachError: another server uses the folder, or the file of tokens cannot be used.
    """

    def __init__(self, state: Path, options: EmbeddedPachdSettings, *, token: str = "") -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._lock = (state / "lock").open("ab")
        if not try_lock(self._lock):
            raise PachError(f"another server works on {state}: end it, or name another folder")
        self._store = Store(state, _SCHEMA)
        files = Pfs(self._store, finish_seconds=options.finish_seconds)
        pipelines = Pps(files, Secrets(self._store.metadata, state))
        self._store.logs.delay = options.log_seconds
        self._executor = Executor(pipelines, state / "workers", WorkerEndpoint, options)
        cluster_id = self._store.metadata.value("SELECT id FROM cluster")
        if cluster_id is None:
            cluster_id = pfs.new_id()
            self._store.metadata.execute("INSERT INTO cluster VALUES (?)", cluster_id)
        methods = {
            **PfsApi(files, pipelines, options).methods(),
            **PpsApi(pipelines, self._executor, loki=options.loki).methods(),
            **ClusterApi(files, cluster_id).methods(),
        }
        if token or options.tokens is not None:
            robots = ({token: OWNER} if token else {}) | (read_tokens(options.tokens) if options.tokens else {})
            methods = Authentication(robots, self._store.metadata).protect(methods)
        self._cron = CronClock(pipelines)
        self._collector = Collector(
            self._store.trees,
            self._store.filesets,
            self._store.gate,
            lambda: files.roots() + pipelines.roots(),
            expiry=min(EXPIRY_SECONDS, options.file_set_seconds / 10),
        )
        self._executor.start()
        self._collector.start()
        self._cron.start()
        self._server, port = start_server(Handlers(methods, on_cancel=self._store.metadata.wake))
        self.address = f"127.0.0.1:{port}"

    def stop(self) -> None:
        """End all calls, kill the workers' processes, and close the state."""
        stopped = self._server.stop(0.2)
        self._cron.stop()
        self._executor.stop()
        self._collector.stop()
        stopped.wait(2)
        self._store.close()
        self._lock.close()
