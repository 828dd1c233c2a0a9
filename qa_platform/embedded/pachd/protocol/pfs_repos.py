"""The methods of ``pfs_v2.API`` about projects, repos and branches."""

from collections.abc import Iterator

from betterproto.lib.google.protobuf import Empty
from pachyderm_sdk.api import pfs as pb

from qa_platform.embedded.pachd.errors import PachError, Unimplemented
from qa_platform.embedded.pachd.pfs import Pfs, Project
from qa_platform.embedded.pachd.pps import Pps
from qa_platform.embedded.pachd.protocol import convert
from qa_platform.embedded.pachd.protocol.rpc import PFS_SERVICE, Call, Entries, Method, named


class RepoMethods:
    """Projects, repos and branches."""

    def __init__(self, pfs: Pfs, pps: Pps) -> None:
        self._pfs = pfs
        self._pps = pps

    def methods(self) -> dict[str, Method]:
        """The methods by their full names."""
        unary: Entries = [
            ("CreateProject", pb.CreateProjectRequest, self.create_project),
            ("InspectProject", pb.InspectProjectRequest, self.inspect_project),
            ("DeleteProject", pb.DeleteProjectRequest, self.delete_project),
            ("CreateRepo", pb.CreateRepoRequest, self.create_repo),
            ("InspectRepo", pb.InspectRepoRequest, self.inspect_repo),
            ("DeleteRepo", pb.DeleteRepoRequest, self.delete_repo),
            ("DeleteRepos", pb.DeleteReposRequest, self.delete_repos),
            ("CreateBranch", pb.CreateBranchRequest, self.create_branch),
            ("InspectBranch", pb.InspectBranchRequest, self.inspect_branch),
            ("DeleteBranch", pb.DeleteBranchRequest, self.delete_branch),
        ]
        streaming: Entries = [
            ("ListProject", pb.ListProjectRequest, self.list_project),
            ("ListRepo", pb.ListRepoRequest, self.list_repo),
            ("ListBranch", pb.ListBranchRequest, self.list_branch),
        ]
        return named(PFS_SERVICE, unary) | named(PFS_SERVICE, streaming, streams_out=True)

    def create_project(self, request: pb.CreateProjectRequest, call: Call) -> Empty:
        self._pfs.create_project(request.project.name, request.description, update=request.update)
        return convert.EMPTY

    def inspect_project(self, request: pb.InspectProjectRequest, call: Call) -> pb.ProjectInfo:
        return _project_info(self._pfs.project(request.project.name))

    def list_project(self, request: pb.ListProjectRequest, call: Call) -> Iterator[pb.ProjectInfo]:
        return map(_project_info, self._pfs.projects())

    def delete_project(self, request: pb.DeleteProjectRequest, call: Call) -> Empty:
        self._pfs.delete_project(request.project.name)
        return convert.EMPTY

    def create_repo(self, request: pb.CreateRepoRequest, call: Call) -> Empty:
        self._pfs.create_repo(convert.repo_key(request.repo), request.description, update=request.update)
        return convert.EMPTY

    def inspect_repo(self, request: pb.InspectRepoRequest, call: Call) -> pb.RepoInfo:
        return convert.repo_info(self._pfs.repo(convert.repo_key(request.repo)))

    def list_repo(self, request: pb.ListRepoRequest, call: Call) -> Iterator[pb.RepoInfo]:
        return map(convert.repo_info, self._pfs.repos(request.type, [project.name for project in request.projects]))

    def delete_repo(self, request: pb.DeleteRepoRequest, call: Call) -> pb.DeleteRepoResponse:
        key = convert.repo_key(request.repo)
        owner = self._pps.owner(key)
        if owner is not None and self._pfs.repo_exists(key):
            problem = "cannot delete a repo associated with a pipeline - delete the pipeline instead"
            raise PachError(f'delete repo: error checking whether repo "{key}" can be deleted: {problem}')
        return pb.DeleteRepoResponse(deleted=self._pfs.delete_repo(key, force=request.force))

    def delete_repos(self, request: pb.DeleteReposRequest, call: Call) -> pb.DeleteReposResponse:
        """Delete all repos of the given projects, or of all. Repos of pipelines stay: they are deleted with their pipelines."""
        projects = [project.name for project in request.projects]
        keys = [repo.key for repo in self._pfs.repos("user", projects)] if projects or request.all else []
        deleted = [key for key in keys if self._pps.owner(key) is None and self._pfs.delete_repo(key, force=request.force)]
        return pb.DeleteReposResponse(repos=[convert.repo(key) for key in deleted])

    def create_branch(self, request: pb.CreateBranchRequest, call: Call) -> Empty:
        if convert.is_set(request.trigger):
            raise Unimplemented(f"branch {request.branch.name!r} has a trigger, which the embedded server does not support")
        head = request.head
        ref = convert.commit_ref(head) if head.id or head.branch.name else None
        self._pfs.create_branch(convert.branch_key(request.branch), ref, [convert.branch_key(branch) for branch in request.provenance])
        return convert.EMPTY

    def inspect_branch(self, request: pb.InspectBranchRequest, call: Call) -> pb.BranchInfo:
        return convert.branch_info(self._pfs, self._pfs.branch(convert.branch_key(request.branch)))

    def list_branch(self, request: pb.ListBranchRequest, call: Call) -> Iterator[pb.BranchInfo]:
        branches = self._pfs.branches(convert.repo_key(request.repo), reverse=request.reverse)
        return (convert.branch_info(self._pfs, branch) for branch in branches)

    def delete_branch(self, request: pb.DeleteBranchRequest, call: Call) -> Empty:
        self._pfs.delete_branch(convert.branch_key(request.branch), force=request.force)
        return convert.EMPTY


def _project_info(project: Project) -> pb.ProjectInfo:
    created = convert.when(project.created)
    return pb.ProjectInfo(project=pb.Project(name=project.name), description=project.description, created_at=created)
