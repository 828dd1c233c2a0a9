"""The parts of one pachd put together."""

from pathlib import Path

from qa_platform.embedded.pachd import pfs, pps, secrets
from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.execution.cron import CronClock
from qa_platform.embedded.pachd.execution.jobs import Executor
from qa_platform.embedded.pachd.pfs import Pfs
from qa_platform.embedded.pachd.pps import Pps
from qa_platform.embedded.pachd.protocol.cluster_api import ClusterApi
from qa_platform.embedded.pachd.protocol.pfs_api import PfsApi
from qa_platform.embedded.pachd.protocol.pps_api import PpsApi
from qa_platform.embedded.pachd.protocol.rpc import Handlers, start_server
from qa_platform.embedded.pachd.protocol.worker_api import WorkerEndpoint
from qa_platform.embedded.pachd.secrets import Secrets
from qa_platform.embedded.pachd.storage.garbage import Collector
from qa_platform.embedded.pachd.storage.store import Store
from qa_platform.embedded.process import try_lock

_SCHEMA = pfs.SCHEMA + pps.SCHEMA + secrets.SCHEMA + "CREATE TABLE IF NOT EXISTS cluster (id TEXT NOT NULL);"


class PachdServer:
    """Serves from the moment it is made; jobs that an earlier server left unfinished go on.

    Raises:
        PachError: another server works on that folder.
    """

    def __init__(self, state: Path) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self._lock = (state / "lock").open("ab")
        if not try_lock(self._lock):
            raise PachError(f"another server works on {state}: end it, or name another folder")
        self._store = Store(state, _SCHEMA)
        files = Pfs(self._store)
        pipelines = Pps(files, Secrets(self._store.metadata, state))
        self._executor = Executor(pipelines, state / "workers", WorkerEndpoint)
        cluster_id = self._store.metadata.value("SELECT id FROM cluster")
        if cluster_id is None:
            cluster_id = pfs.new_id()
            self._store.metadata.execute("INSERT INTO cluster VALUES (?)", cluster_id)
        methods = {
            **PfsApi(files, pipelines).methods(),
            **PpsApi(pipelines, self._executor.restart_datum).methods(),
            **ClusterApi(files, cluster_id).methods(),
        }
        self._cron = CronClock(pipelines)
        self._collector = Collector(self._store.trees, self._store.filesets, self._store.gate, lambda: files.roots() + pipelines.roots())
        self._executor.start()
        self._collector.start()
        self._cron.start()
        self._server, port = start_server(Handlers(methods, on_cancel=self._store.metadata.wake), "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"

    def stop(self) -> None:
        """Ends calls, kills what the workers run, and closes the state."""
        stopped = self._server.stop(0.2)
        self._cron.stop()
        self._executor.stop()
        self._collector.stop()
        stopped.wait(2)
        self._store.close()
        self._lock.close()
