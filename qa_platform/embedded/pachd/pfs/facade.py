"""All rules of PFS behind one object."""

from qa_platform.embedded.pachd.pfs.branches import Branches
from qa_platform.embedded.pachd.pfs.commits import Commits
from qa_platform.embedded.pachd.pfs.graph import Graph, OnPropagated
from qa_platform.embedded.pachd.pfs.lifecycle import IsPipeline, Lifecycle
from qa_platform.embedded.pachd.pfs.removal import Removal
from qa_platform.embedded.pachd.pfs.repos import Projects, Repos
from qa_platform.embedded.pachd.pfs.trees import CommitTrees
from qa_platform.embedded.pachd.pfs.watching import Watching
from qa_platform.embedded.pachd.pfs.writing import Writing
from qa_platform.embedded.pachd.storage.store import Store


class Pfs:
    """The rules of PFS on one store.

    Each method belongs to one of the parts. All of them use short transactions on the metadata, and are thread-safe.

    Args:
        store: the storage.
        finish_seconds: the shortest time that a commit is finishing.
    """

    def __init__(self, store: Store, *, finish_seconds: float = 0.0) -> None:
        self.store = store
        # `Pps` sets both. The first is called inside the transaction with the commits that propagation has created.
        self.on_propagated: OnPropagated = lambda commits: None
        self.is_pipeline: IsPipeline = lambda repo: False
        database = store.metadata
        projects = Projects(database)
        repos = Repos(database, projects)
        branches = Branches(database, repos)
        commits = Commits(database, repos, branches)
        watching = Watching(database, repos, commits)
        graph = Graph(database, repos, branches, commits, on_propagated=lambda made: self.on_propagated(made))
        trees = CommitTrees(store, commits, watching)
        lifecycle = Lifecycle(
            store, branches, commits, graph, trees, finish_seconds=finish_seconds, is_pipeline=lambda repo: self.is_pipeline(repo)
        )
        writing = Writing(store, branches, commits, lifecycle, trees)
        removal = Removal(store, repos, branches, commits, graph, trees)
        self._offer_repos(projects, repos, removal)
        self._offer_branches(branches, graph, removal)
        self._offer_commits(commits, watching, lifecycle, removal)
        self._offer_files(trees, writing)

    def _offer_repos(self, projects: Projects, repos: Repos, removal: Removal) -> None:
        self.create_project = projects.create
        self.project = projects.get
        self.projects = projects.all
        self.delete_project = projects.delete
        self.create_repo = repos.create
        self.repo = repos.get
        self.repo_pk = repos.pk
        self.repo_exists = repos.exists
        self.repos = repos.all
        self.delete_repo = removal.delete_repo

    def _offer_branches(self, branches: Branches, graph: Graph, removal: Removal) -> None:
        self.branch = branches.get
        self.branches = branches.of
        self.upstream = branches.upstream
        self.closure = branches.closure
        self.set_provenance = branches.set_provenance
        self.create_branch = graph.create_branch
        self.ensure_branch = graph.ensure_branch
        self.propagate = graph.propagate
        self.delete_branch = removal.delete_branch

    def _offer_commits(self, commits: Commits, watching: Watching, lifecycle: Lifecycle, removal: Removal) -> None:
        self.commit = commits.get
        self.commit_by_pk = commits.by_pk
        self.list_commits = commits.of
        self.children = commits.children
        self.provenance = commits.provenance
        self.subvenance = commits.subvenance
        self.commit_set = commits.of_set
        self.commit_sets = commits.set_ids
        self.wait = watching.wait
        self.subscribe = watching.subscribe
        self.start_commit = lifecycle.start
        self.add_finished_commit = lifecycle.add_finished
        self.finish_commit = lifecycle.finish
        self.finish_next = lifecycle.finish_next
        self.complete = lifecycle.complete
        self.drop_commit = removal.drop
        self.squash_commit = removal.squash
        self.drop_commit_set = removal.drop_set
        self.squash_commit_set = removal.squash_set

    def _offer_files(self, trees: CommitTrees, writing: Writing) -> None:
        self.readable_root = trees.readable_root
        self.check_base = trees.check_base
        self.good_root = trees.good_root
        self.roots = trees.roots
        self.fileset_of = trees.fileset_of
        self.writable = writing.target
        self.add_fileset = writing.add_fileset
        self.clear = writing.clear
