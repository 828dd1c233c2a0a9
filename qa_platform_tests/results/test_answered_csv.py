"""The answered CSV of a file: which commit it comes from, and when it comes from the tables instead."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pachyderm_sdk.api import pfs

from qa_platform.clients.postgres import connect
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE, file_id
from qa_platform.ledger import Ledger
from qa_platform.loading.load import load_file
from qa_platform.results.answered_csv import REBUILT, answered_csv
from qa_platform.settings import PachydermSettings, PostgresSettings
from qa_platform_tests.loading_helpers import AnsweredRow, AnsweredUpload
from qa_platform_tests.pachd_helpers import KILLED, SUCCESS, Pachd, eventually, needs_workers

NAME = "a.csv"
# It copies the file, like the loading pipeline. A second generation takes it long enough to be stopped.
LOADING = "cp $source $pfs/out/\nif grep -q second $source; then echo waiting; sleep 60; fi"


@dataclass
class World:
    """A database, and a pachd whose loading pipeline only copies; the tables are filled by `commit`."""

    pachd: Pachd
    ledger: Ledger
    postgres: PostgresSettings
    folder: Path

    def commit(self, generation: int, content: bytes) -> str:
        """Commit an answered file, and load its rows, as its job does before it ends."""
        commit = self.pachd.put(pfs.Repo(name=ANSWER_PIPELINE), {f"/{file_id(NAME)}.csv": content}, delete=["/"])
        rows = [AnsweredRow(f"Question of generation {generation}?", "Turing broke the code.")]
        with connect(self.postgres) as connection:
            load_file(connection, AnsweredUpload(rows, NAME, generation).write(self.folder / str(generation)), commit_id=commit)
        return commit

    def answers(self) -> tuple[bytes, list[str]]:
        """The answered CSV, and what was told."""
        record, told = self.ledger.in_the_table(NAME), list[str]()
        assert record
        settings = PachydermSettings(pachd_address=self.pachd.address)
        return b"".join(answered_csv(settings, self.postgres, record, tell=told.append)), told


@pytest.fixture
def world(clean_pachyderm: PachydermSettings, postgres: PostgresSettings, tmp_path: Path) -> Iterator[World]:
    pachd = Pachd(clean_pachyderm.pachd_address)
    repo = pfs.Repo(name=ANSWER_PIPELINE)
    pachd.client.pfs.create_repo(repo=repo)
    pachd.create(pachd.spec(LOAD_PIPELINE, LOADING, repo))
    with Ledger(postgres) as ledger:
        yield World(pachd, ledger, postgres, tmp_path)
    pachd.clean_up()
    pachd.client.pfs.delete_repo(repo=repo, force=True)


@needs_workers
def test_the_answers_are_not_those_of_an_older_load_where_the_loading_job_was_stopped(world: World) -> None:
    first = world.commit(1, b"first")
    assert world.pachd.wait(LOAD_PIPELINE, first).state == SUCCESS
    assert world.answers() == (b"first", [])

    second = world.commit(2, b"second")
    eventually(lambda: "waiting" in world.pachd.lines(LOAD_PIPELINE, second))
    for _ in ("at work", "stopped"):
        content, told = world.answers()
        assert b"Question of generation 2?" in content
        assert told == [REBUILT]
        world.pachd.client.pps.stop_job(job=world.pachd.job(LOAD_PIPELINE, second))
        assert world.pachd.wait(LOAD_PIPELINE, second).state == KILLED
