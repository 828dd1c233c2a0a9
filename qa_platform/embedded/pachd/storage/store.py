"""The whole storage of one state folder."""

from pathlib import Path

from qa_platform.embedded.pachd.storage import chunks, filesets
from qa_platform.embedded.pachd.storage.chunks import ChunkStore
from qa_platform.embedded.pachd.storage.database import Database
from qa_platform.embedded.pachd.storage.filesets import FileSets
from qa_platform.embedded.pachd.storage.garbage import WriteGate
from qa_platform.embedded.pachd.storage.logs import LogStore
from qa_platform.embedded.pachd.storage.trees import TreeStore


class Store:
    """All storage of a state folder.

    ``metadata`` has repos, commits, pipelines and jobs. Content is stored before the metadata that refers to it.

    Args:
        folder: the state folder; it is created if it does not exist.
        schema: the tables of ``metadata``.
    """

    def __init__(self, folder: Path, schema: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.folder = folder
        self.metadata = Database(folder / "metadata.db", filesets.SCHEMA + schema)
        self._objects = Database(folder / "objects.db", chunks.SCHEMA)
        self.chunks = ChunkStore(folder / "chunks", self._objects)
        self.trees = TreeStore(self._objects, self.chunks)
        self.filesets = FileSets(self.metadata, self.chunks)
        self.gate = WriteGate()
        self.logs = LogStore(folder / "logs.db")

    def close(self) -> None:
        self.chunks.close()
        for part in (self.metadata, self._objects, self.logs):
            part.close()
