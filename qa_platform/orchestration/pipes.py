"""The Pipes client for Pachyderm, through which Dagster sees a batch's jobs.

All use of private parts of Dagster's Pipes, in particular reattachment, is in this file.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from urllib.parse import quote

import dagster as dg
from dagster._core.pipes.context import PipesMessageHandler, PipesSession, build_external_execution_context_data
from dagster._core.pipes.reattach import (
    EXTERNAL_RUN_URL_METADATA_KEY,
    PipesLaunchHandle,
    find_latest_launch_handle,
    record_external_launch,
    record_external_reattach,
)
from dagster_pipes import (
    PIPES_PROTOCOL_VERSION,
    PIPES_PROTOCOL_VERSION_FIELD,
    Method,
    PipesExtras,
    PipesMessage,
    PipesParams,
)

from qa_platform.batches.jobs import Watcher, follow_jobs
from qa_platform.batches.progress import Progress
from qa_platform.clients.pachyderm import session
from qa_platform.contract import ANSWER_PIPELINE
from qa_platform.settings import PachydermSettings

_CLIENT_NAME = "qa_platform.pachyderm"
_PROJECT = "default"


class PachydermPipesClient(dg.PipesClient):
    """Follows the Pachyderm jobs of a batch's commit, and reports their progress to the Dagster run.

    It is a thin adapter. The workers know nothing of Dagster: they get no Pipes context, and this client sends the messages for them.
    The jobs' log lines become the run's, and their progress (`batches.progress.Progress` as a dict) becomes custom messages.
    `batches.run` launches, adopts and stops jobs; it finds them by the batch id of a Pachyderm commit, and works without Dagster too.
    The launch handle recorded here only shows people what was launched and adopted.
    """

    def __init__(self, settings: PachydermSettings) -> None:
        self._settings = settings

    def run(  # type: ignore[override]  # the contract lets clients add arguments
        self,
        *,
        context: dg.OpExecutionContext | dg.AssetExecutionContext,
        extras: PipesExtras | None = None,
        commit_id: str,
        adopted: bool = False,
        waiting: Callable[[str], object] = lambda reason: None,
    ) -> dg.PipesClientCompletedInvocation:
        """Follow the jobs of a commit in ``questions`` until the last one has succeeded.

        Args:
            extras: recorded with the launch, for people.
            commit_id: the id of the commit and of its jobs.
            adopted: an earlier run launched the jobs.
            waiting: called with what the jobs wait for, and with "" when they continue.

        Raises:
            JobFailed: a job failed, was killed, could not start, or lost a part of its output.
            TransientError: pachd was unavailable for longer than the retries last.
        """
        if isinstance(context, dg.AssetExecutionContext):
            # Pipes uses attributes that are deprecated on the asset's context.
            context = context.op_execution_context
        url = job_url(self._settings, commit_id)
        _record(context, commit_id, url=url, adopted=adopted, extras=extras)
        context.log.info(
            "Pachyderm job %s%s. Without a browser: qa-platform pachyderm logs %s", commit_id, f": {url}" if url else "", commit_id
        )
        reader = _JobMessages()
        handler = PipesMessageHandler(context, reader)
        with handler.handle_messages() as reader_params:
            # Not `open_pipes_session`, which requires that the step yields a result per asset. This step reports every file separately,
            # and yields no result for a rejected file.
            pipes_session = PipesSession(
                context_data=build_external_execution_context_data(context, extras),
                message_handler=handler,
                context_injector_params={},
                message_reader_params=reader_params,
                context=context,
            )
            follow_jobs(self._settings, commit_id, watcher=Watcher(context.log, reader.report, waiting))
        metadata: dict[str, dg.MetadataValue] = {"Pachyderm job": dg.MetadataValue.text(commit_id)}
        if url:
            metadata[EXTERNAL_RUN_URL_METADATA_KEY] = dg.MetadataValue.url(url)
        return dg.PipesClientCompletedInvocation(pipes_session, metadata=metadata)


def job_url(settings: PachydermSettings, job_id: str) -> str | None:
    """The address of a job in Pachyderm's console; None if the cluster has no public address."""
    with session(settings, "asking for the address of Pachyderm's console") as client:
        cluster = client.admin.inspect_cluster()
    if not cluster.proxy_host:
        return None
    scheme = "https" if cluster.proxy_tls else "http"
    return f"{scheme}://{cluster.proxy_host}/lineage/{_PROJECT}/pipelines/{quote(ANSWER_PIPELINE)}?globalIdFilter={job_id}"


def _record(context: dg.OpExecutionContext, job_id: str, *, url: str | None, adopted: bool, extras: PipesExtras | None) -> None:
    if not adopted:
        record_external_launch(context, client_name=_CLIENT_NAME, external_run_id=job_id, external_run_url=url, extras=extras)
        return
    handle = find_latest_launch_handle(context, client_name=_CLIENT_NAME)
    if handle is None or handle.external_run_id != job_id:
        # Launched by a run that is not an ancestor of this one: it was lost, and the sensor requested this run instead.
        handle = PipesLaunchHandle(
            client_name=_CLIENT_NAME,
            external_run_id=job_id,
            step_key=context.get_step_execution_context().step.key,
            retry_number=context.retry_number,
            launched_at=time.time(),
            external_run_url=url,
        )
    record_external_reattach(context, handle)


class _JobMessages(dg.PipesMessageReader):
    """Sends messages on behalf of a process that sends none itself. They report the progress of its Pachyderm job."""

    def __init__(self) -> None:
        self._handler: PipesMessageHandler | None = None

    @contextmanager
    def read_messages(self, handler: PipesMessageHandler) -> Iterator[PipesParams]:
        self._handler = handler
        self._send("opened", {"extras": {}})
        try:
            yield {}
        finally:
            self._send("closed", {})

    def report(self, progress: Progress) -> None:
        self._send("report_custom_message", {"payload": asdict(progress)})

    def _send(self, method: Method, params: dict) -> None:
        assert self._handler is not None, "messages are read inside a session"
        message: PipesMessage = {PIPES_PROTOCOL_VERSION_FIELD: PIPES_PROTOCOL_VERSION, "method": method, "params": params}  # type: ignore[misc]
        self._handler.handle_message(message)

    def no_messages_debug_text(self) -> str:
        return "Pachyderm reported no progress of its job."
