"""PostgreSQL: it accepts the connection, the tables have this program's revision, and the user has its privileges on them."""

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qa_platform.cli.doctor.findings import DISTRIBUTION, IN_THE_STACK, Part, Result, Wrong, ok, wrong
from qa_platform.errors import InputError, QaPlatformError
from qa_platform.settings import PostgresSettings, WorkSettings

if TYPE_CHECKING:
    import psycopg

_TABLES = ("question_answer", "question_answer_reject", "question_file")
_PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE")
# At most this many files are counted.
_COUNTED = 100


def _examine() -> Iterator[Result]:
    from qa_platform.clients.postgres import only_row, transaction

    settings = PostgresSettings()
    with _connected(settings) as connection:
        with transaction(connection) as cursor:
            version = only_row(cursor.execute("SHOW server_version"))[0]
        yield ok(f"{_where(settings)}, version {version}")
        _check_revision_is_readable(connection, settings)
        yield _revision(connection)
        yield _privileges(connection, settings)
    yield _waiting(settings)
    yield _archiving(settings)
    yield _publishing(settings)


def _connected(settings: PostgresSettings) -> "psycopg.Connection":
    from qa_platform.clients.postgres import WrongEncoding, connect

    try:
        return connect(settings)
    except WrongEncoding as error:
        raise Wrong(error.cause, error.advice) from error
    except QaPlatformError as error:
        trial = f"try it: {_psql(settings)}"
        if isinstance(error, InputError):
            fix = f"{error.advice}; {trial}" if error.advice else trial
        else:
            fix = f"start it, or set PG_HOST and PG_PORT; {trial}; {IN_THE_STACK}"
        raise Wrong(error.cause, fix) from error


def _check_revision_is_readable(connection: "psycopg.Connection", settings: PostgresSettings) -> None:
    """Check the permission to read the revision. Without it, nothing else about the tables can be checked."""
    from qa_platform.loading.migrate import VERSION_TABLE

    query = "SELECT to_regclass(%s) IS NULL OR has_table_privilege(to_regclass(%s), 'SELECT')"
    if connection.execute(query, [VERSION_TABLE, VERSION_TABLE]).fetchone() != (True,):
        grant = f"GRANT SELECT ON {VERSION_TABLE} TO {_identifier(settings.user)}"
        raise Wrong(
            f"permission denied: {settings.user} may not read {VERSION_TABLE}", f"as the owner of the tables: psql -c {shlex.quote(grant)}"
        )


def _revision(connection: "psycopg.Connection") -> Result:
    from qa_platform.loading import migrate

    revision = migrate.current(connection)
    if revision == migrate.HEAD:
        return ok(f"at revision {revision}")
    raise Wrong(
        f"the tables are at revision {revision or 'none'}, and this program needs {migrate.HEAD}",
        "qa-platform db upgrade"
        if revision < migrate.HEAD
        else f"this program is older than the tables: pip install --upgrade {DISTRIBUTION}",
    )


def _privileges(connection: "psycopg.Connection", settings: PostgresSettings) -> Result:
    query = """
        SELECT p || ' on ' || t FROM unnest(%s::text[]) AS t, unnest(%s::text[]) AS p WHERE NOT has_table_privilege(t, p) ORDER BY t, p
    """
    missing = [privilege for (privilege,) in connection.execute(query, [list(_TABLES), list(_PRIVILEGES)])]
    user = _identifier(settings.user)
    if missing:
        grant = f"GRANT {', '.join(_PRIVILEGES)} ON {', '.join(_TABLES)} TO {user}"
        return wrong(f"{settings.user} lacks {', '.join(missing)}", f"as the owner of the tables: psql -c {shlex.quote(grant)}")
    if connection.execute("SELECT has_database_privilege(current_database(), 'TEMPORARY')").fetchone() != (True,):
        grant = f"GRANT TEMPORARY ON DATABASE {_identifier(settings.dbname)} TO {user}"
        return wrong(
            f"{settings.user} may not create temporary tables, which reloading a file needs",
            f"as the owner of the database: psql -c {shlex.quote(grant)}",
        )
    return ok(f"{settings.user} may read and write all {len(_TABLES)} tables")


def _waiting(settings: PostgresSettings) -> Result:
    """Whether files wait, uncharged, because of something other than themselves."""
    from qa_platform.ledger import Ledger

    with Ledger(settings) as ledger:
        deferred = ledger.deferred_files(also_due=True)
    if not deferred:
        return ok("no file waits because something outside it failed")
    waiting = "a file waits" if deferred.files == 1 else f"{deferred.files} files wait"
    return wrong(
        f"{waiting} for the next attempt, at {deferred.until:%H:%M:%S %Z}: {deferred.why}",
        "if that is not over, fix it. `qa-platform status` names the files",
    )


def _archiving(settings: PostgresSettings) -> Result:
    """Whether the sources of all finished files could be archived."""
    from qa_platform.ledger import Ledger

    with Ledger(settings) as ledger:
        stuck = ledger.unarchived_files(limit=_COUNTED)
    if not stuck:
        return ok("no answered or rejected file is stuck in incoming/")
    first = stuck[0]
    return wrong(
        f"the source of {first.version.name!r} cannot be archived{_others(len(stuck))}: {first.archive_error}",
        "fix the reported cause; it is then archived. `qa-platform status FILE` shows the full message",
    )


def _publishing(settings: PostgresSettings) -> Result:
    """Whether the answered CSVs of all finished files could be written to the bucket."""
    from qa_platform.ledger import Ledger

    if not WorkSettings().answered_prefix:
        return ok("none are written to the bucket: QA_ANSWERED_PREFIX is empty")
    with Ledger(settings) as ledger:
        unwritten = ledger.unwritten_csvs(limit=_COUNTED)
    if not unwritten:
        return ok("no answered CSV was refused")
    first = unwritten[0]
    return wrong(
        f"the answered CSV of {first.version.name!r} cannot be written to the bucket{_others(len(unwritten))}: {first.csv_error}",
        "fix the reported cause; it is then written. `qa-platform status FILE` shows the full message",
    )


def _others(stuck: int) -> str:
    """The number of other files, in words. At most `_COUNTED` were counted."""
    if stuck == 1:
        return ""
    return f", and {'at least ' if stuck == _COUNTED else ''}{stuck - 1} more"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _where(settings: PostgresSettings) -> str:
    return f"{settings.user}@{settings.host}:{settings.port}/{settings.dbname}"


def _psql(settings: PostgresSettings) -> str:
    return shlex.join(("psql", "-h", settings.host, "-p", str(settings.port), "-U", settings.user, "-d", settings.dbname))


PART = Part(
    ("PostgreSQL", "tables", "table privileges", "waiting files", "archiving", "answered CSVs"),
    _examine,
    lambda: _where(PostgresSettings()),
)
