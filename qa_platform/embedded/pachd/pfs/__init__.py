"""PFS: the rules of repos, branches, commits and their files.

``model`` has the values, ``names`` the rules of names and paths, ``schema`` the tables. ``repos``, ``branches`` and ``commits`` read and
write their own tables; ``graph`` creates commits and propagates them; ``lifecycle`` starts and finishes them; ``watching`` waits for them;
``trees`` finds their files; ``writing`` adds files; ``removal`` deletes. `Pfs` combines them.
"""

from qa_platform.embedded.pachd.pfs.facade import Pfs
from qa_platform.embedded.pachd.pfs.model import Branch, BranchKey, Commit, CommitRef, Kind, Project, Repo, RepoKey, Wait
from qa_platform.embedded.pachd.pfs.names import check_name, check_path, new_id, tag_of
from qa_platform.embedded.pachd.pfs.schema import SCHEMA

__all__ = [
    "SCHEMA",
    "Branch",
    "BranchKey",
    "Commit",
    "CommitRef",
    "Kind",
    "Pfs",
    "Project",
    "Repo",
    "RepoKey",
    "Wait",
    "check_name",
    "check_path",
    "new_id",
    "tag_of",
]
