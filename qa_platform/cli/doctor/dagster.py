"""Dagster: its home folder, the PostgreSQL of its own storage, and the heartbeat of the sensor that finds uploads.

The storage is found through Dagster's instance. Its tables are only read, never created.
"""

import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qa_platform.cli.doctor.findings import IN_THE_STACK, Part, Result, Wrong, ok, wrong
from qa_platform.contract import HEARTBEAT_ASSET
from qa_platform.settings import DagsterSettings, WorkSettings

if TYPE_CHECKING:
    import psycopg
    from dagster._core.instance.ref import InstanceRef
    from dagster._serdes import ConfigurableClassData
    from sqlalchemy import URL

_EXPORT = "export DAGSTER_PG_URL=postgresql://USER:PASSWORD@HOST/DATABASE"
_CONNECT_SECONDS = 5


def _examine() -> Iterator[Result]:
    settings = DagsterSettings()
    instance = settings.dagster_home / "dagster.yaml"
    yield _home(settings, instance)
    ref = _instance(instance)
    storages = _storages(ref, settings, instance)
    if not storages:
        yield ok(f"{instance} names no PostgreSQL; nothing else was checked")
        yield ok("not checked: Dagster's storage is not a PostgreSQL")
        return
    encodings = []
    for storage in storages:
        with _connected(storage) as connection:
            encodings.append(_encoding(connection, storage))
    yield next((result for result in encodings if result.fix), ok(", ".join(storage.where for storage in storages)))
    yield _heartbeat(ref, storages[0], WorkSettings())


def last_heartbeat() -> float | None:
    """The time of the last heartbeat, in seconds since the epoch. None if there is none yet, or if the storage is not PostgreSQL.

    Raises:
        Wrong: Dagster's home or storage is not configured, or the storage does not answer.
    """
    settings = DagsterSettings()
    instance = settings.dagster_home / "dagster.yaml"
    _home(settings, instance)
    storages = _storages(_instance(instance), settings, instance)
    return _last_heartbeat(storages[0]) if storages else None


@dataclass(frozen=True)
class _Storage:
    """The PostgreSQL of Dagster's storage. ``source``: the setting or file that names it. ``fix``: what to do if it is unavailable."""

    url: "URL"
    source: str
    fix: str

    @property
    def where(self) -> str:
        return f"{self.url.username or ''}@{self.url.host or ''}/{self.url.database or ''}"


def _home(settings: DagsterSettings, instance: Path) -> Result:
    home = settings.dagster_home
    if "dagster_home" not in settings.model_fields_set:
        raise Wrong("DAGSTER_HOME is not set", f"export DAGSTER_HOME=/an/absolute/folder, with a dagster.yaml in it; {IN_THE_STACK}")
    if not instance.is_file():
        raise Wrong(f"there is no {instance}", f"install -D dagster.yaml {shlex.quote(str(instance))}")
    if not os.access(home, os.W_OK):
        raise Wrong(f"{home} cannot be written", f"chown {os.geteuid()} {shlex.quote(str(home))}")
    return ok(str(home))


def _instance(instance: Path) -> "InstanceRef":
    # Imported here: the import takes a second or two.
    from dagster._core.instance.ref import InstanceRef

    try:
        return InstanceRef.from_dir(str(instance.parent))
    except Exception as error:
        # Without its message, which may quote the values.
        raise Wrong(
            f"Dagster does not accept {instance} ({type(error).__name__})", "`dagster instance info` shows the error; fix it"
        ) from None


def _storages(ref: "InstanceRef", settings: DagsterSettings, instance: Path) -> list[_Storage]:
    """The PostgreSQL databases of an instance, without duplicates, the one with the events first. Empty for other kinds of storage.

    A `dagster.yaml` has one storage, or, as written by Dagster's chart, one each for events, runs and schedules.
    """
    parts = (ref.storage_data, ref.event_storage_data, ref.run_storage_data, ref.schedule_storage_data)
    found = [_resolved(part, settings, instance) for part in parts if part and part.module_name.partition(".")[0] == "dagster_postgres"]
    return list(dict.fromkeys(found))


def _resolved(part: "ConfigurableClassData", settings: DagsterSettings, instance: Path) -> _Storage:
    from dagster._config import process_config
    from dagster_postgres.utils import pg_config, pg_url_from_config

    # Only Dagster itself reads the variables that the file names.
    source = "DAGSTER_PG_URL" if "env: DAGSTER_PG_URL" in part.config_yaml else str(instance)
    if source == "DAGSTER_PG_URL" and not settings.dagster_pg_url.get_secret_value():
        raise Wrong(f"DAGSTER_PG_URL is not set, but {instance} uses it", _EXPORT)
    resolved = process_config(pg_config(), part.config_dict)
    if not resolved.success or resolved.value is None:
        # Without Dagster's message, which may quote the values.
        raise Wrong(f"the storage in {instance} cannot be resolved", "set the variables that it names; check with `dagster instance info`")
    fix = "start it, or set DAGSTER_PG_URL to where it is" if source != str(instance) else f"start it, or correct the storage in {instance}"
    return _Storage(_parsed(pg_url_from_config(resolved.value), source), source, fix)


def _parsed(address: str, source: str) -> "URL":
    """An address, read as Dagster reads it."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    # Without the original error and without the parts, in which the password may be.
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        raise Wrong(f"{source} has no valid PostgreSQL address", _EXPORT) from None
    # An unescaped "@", "/" or "?" in the password ends up in one of these parts.
    if set("@/?") & set(f"{url.host or ''}{url.database or ''}"):
        raise Wrong(f"{source} has no valid PostgreSQL address", f"{_EXPORT}, with the password percent-encoded")
    return url


def _connected(storage: _Storage) -> "psycopg.Connection":
    import psycopg

    from qa_platform.clients.postgres import without_password

    # As SQLAlchemy connects: libpq would split an address in another way.
    parts = {**storage.url.translate_connect_args(username="user", database="dbname"), **storage.url.query}
    try:
        return psycopg.connect(**{**parts, "connect_timeout": _CONNECT_SECONDS})
    except psycopg.Error as error:
        said = without_password(" ".join(str(error).split()), str(storage.url.password or ""))
        raise Wrong(f"{storage.where}: {said}", storage.fix) from None


def _encoding(connection: "psycopg.Connection", storage: _Storage) -> Result:
    from qa_platform.clients.postgres import ENCODING

    encoding = connection.info.parameter_status("server_encoding")
    if encoding == ENCODING:
        return ok(storage.where)
    return wrong(
        f"{storage.where}: the database is encoded in {encoding}, and must be in {ENCODING}, since it stores file names",
        f"CREATE DATABASE new ENCODING '{ENCODING}' TEMPLATE template0, copy the tables with pg_dump and psql, and use the new database",
    )


def _heartbeat(ref: "InstanceRef", storage: _Storage, work: WorkSettings) -> Result:
    """Whether the heartbeat of the bucket sensor is recent. If not, uploads are not seen or get no runs."""
    from qa_platform.cli.doctor.sensor import why_silent

    beaten_at = _last_heartbeat(storage)
    if beaten_at is None:
        return ok("none yet: it comes with the first tick of the sensor incoming_files, from Dagster's daemon")
    age = max(0.0, time.time() - beaten_at)
    if age <= work.heartbeat_fails_after:
        return ok(f"{age:.0f} s ago")
    silence = why_silent(ref, since=beaten_at)
    return wrong(f"the last was {age:.0f} s ago; there should be one every {work.heartbeat_seconds} s: {silence.reason}", silence.fix)


def _last_heartbeat(storage: _Storage) -> float | None:
    with _connected(storage) as connection:
        return _last_materialization(connection, HEARTBEAT_ASSET)


def _last_materialization(connection: "psycopg.Connection", asset: str) -> float | None:
    """The time of an asset's last materialisation in Dagster's storage. None if there is none, or no storage yet."""
    from dagster import EventLogRecord
    from dagster._serdes import deserialize_value

    exists = connection.execute("SELECT to_regclass('asset_keys') IS NOT NULL").fetchone()
    if exists != (True,):
        return None
    row = connection.execute("SELECT last_materialization FROM asset_keys WHERE asset_key = %s", [json.dumps([asset])]).fetchone()
    # Not the timestamp column, which is in the time zone of the session that wrote it.
    return deserialize_value(row[0], EventLogRecord).event_log_entry.timestamp if row and row[0] else None


PART = Part(("Dagster home", "Dagster storage", "Dagster heartbeat"), _examine, lambda: "Dagster's storage")
