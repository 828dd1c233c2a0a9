"""Removes old commits from Pachyderm. The answers stay in the tables."""

from dataclasses import dataclass
from datetime import datetime

import grpc
from pachyderm_sdk import Client

from qa_platform.batches import commits
from qa_platform.clients import pachyderm as pachd
from qa_platform.contract import ANSWER_PIPELINE, QUESTIONS_REPO
from qa_platform.ledger import Ledger
from qa_platform.settings import PachydermSettings, PostgresSettings

# Of batches, and of the cron variant's ticks. The set of each commit also has the output of both pipelines for it.
_REPOS = (QUESTIONS_REPO, f"{ANSWER_PIPELINE}_tick")
# Per repo and call. Enough for a cluster with a batch a minute.
_AT_ONCE = 2_000


@dataclass(frozen=True)
class Squashed:
    """The numbers of old commits that were removed and kept. ``denied``: Pachyderm's message, if a permission is missing."""

    removed: int
    kept: int
    denied: str = ""


def squash_old(pachyderm: PachydermSettings, postgres: PostgresSettings, before: datetime) -> Squashed:
    """Remove the commits that started before a time and whose files are all done, thousands at most.

    Raises:
        TransientError: Pachyderm or PostgreSQL is unavailable.
    """
    with pachd.session(pachyderm, "removing old commits") as client:
        old = [commit for repo in _REPOS for commit in commits.old_commits(client, repo, before, limit=_AT_ONCE)]
        with Ledger(postgres) as ledger:
            in_use = ledger.commits_in_use(old)
        return _squash(client, old, in_use)


def _squash(client: Client, old: list[str], in_use: set[str]) -> Squashed:
    removed = 0
    for commit in old:
        try:
            removed += commit not in in_use and commits.squash(client, commit)
        except grpc.RpcError as error:
            if not pachd.is_code(error, grpc.StatusCode.PERMISSION_DENIED):
                raise
            return Squashed(removed, len(old) - removed, error.details() or "")
    return Squashed(removed, len(old) - removed)
