"""The service ``pfs_v2.API``, combined from modules by topic."""

from qa_platform.embedded.pachd.pfs import Pfs
from qa_platform.embedded.pachd.pps import Pps
from qa_platform.embedded.pachd.protocol.pfs_commits import CommitMethods
from qa_platform.embedded.pachd.protocol.pfs_reading import ReadMethods
from qa_platform.embedded.pachd.protocol.pfs_repos import RepoMethods
from qa_platform.embedded.pachd.protocol.pfs_writing import WriteMethods
from qa_platform.embedded.pachd.protocol.rpc import Method
from qa_platform.settings import EmbeddedPachdSettings


class PfsApi:
    """The whole service."""

    def __init__(self, pfs: Pfs, pps: Pps, options: EmbeddedPachdSettings) -> None:
        self._parts = (RepoMethods(pfs, pps), CommitMethods(pfs), WriteMethods(pfs, options), ReadMethods(pfs))

    def methods(self) -> dict[str, Method]:
        """The methods by their full names."""
        return {name: method for part in self._parts for name, method in part.methods().items()}
