"""Finds and removes what Dagster's storage holds of a file: its partition, and the events whose metadata quotes its rows.

Dagster can remove the partition, but cannot remove a partition's events from PostgreSQL. So this module writes to Dagster's tables,
through Dagster's own definitions of them.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dagster as dg
import sqlalchemy as db
from dagster._core.errors import DagsterHomeNotSetError
from dagster._core.events import DagsterEventType
from dagster._core.instance.utils import RUNLESS_RUN_ID
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetEventTagsTable,
    AssetKeyTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._serdes import serialize_value
from dagster_postgres.utils import DagsterPostgresException

from qa_platform.batches.forget import Trace
from qa_platform.contract import partition_key
from qa_platform.errors import InputError, TransientError
from qa_platform.orchestration.catalog import ANSWERED_QUESTIONS, MODEL_QUALITY, QUESTION_ANSWER, RAW_QUESTIONS
from qa_platform.orchestration.partitions import PARTITIONS
from qa_platform.results.gold import is_gold

_EVENTS, _CHECKS, _ASSETS, _TAGS = SqlEventLogStorageTable.c, AssetCheckExecutionsTable.c, AssetKeyTable.c, AssetEventTagsTable.c
_OF_EVENTS = (_EVENTS.id, _EVENTS.run_id, _EVENTS.event)
_OF_CHECKS = (_CHECKS.id, _CHECKS.run_id, _CHECKS.evaluation_event, _CHECKS.evaluation_event_storage_id)
_OF_FILES = tuple(key.to_string() for key in (RAW_QUESTIONS, ANSWERED_QUESTIONS, QUESTION_ANSWER))
_OF_GOLD_SETS = (MODEL_QUALITY.to_string(),)
_UNAVAILABLE = (db.exc.OperationalError, DagsterPostgresException)


@contextmanager
def dagster_history(gold_prefix: str) -> Iterator["DagsterHistory"]:
    """The history in the instance of ``DAGSTER_HOME``.

    Raises, also within the block:
        InputError: there is no such instance, or events cannot be removed from its storage.
        TransientError: its storage is unavailable.
    """
    try:
        with _instance() as instance:
            yield DagsterHistory(instance, gold_prefix)
    except _UNAVAILABLE as error:
        raise TransientError("Dagster's storage is unavailable", advice="see `qa-platform doctor`; then repeat the command") from error


def _instance() -> dg.DagsterInstance:
    try:
        return dg.DagsterInstance.get()
    except DagsterHomeNotSetError as error:
        raise InputError("Dagster's history cannot be reached", advice="set DAGSTER_HOME to Dagster's home folder") from error
    except _UNAVAILABLE:
        raise
    except Exception as error:
        # Without the error's text, which may quote the values.
        raise InputError(
            f"Dagster's history cannot be reached ({type(error).__name__})", advice="run `qa-platform doctor`, which says what is wrong"
        ) from error


@dataclass(frozen=True)
class DagsterHistory:
    """The history of files in an instance of Dagster.

    Args:
        gold_prefix: the prefix of gold sets' names. Each measurement of the model quotes all gold sets in the same events.
    """

    instance: dg.DagsterInstance
    gold_prefix: str

    def find(self, name: str, generation: int | None) -> Sequence[Trace]:
        """The events and the partition of a file. Of one generation, only the events."""
        with self._storage.index_transaction() as connection:
            found = self._events(connection, name, generation)
        traces = [Trace("Dagster", "events", len(found.events))] if found.events else []
        if found.checks:
            traces.append(Trace("Dagster", "results of checks", len(found.checks)))
        if found.newest:
            traces.append(Trace("Dagster", "copies of the newest events", len(found.newest)))
        if generation is None and self.instance.has_dynamic_partition(PARTITIONS, partition_key(name)):
            traces.append(Trace("Dagster", "partition"))
        return traces

    def remove(self, name: str, generation: int | None) -> None:
        """Remove the events of a file, or of one generation; then, for all generations, its partition."""
        with self._storage.index_transaction() as connection:
            found = self._events(connection, name, generation)
            for asset, copy in found.newest.items():
                renewed = _newest_without(connection, asset, found.events)
                same = db.and_(_ASSETS.asset_key == asset, _ASSETS.last_materialization == copy)
                connection.execute(AssetKeyTable.update().values(last_materialization=renewed).where(same))
            connection.execute(AssetEventTagsTable.delete().where(_TAGS.event_id.in_(found.events)))
            connection.execute(SqlEventLogStorageTable.delete().where(_EVENTS.id.in_(found.events)))
            connection.execute(AssetCheckExecutionsTable.delete().where(_CHECKS.id.in_(found.checks)))
        if generation is None:
            self.instance.delete_dynamic_partition(PARTITIONS, partition_key(name))
        # The cached status names partitions.
        self.instance.wipe_asset_cached_status([RAW_QUESTIONS, ANSWERED_QUESTIONS, QUESTION_ANSWER])

    @property
    def _storage(self) -> SqlEventLogStorage:
        storage = self.instance.event_log_storage
        # SQLite keeps a second copy of every event, in a file for each run.
        if not isinstance(storage, SqlEventLogStorage) or isinstance(storage, SqliteEventLogStorage):
            raise InputError(f"Dagster's storage is {type(storage).__name__}, from which events cannot be removed", advice="use PostgreSQL")
        return storage

    def _events(self, connection: db.Connection, name: str, generation: int | None) -> "_Found":
        key = partition_key(name)
        events = _select(connection, _OF_EVENTS, _EVENTS.asset_key.in_(_OF_FILES), _EVENTS.partition == key)
        checks = _select(connection, _OF_CHECKS, _CHECKS.asset_key.in_(_OF_FILES), _CHECKS.partition == key)
        newest = {asset: copy for asset, copy in self._newest(connection, _OF_FILES) if _partition_of(copy) == key}
        if generation is not None:
            runs = {run for _, run, event in events if str(generation) in event} - {RUNLESS_RUN_ID}
            events = [row for row in events if row[1] in runs or str(generation) in row[2]]
            checks = [row for row in checks if row[1] in runs or str(generation) in (row[2] or "")]
            newest = {asset: copy for asset, copy in newest.items() if str(generation) in copy}
        checks += self._of_runs_with_this_file_only(connection, {row[1] for row in checks})
        if is_gold(name, self.gold_prefix):
            events += _select(connection, _OF_EVENTS, _EVENTS.asset_key.in_(_OF_GOLD_SETS))
            checks += _select(connection, _OF_CHECKS, _CHECKS.asset_key.in_(_OF_GOLD_SETS))
            newest |= dict(self._newest(connection, _OF_GOLD_SETS))
        # Events of checks have neither asset nor partition in the event log.
        ids = {row[0] for row in events} | {row[3] for row in checks if row[3] is not None}
        return _Found(sorted(ids), [row[0] for row in checks], newest)

    def _of_runs_with_this_file_only(self, connection: db.Connection, runs: Collection[str]) -> list[Any]:
        """The results without a partition from runs whose results are all of one file: they repeat this file's evidence."""
        of_runs = db.and_(_CHECKS.asset_key.in_(_OF_FILES), _CHECKS.run_id.in_(runs))
        with_partition = set(_select(connection, [_CHECKS.run_id, _CHECKS.partition], of_runs, _CHECKS.partition.is_not(None)))
        files = Counter(run for run, _ in with_partition)
        alone = [run for run in runs if files[run] == 1]
        return _select(connection, _OF_CHECKS, of_runs, _CHECKS.run_id.in_(alone), _CHECKS.partition.is_(None))

    def _newest(self, connection: db.Connection, assets: Sequence[str]) -> list[tuple[str, str]]:
        columns = [_ASSETS.asset_key, _ASSETS.last_materialization]
        return [(asset, copy) for asset, copy in _select(connection, columns, _ASSETS.asset_key.in_(assets)) if copy]


@dataclass(frozen=True)
class _Found:
    """Ids in the event log and in the table of checks, and, by asset, the copies of the newest event that belong to the file."""

    events: Sequence[int]
    checks: Sequence[int]
    newest: Mapping[str, str]


def _select(connection: db.Connection, columns: Sequence[Any], *where: Any) -> list[Any]:
    return list(connection.execute(db.select(*columns).where(*where)))


def _partition_of(copy: str) -> str | None:
    event = dg.deserialize_value(copy, dg.EventLogRecord).event_log_entry.dagster_event
    return event.partition if event else None


def _newest_without(connection: db.Connection, asset: str, ids: Sequence[int]) -> str | None:
    """The newest materialisation of an asset apart from these events, in the form of Dagster's copy; None if there is none."""
    wanted = (_EVENTS.asset_key == asset, _EVENTS.dagster_event_type == DagsterEventType.ASSET_MATERIALIZATION.value)
    query = db.select(_EVENTS.id, _EVENTS.event).where(*wanted, _EVENTS.id.not_in(ids)).order_by(_EVENTS.id.desc()).limit(1)
    row = connection.execute(query).first()
    if row is None:
        return None
    entry = dg.deserialize_value(row[1], dg.EventLogEntry)
    return serialize_value(dg.EventLogRecord(storage_id=row[0], event_log_entry=entry))
