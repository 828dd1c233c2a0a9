"""The Kubernetes secrets of pachd's namespace.

Secrets created through pachd have Pachyderm's label. They are encrypted on disk; the key is in a file that only the owner can read.
Secrets created by other tools (kubectl, Helm) are the files ``kubernetes-secrets/*.json`` of the state folder. Each file is a Kubernetes
Secret, as printed by ``kubectl create secret … --dry-run=client -o json``. They are read at every call.
"""

import base64
import binascii
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.fernet import Fernet

from qa_platform.embedded.pachd.errors import PachError
from qa_platform.embedded.pachd.storage.database import Database

FOREIGN_FOLDER = "kubernetes-secrets"
_LABEL = {"secret-source": "pachyderm-user"}
SCHEMA = "CREATE TABLE IF NOT EXISTS secret (name TEXT PRIMARY KEY, type TEXT NOT NULL, created REAL NOT NULL, data BLOB NOT NULL);"


@dataclass(frozen=True)
class Secret:
    """A secret without its values. ``created`` is in seconds since the epoch."""

    name: str
    type: str
    created: float


@dataclass(frozen=True)
class _Document:
    """A parsed Kubernetes Secret."""

    name: str
    type: str
    labels: dict[str, str]
    values: dict[str, bytes]


class Secrets:
    """The secrets of a state folder, by name."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._db = database
        self._foreign = folder / FOREIGN_FOLDER
        self._fernet = Fernet(_key(folder / "secrets.key"))

    def create(self, document: bytes) -> None:
        """Store a Kubernetes Secret, and label it.

        Args:
            document: the secret as JSON.

        Raises:
            PachError: the document is not a secret, or a secret with its name exists.
        """
        secret = _parse(document)
        if (suite := secret.labels.get("suite", "")) not in ("", "pachyderm"):
            raise PachError(f"invalid suite label set on secret: suite={suite}")
        with self._db.transaction():
            if self._find(secret.name) is not None:
                raise PachError(f'failed to create secret: secrets "{secret.name}" already exists')
            plain = json.dumps({key: base64.b64encode(value).decode() for key, value in secret.values.items()}).encode()
            self._db.execute("INSERT INTO secret VALUES (?, ?, ?, ?)", secret.name, secret.type, time.time(), self._fernet.encrypt(plain))

    def inspect(self, name: str) -> Secret:
        """A secret, with or without the label.

        Raises:
            PachError: the secret does not exist.
        """
        secret = self._find(name)
        if secret is None:
            raise PachError(f'failed to get secret: secrets "{name}" not found')
        return secret

    def list(self) -> list[Secret]:
        """The secrets with Pachyderm's label, by name."""
        own = [Secret(row["name"], row["type"], row["created"]) for row in self._db.rows("SELECT * FROM secret")]
        labelled = [_secret(path, document) for path, document in self._foreign_secrets() if _LABEL.items() <= document.labels.items()]
        return sorted(own + labelled, key=lambda secret: secret.name)

    def delete(self, name: str) -> None:
        """Delete a secret, with or without the label.

        Raises:
            PachError: the secret does not exist.
        """
        with self._db.transaction():
            if self._find(name) is None:
                raise PachError(f'failed to delete secret: secrets "{name}" not found')
            self._db.execute("DELETE FROM secret WHERE name = ?", name)
            for path, document in self._foreign_secrets():
                if document.name == name:
                    path.unlink(missing_ok=True)

    def _find(self, name: str) -> Secret | None:
        row = self._db.row("SELECT name, type, created FROM secret WHERE name = ?", name)
        if row is not None:
            return Secret(row["name"], row["type"], row["created"])
        return next((_secret(path, document) for path, document in self._foreign_secrets() if document.name == name), None)

    def _foreign_secrets(self) -> Iterator[tuple[Path, _Document]]:
        for path in sorted(self._foreign.glob("*.json")):
            yield path, _parse(path.read_bytes())

    def values(self, name: str) -> dict[str, bytes]:
        """The keys and values of a secret.

        Raises:
            PachError: the secret does not exist.
        """
        data = self._db.value("SELECT data FROM secret WHERE name = ?", name)
        if data is None:
            foreign = next((document for _, document in self._foreign_secrets() if document.name == name), None)
            if foreign is None:
                raise PachError(f"missing Kubernetes secret {name}")
            return foreign.values
        return {key: base64.b64decode(value) for key, value in json.loads(self._fernet.decrypt(data)).items()}


def _key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        key = Fernet.generate_key()
        # Written completely before it gets its name: half a key would make all secrets unreadable.
        temporary = path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        temporary.touch(0o600, exist_ok=False)
        temporary.write_bytes(key)
        temporary.replace(path)
        return key


def _secret(path: Path, document: _Document) -> Secret:
    return Secret(document.name, document.type, path.stat().st_mtime)


def _parse(document: bytes) -> _Document:
    try:
        secret = json.loads(document)
        name = secret["metadata"]["name"]
        labels = dict(secret["metadata"].get("labels") or {})
        values = {key: base64.b64decode(value, validate=True) for key, value in (secret.get("data") or {}).items()}
        values.update({key: value.encode() for key, value in (secret.get("stringData") or {}).items()})
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        # The document contains secret values, so the message contains only the error's type.
        raise PachError(f"failed to unmarshal secret: not a Kubernetes Secret as JSON ({type(error).__name__})") from None
    return _Document(name, secret.get("type") or "Opaque", labels, values)
