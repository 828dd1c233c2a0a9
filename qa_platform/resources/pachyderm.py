"""The Pipes client for Pachyderm: what Dagster sees of a batch's jobs.

Everything that knows what is private of Dagster's Pipes, its reattachment above all, is in this file.
"""

import time
from collections.abc import Iterator
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

from qa_platform.contract import ANSWER_PIPELINE
from qa_platform.following import Progress, follow_jobs
from qa_platform.pachd import session
from qa_platform.settings import PachydermSettings

_CLIENT_NAME = "qa_platform.pachyderm"
_PROJECT = "default"


class PachydermPipesClient(dg.PipesClient):
    """Follows the Pachyderm jobs of a batch's commit, and tells the Dagster run of them while they work.

    It is a thin adapter. The workers know nothing of Dagster, so no Pipes context is sent to them and this client speaks for
    them: the jobs' log lines are the run's, their progress comes as custom messages (`following.Progress` as a dict) and as log
    lines. Launching, adopting and stopping are `batch.answer_batch`'s, which goes by the batch id among Pachyderm's commits and
    works without Dagster as well; the launch handle that is recorded here shows people what was launched and adopted.
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
    ) -> dg.PipesClientCompletedInvocation:
        """Follow the jobs of a commit in ``questions`` until the last one has succeeded.

        Args:
            extras: shown with the recorded launch.
            commit_id: the commit, whose id is that of its jobs.
            adopted: an earlier run launched them.

        Raises:
            JobFailed: a job failed, with the log lines of its failed datums, or was killed.
            TransientError: pachd was away for longer than the retries last.
        """
        if isinstance(context, dg.AssetExecutionContext):
            # Pipes asks a context for what the one of assets has deprecated.
            context = context.op_execution_context
        url = job_url(self._settings, commit_id)
        _record(context, commit_id, url=url, adopted=adopted, extras=extras)
        context.log.info(
            "Pachyderm job %s%s. Without a browser: qa-platform pachyderm logs %s", commit_id, f": {url}" if url else "", commit_id
        )
        reader = _SpokenMessages()
        handler = PipesMessageHandler(context, reader)
        with handler.handle_messages() as reader_params:
            # Not `open_pipes_session`: that one demands that the step yields a result per asset. This step's caller reports every
            # file by itself, and none for a file that was rejected.
            pipes_session = PipesSession(
                context_data=build_external_execution_context_data(context, extras),
                message_handler=handler,
                context_injector_params={},
                message_reader_params=reader_params,
                context=context,
            )
            follow_jobs(self._settings, commit_id, log=context.log, observe=reader.report)
        metadata: dict[str, dg.MetadataValue] = {"Pachyderm job": dg.MetadataValue.text(commit_id)}
        if url:
            metadata[EXTERNAL_RUN_URL_METADATA_KEY] = dg.MetadataValue.url(url)
        return dg.PipesClientCompletedInvocation(pipes_session, metadata=metadata)


def job_url(settings: PachydermSettings, job_id: str) -> str | None:
    """Where Pachyderm's console shows a job; None where the cluster has no public address."""
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
        # Launched by a run that is no ancestor of this one: the sensor's next one, where the first was lost.
        handle = PipesLaunchHandle(
            client_name=_CLIENT_NAME,
            external_run_id=job_id,
            step_key=context.get_step_execution_context().step.key,
            retry_number=context.retry_number,
            launched_at=time.time(),
            external_run_url=url,
        )
    record_external_reattach(context, handle)


class _SpokenMessages(dg.PipesMessageReader):
    """The messages of a process that sends none itself: they are what Pachyderm says of its job."""

    def __init__(self) -> None:
        self._handler: PipesMessageHandler | None = None

    @contextmanager
    def read_messages(self, handler: PipesMessageHandler) -> Iterator[PipesParams]:
        self._handler = handler
        self._say("opened", {"extras": {}})
        try:
            yield {}
        finally:
            self._say("closed", {})

    def report(self, progress: Progress) -> None:
        self._say("report_custom_message", {"payload": asdict(progress)})

    def _say(self, method: Method, params: dict) -> None:
        assert self._handler is not None, "messages are read inside a session"
        message: PipesMessage = {PIPES_PROTOCOL_VERSION_FIELD: PIPES_PROTOCOL_VERSION, "method": method, "params": params}  # type: ignore[misc]
        self._handler.handle_message(message)

    def no_messages_debug_text(self) -> str:
        return "Pachyderm said nothing of its job."
