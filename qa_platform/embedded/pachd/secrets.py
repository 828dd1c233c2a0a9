"""The cluster's secrets. They lie encrypted on disk; the key is a file of its own that only the owner reads."""

import base64
import binascii
import json
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.fernet import Fernet

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.storage.database import Database

SCHEMA = "CREATE TABLE IF NOT EXISTS secret (name TEXT PRIMARY KEY, type TEXT NOT NULL, created REAL NOT NULL, data BLOB NOT NULL);"


@dataclass(frozen=True)
class Secret:
    name: str
    type: str
    created: float


class Secrets:
    """Kubernetes Secrets by name."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._db = database
        self._fernet = Fernet(_key(folder / "secrets.key"))

    def create(self, document: bytes) -> None:
        """Takes a Kubernetes Secret as JSON.

        Raises:
            PachError: it is none, or there is one of that name already.
        """
        name, kind, values = _parse(document)
        with self._db.transaction():
            if self._db.row("SELECT 1 FROM secret WHERE name = ?", name):
                raise PachError(f'failed to create secret: secrets "{name}" already exists')
            plain = json.dumps({key: base64.b64encode(value).decode() for key, value in values.items()}).encode()
            self._db.execute("INSERT INTO secret VALUES (?, ?, ?, ?)", name, kind, time.time(), self._fernet.encrypt(plain))

    def inspect(self, name: str) -> Secret:
        row = self._db.row("SELECT name, type, created FROM secret WHERE name = ?", name)
        if row is None:
            raise PachError(f'failed to get secret: secrets "{name}" not found')
        return Secret(row["name"], row["type"], row["created"])

    def list(self) -> list[Secret]:
        return [Secret(row["name"], row["type"], row["created"]) for row in self._db.rows("SELECT * FROM secret ORDER BY name")]

    def delete(self, name: str) -> None:
        with self._db.transaction():
            if not self._db.row("SELECT 1 FROM secret WHERE name = ?", name):
                raise PachError(f'failed to delete secret: secrets "{name}" not found')
            self._db.execute("DELETE FROM secret WHERE name = ?", name)

    def values(self, name: str) -> dict[str, bytes]:
        """The secret's keys and values.

        Raises:
            PachError: there is none of that name.
        """
        data = self._db.value("SELECT data FROM secret WHERE name = ?", name)
        if data is None:
            raise PachError(f'missing Kubernetes secret "{name}"')
        return {key: base64.b64decode(value) for key, value in json.loads(self._fernet.decrypt(data)).items()}


def _key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        key = Fernet.generate_key()
        # Whole or not there: half a key would be the end of everything that it opens.
        temporary = path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        temporary.touch(0o600, exist_ok=False)
        temporary.write_bytes(key)
        temporary.replace(path)
        return key


def _parse(document: bytes) -> tuple[str, str, dict[str, bytes]]:
    try:
        secret = json.loads(document)
        name = secret["metadata"]["name"]
        values = {key: base64.b64decode(value, validate=True) for key, value in (secret.get("data") or {}).items()}
        values.update({key: value.encode() for key, value in (secret.get("stringData") or {}).items()})
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        # The document holds secret values: say only what kind of trouble it was.
        raise PachError(f"failed to create secret: not a Kubernetes Secret as JSON ({type(error).__name__})") from None
    return name, secret.get("type") or "Opaque", values
