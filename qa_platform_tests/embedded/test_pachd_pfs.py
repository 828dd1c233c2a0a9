"""Repos, branches, commits and files, on any pachd."""

import io
import tarfile
from collections.abc import Iterator

import grpc
import pytest
from pachyderm_sdk.api import admin, pfs

from qa_platform_tests.pachd_helpers import LIMIT_SECONDS, Pachd, eventually, refused

NOT_FOUND, UNKNOWN, ALREADY_EXISTS, FAILED_PRECONDITION = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
)
CommitState = pfs.CommitState


def open_commit(pachd: Pachd, repo: pfs.Repo, branch: str = "master") -> pfs.Commit:
    return pachd.client.pfs.start_commit(branch=pachd.branch(repo, branch))


def infos(pachd: Pachd, repo: pfs.Repo, commit: str, pattern: str) -> list[str]:
    return [info.file.path for info in pachd.client.pfs.glob_file(commit=pachd.commit(repo, commit), pattern=pattern)]


def test_version_and_cluster_answer(pachd: Pachd) -> None:
    assert pachd.client.get_version().major == 2
    cluster = pachd.client.admin.inspect_cluster()
    assert cluster.id
    assert cluster.deployment_id
    assert cluster.warnings_ok
    assert not cluster.warnings
    missing = admin.InspectClusterRequest(current_project=pfs.Project(name=pachd.name("none")))
    with grpc.insecure_channel(pachd.address.removeprefix("grpc://")) as channel:
        reply = channel.unary_unary("/admin_v2.API/InspectCluster", bytes, admin.ClusterInfo.FromString)(missing, timeout=LIMIT_SECONDS)
    assert missing.current_project.name in "".join(reply.warnings)


def test_a_method_that_nobody_has_answers_unimplemented_by_name(pachd: Pachd) -> None:
    channel = grpc.insecure_channel(pachd.address.removeprefix("grpc://"))
    with channel, refused(grpc.StatusCode.UNIMPLEMENTED, "DoesNotExist"):
        channel.unary_unary("/pfs_v2.API/DoesNotExist")(b"", timeout=LIMIT_SECONDS)


class TestRepos:
    def test_a_repo_is_made_listed_and_deleted(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        assert pachd.client.pfs.inspect_repo(repo=repo).repo.name == repo.name
        assert repo.name in [info.repo.name for info in pachd.client.pfs.list_repo(type="user")]
        assert pachd.client.pfs.delete_repo(repo=repo).deleted
        assert not pachd.client.pfs.repo_exists(repo)

    def test_a_missing_repo_is_not_found(self, pachd: Pachd) -> None:
        name = pachd.name("none")
        with refused(NOT_FOUND, f"repo default/{name} not found"):
            pachd.client.pfs.inspect_repo(repo=pfs.Repo(name=name))

    def test_a_second_repo_of_that_name_already_exists(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        with refused(ALREADY_EXISTS, f"repo default/{repo.name} already exists"):
            pachd.client.pfs.create_repo(repo=repo)
        pachd.client.pfs.create_repo(repo=repo, update=True, description="new")
        assert pachd.client.pfs.inspect_repo(repo=repo).description == "new"

    def test_deleting_a_missing_repo_succeeds_and_says_so(self, pachd: Pachd) -> None:
        assert not pachd.client.pfs.delete_repo(repo=pfs.Repo(name=pachd.name("none"))).deleted

    def test_a_repo_name_with_other_characters_is_refused(self, pachd: Pachd) -> None:
        with refused(UNKNOWN, "only alphanumeric characters, underscores, and dashes are allowed"):
            pachd.client.pfs.create_repo(repo=pfs.Repo(name="no spaces"))

    def test_projects_keep_repos_of_the_same_name_apart(self, pachd: Pachd) -> None:
        project = pfs.Project(name=pachd.name("project"))
        pachd.client.pfs.create_project(project=project, description="mine")
        assert pachd.client.pfs.inspect_project(project=project).description == "mine"
        assert project.name in [info.project.name for info in pachd.client.pfs.list_project()]
        repo = pachd.repo()
        same = pfs.Repo(name=repo.name, project=project)
        pachd.client.pfs.create_repo(repo=same)
        assert [info.repo.name for info in pachd.client.pfs.list_repo(projects=[project])] == [repo.name]
        with refused(FAILED_PRECONDITION, f"cannot delete project {project.name}: repo {project.name}/{repo.name} still exists"):
            pachd.client.pfs.delete_project(project=project)
        pachd.client.pfs.delete_repo(repo=same)
        pachd.client.pfs.delete_project(project=project)
        assert pachd.client.pfs.repo_exists(repo)
        with refused(NOT_FOUND, project.name):
            pachd.client.pfs.inspect_project(project=project)

    def test_there_is_no_repo_without_a_name(self, pachd: Pachd) -> None:
        with refused(NOT_FOUND, "repo default/ not found"):
            pachd.client.pfs.inspect_repo(repo=pfs.Repo())

    def test_fsck_finds_nothing_wrong_in_a_healthy_repo(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.put(repo, {"/a": b"1"})
        pachd.put(repo, {"/b": b"2"})
        assert [found for found in pachd.client.pfs.fsck() if repo.name in found.error] == []


class TestBranches:
    def test_a_new_branch_has_an_empty_finished_head(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.client.pfs.create_branch(branch=pachd.branch(repo))
        head = pachd.client.pfs.inspect_branch(branch=pachd.branch(repo)).head
        info = pachd.client.pfs.inspect_commit(commit=head)
        assert info.origin.kind == pfs.OriginKind.AUTO
        assert info.finished > info.started or info.finished.year > 2000
        assert pachd.paths(repo, head.id) == []

    def test_a_missing_branch_is_not_found(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        with refused(NOT_FOUND, 'branch "b" not found in repo'):
            pachd.client.pfs.inspect_branch(branch=pachd.branch(repo, "b"))

    def test_a_branch_can_be_set_to_an_earlier_commit(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        first = pachd.put(repo, {"/a": b"1"})
        pachd.put(repo, {"/a": b"2"})
        pachd.client.pfs.create_branch(branch=pachd.branch(repo, "old"), head=pachd.commit(repo, first))
        assert pachd.client.pfs.inspect_branch(branch=pachd.branch(repo, "old")).head.id == first
        assert {info.branch.name for info in pachd.client.pfs.list_branch(repo=repo)} == {"master", "old"}
        pachd.client.pfs.delete_branch(branch=pachd.branch(repo, "old"))
        assert not pachd.client.pfs.branch_exists(pachd.branch(repo, "old"))

    def test_a_branch_made_from_another_follows_it(self, pachd: Pachd) -> None:
        source, target = pachd.repo("source"), pachd.repo("target")
        pachd.put(source, {"/a": b"1"})
        pachd.client.pfs.create_branch(branch=pachd.branch(target), provenance=[pachd.branch(source)])
        info = pachd.client.pfs.inspect_branch(branch=pachd.branch(target))
        assert [branch.repo.name for branch in info.direct_provenance] == [source.name]
        assert pachd.client.pfs.inspect_commit(commit=info.head).origin.kind == pfs.OriginKind.AUTO
        pachd.client.pfs.finish_commit(commit=info.head)
        commit = pachd.put(source, {"/b": b"2"})
        below = pachd.commit(target, commit)
        pachd.client.pfs.put_file_from_bytes(commit=below, path="/made", data=b"3")
        pachd.client.pfs.finish_commit(commit=below)
        found = list(pachd.client.pfs.inspect_commit_set(commit_set=pfs.CommitSet(id=commit), wait=True))
        assert [one.commit.repo.name for one in found] == [source.name, target.name]
        assert [one.repo.name for one in found[1].direct_provenance] == [source.name]
        with refused(UNKNOWN, "cannot start a commit on an output branch"):
            open_commit(pachd, target)

    def test_the_first_head_of_a_branch_made_from_another_stays_open_and_holds_up_those_after_it(self, pachd: Pachd) -> None:
        source, target = pachd.repo("source"), pachd.repo("target")
        pachd.put(source, {"/a": b"1"})
        pachd.client.pfs.create_branch(branch=pachd.branch(target), provenance=[pachd.branch(source)])
        first = pachd.client.pfs.inspect_branch(branch=pachd.branch(target)).head
        assert pachd.client.pfs.inspect_commit(commit=first).finishing.year == 1970
        after = pachd.commit(target, pachd.put(source, {"/b": b"2"}))
        pachd.client.pfs.finish_commit(commit=after)
        finished = pfs.InspectCommitRequest(commit=after, wait=CommitState.FINISHED)
        with grpc.insecure_channel(pachd.address.removeprefix("grpc://")) as channel:
            inspect = channel.unary_unary("/pfs_v2.API/InspectCommit", bytes, pfs.CommitInfo.FromString)
            with refused(grpc.StatusCode.DEADLINE_EXCEEDED, ""):
                inspect(finished, timeout=0.5)
        pachd.client.pfs.finish_commit(commit=first)
        assert pachd.client.pfs.inspect_commit(commit=after, wait=CommitState.FINISHED).finished.year > 2000

    def test_missing_upstream_branches_are_created(self, pachd: Pachd) -> None:
        source, target = pachd.repo("source"), pachd.repo("target")
        pachd.client.pfs.create_branch(branch=pachd.branch(target), provenance=[pachd.branch(source, "fresh")])
        made = pachd.client.pfs.inspect_branch(branch=pachd.branch(source, "fresh"))
        assert pachd.client.pfs.inspect_commit(commit=made.head).finished.year > 2000
        with refused(UNKNOWN, f"cannot be deleted because it's in the direct provenance of [default/{target.name}@master]"):
            pachd.client.pfs.delete_branch(branch=pachd.branch(source, "fresh"))


class TestCommits:
    def test_a_commit_becomes_finished_after_it_is_finishing(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = open_commit(pachd, repo)
        info = pachd.client.pfs.inspect_commit(commit=commit)
        assert info.origin.kind == pfs.OriginKind.USER
        assert info.finishing.year == info.finished.year == 1970
        pachd.client.pfs.finish_commit(commit=commit, description="done")
        info = pachd.client.pfs.inspect_commit(commit=commit, wait=CommitState.FINISHED)
        assert info.finished >= info.finishing > info.started
        assert info.description == "done"
        assert info.error == ""
        assert info.details is not None

    def test_replies_name_commits_without_their_branch(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.put(repo, {"/a": b""})
        commit = pachd.put(repo, {"/b": b""})
        info = pachd.client.pfs.inspect_commit(commit=pachd.commit(repo, commit))
        assert not info.commit.branch.name
        assert not info.parent_commit.branch.name
        assert info.parent_commit.id
        assert not pachd.client.pfs.inspect_branch(branch=pachd.branch(repo)).head.branch.name
        assert not open_commit(pachd, repo).branch.name
        in_sets = next(one for one in pachd.client.pfs.list_commit_set() if one.commit_set.id == commit)
        assert [(one.commit.id, one.commit.branch.name) for one in in_sets.commits] == [(commit, "")]

    def test_what_is_no_id_is_the_name_of_a_branch(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = "f" * 32
        commit = pachd.put(repo, {"/a": b"1"}, branch=name)
        assert pachd.client.pfs.inspect_commit(commit=pachd.commit(repo, name)).commit.id == commit
        with refused(NOT_FOUND, f'branch "{name}" not found in repo default/{repo.name}'):
            pachd.client.pfs.inspect_commit(commit=pfs.Commit(repo=repo, id="master", branch=pachd.branch(repo, name)))

    def test_an_id_that_is_none_without_a_branch_aborts(self, pachd: Pachd) -> None:
        commit = pachd.commit(pachd.repo(), "f" * 32)
        for ask in (
            lambda: pachd.client.pfs.inspect_commit(commit=commit),
            lambda: pachd.client.pfs.inspect_file(file=pfs.File(commit=commit, path="/a")),
        ):
            with refused(grpc.StatusCode.ABORTED, "nil pointer dereference"):
                ask()

    def test_a_commit_is_ready_when_what_it_is_made_from_is_finished(self, pachd: Pachd) -> None:
        source, target = pachd.repo("source"), pachd.repo("target")
        pachd.client.pfs.create_branch(branch=pachd.branch(source))
        pachd.client.pfs.create_branch(branch=pachd.branch(target), provenance=[pachd.branch(source)])
        commit = open_commit(pachd, source)
        below = pachd.commit(target, commit.id)
        assert pachd.client.pfs.inspect_commit(commit=below, wait=CommitState.STARTED).commit.id == commit.id
        ready = pfs.InspectCommitRequest(commit=below, wait=CommitState.READY)
        with grpc.insecure_channel(pachd.address.removeprefix("grpc://")) as channel:
            inspect = channel.unary_unary("/pfs_v2.API/InspectCommit", bytes, pfs.CommitInfo.FromString)
            with refused(grpc.StatusCode.DEADLINE_EXCEEDED, ""):
                inspect(ready, timeout=0.3)
            waiting = inspect.future(ready, timeout=LIMIT_SECONDS)
            pachd.client.pfs.finish_commit(commit=commit)
            assert waiting.result().commit.id == commit.id
        assert pachd.client.pfs.inspect_commit(commit=commit, wait=CommitState.FINISHING).finishing.year > 2000

    def test_ids_are_version_four_without_dashes(self, pachd: Pachd) -> None:
        commit = pachd.put(pachd.repo(), {})
        assert len(commit) == 32
        assert commit[12] == "4"

    def test_no_commit_starts_on_an_open_head(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        open_commit(pachd, repo)
        with refused(UNKNOWN, "has not been finished"):
            open_commit(pachd, repo)

    def test_a_finished_commit_takes_no_writes(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = pachd.put(repo, {"/a": b""})
        with refused(UNKNOWN, "has already finished"):
            pachd.client.pfs.put_file_from_bytes(commit=pachd.commit(repo, commit), path="/b", data=b"")
        with refused(UNKNOWN, "has already finished"):
            pachd.client.pfs.finish_commit(commit=pachd.commit(repo, commit))

    def test_a_missing_commit_is_not_found(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        missing = "0" * 12 + "4" + "0" * 19
        with refused(NOT_FOUND, f"commit default/{repo.name}@{missing} not found"):
            pachd.client.pfs.inspect_commit(commit=pachd.commit(repo, missing))

    def test_commits_are_listed_newest_first(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        made = [pachd.put(repo, {"/a": str(number).encode()}) for number in range(3)]
        listed = [info.commit.id for info in pachd.client.pfs.list_commit(repo=repo)]
        assert listed == made[::-1]
        assert [info.commit.id for info in pachd.client.pfs.list_commit(repo=repo, number=2)] == made[:0:-1]
        since = pachd.client.pfs.list_commit(repo=repo, to=pachd.commit(repo, "master"), from_=pachd.commit(repo, made[0]))
        assert [info.commit.id for info in since] == made[:0:-1]
        with refused(UNKNOWN, "cannot use `from` commit without `to` commit"):
            list(pachd.client.pfs.list_commit(repo=repo, from_=pachd.commit(repo, made[0])))
        middle = pachd.client.pfs.inspect_commit(commit=pachd.commit(repo, made[1])).started
        assert [info.commit.id for info in pachd.client.pfs.list_commit(repo=repo, started_time=middle)] == made[:1]
        assert [info.commit.id for info in pachd.client.pfs.list_commit(repo=repo, started_time=middle, reverse=True)] == made[2:]

    @pytest.mark.parametrize(
        ("suffix", "place"),
        [("master", 3), ("master^", 2), ("master^2", 1), ("master~3", 0), ("master^^", 1), ("master.1", 0)],
    )
    def test_ancestry_goes_back_from_the_head(self, pachd: Pachd, suffix: str, place: int) -> None:
        repo = pachd.repo()
        made = [pachd.put(repo, {"/a": str(number).encode()}) for number in range(4)]
        assert pachd.client.pfs.inspect_commit(commit=pachd.commit(repo, suffix)).commit.id == made[place]

    def test_ancestry_beyond_the_first_commit_is_refused(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        made = pachd.put(repo, {})
        with refused(UNKNOWN, "invalid offset for ancestor of commit"):
            pachd.client.pfs.inspect_commit(commit=pachd.commit(repo, f"{made}^5"))

    def test_ancestry_takes_one_number(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.put(repo, {})
        with refused(UNKNOWN, "invalid ancestry format"):
            pachd.client.pfs.inspect_commit(commit=pachd.commit(repo, "master^1^1"))

    def test_dropping_a_commit_set_moves_the_branch_back(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        first = pachd.put(repo, {"/a": b"1"})
        second = pachd.put(repo, {"/a": b"2"})
        with refused(UNKNOWN, "cannot drop a commit that has children"):
            pachd.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=first))
        pachd.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=second))
        assert pachd.client.pfs.inspect_branch(branch=pachd.branch(repo)).head.id == first
        assert not pachd.client.pfs.commit_exists(pachd.commit(repo, second))
        pachd.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=second))
        pachd.client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=second))
        with refused(NOT_FOUND, f"no commits found for commitset {second}"):
            list(pachd.client.pfs.inspect_commit_set(commit_set=pfs.CommitSet(id=second)))

    def test_squashing_keeps_the_files_for_the_children(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        first = pachd.put(repo, {"/a": b"1"})
        second = pachd.put(repo, {"/b": b"2"})
        with refused(UNKNOWN, "no children"):
            pachd.client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=second))
        pachd.client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=first))
        assert [info.commit.id for info in pachd.client.pfs.list_commit(repo=repo)] == [second]
        assert pachd.paths(repo, second) == ["/a", "/b"]

    def test_squashing_a_head_moves_its_branch_back(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        made = [pachd.put(repo, {"/a": b"%d" % number}) for number in range(3)]
        pachd.client.pfs.create_branch(branch=pachd.branch(repo, "old"), head=pachd.commit(repo, made[1]))
        pachd.client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=made[1]))
        assert pachd.client.pfs.inspect_branch(branch=pachd.branch(repo, "old")).head.id == made[0]
        assert pachd.client.pfs.inspect_commit(commit=pachd.commit(repo, "master^")).commit.id == made[0]

    def test_nothing_goes_that_other_commits_are_made_from(self, pachd: Pachd) -> None:
        source, target = pachd.repo("source"), pachd.repo("target")
        first = pachd.put(source, {"/a": b"1"})
        pachd.client.pfs.create_branch(branch=pachd.branch(target), provenance=[pachd.branch(source)])
        second = pachd.put(source, {"/a": b"2"})
        for forget in (pachd.client.pfs.drop_commit_set, pachd.client.pfs.squash_commit_set):
            with refused(UNKNOWN, "subvenant commit sets"):
                forget(commit_set=pfs.CommitSet(id=first))
        with refused(UNKNOWN, "without recursive"):
            pachd.client.pfs.drop_commit(commit=pachd.commit(source, second))
        pachd.client.pfs.drop_commit(commit=pachd.commit(source, second), recursive=True)
        assert [info.commit.id for info in pachd.client.pfs.list_commit(repo=source)] == [first]
        assert second not in [info.commit.id for info in pachd.client.pfs.list_commit(repo=target)]

    def test_the_head_at_a_pipelines_update_cannot_be_squashed(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        name = pachd.pipeline("p", ["true"], repo)
        head = pachd.put(repo, {"/a": b"1"})
        pachd.create(pachd.spec(name, ["true"], repo), update=True)
        pachd.put(repo, {"/a": b"2"})
        with refused(UNKNOWN, "has subvenant commit sets"):
            pachd.client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=head))

    def test_one_commit_is_squashed_or_dropped(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        made = [pachd.put(repo, {f"/{number}": b""}) for number in range(3)]
        with refused(UNKNOWN, "no children"):
            pachd.client.pfs.squash_commit(commit=pachd.commit(repo, made[2]))
        with refused(UNKNOWN, "has children"):
            pachd.client.pfs.drop_commit(commit=pachd.commit(repo, made[1]))
        pachd.client.pfs.squash_commit(commit=pachd.commit(repo, made[1]))
        assert pachd.paths(repo, made[2]) == ["/0", "/1", "/2"]
        pachd.client.pfs.drop_commit(commit=pachd.commit(repo, made[2]))
        assert pachd.paths(repo, "master") == ["/0"]

    def test_a_commit_with_an_open_child_is_not_squashed(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        first = pachd.put(repo, {"/a": b"1"})
        open_commit(pachd, repo)
        with refused(UNKNOWN, "cannot squash until child commit"):
            pachd.client.pfs.squash_commit_set(commit_set=pfs.CommitSet(id=first))

    def test_an_open_commit_is_cleared_and_a_finished_one_is_not(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.put(repo, {"/a": b"1"})
        commit = open_commit(pachd, repo)
        pachd.client.pfs.put_file_from_bytes(commit=commit, path="/b", data=b"2")
        assert pachd.paths(repo, commit.id) == ["/a", "/b"]
        pachd.client.pfs.clear_commit(commit=commit)
        assert pachd.paths(repo, commit.id) == ["/a"]
        pachd.client.pfs.finish_commit(commit=commit)
        with refused(UNKNOWN, "cannot clear finished commit"):
            pachd.client.pfs.clear_commit(commit=commit)

    def test_the_commits_that_changed_a_file_are_found(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        made = [pachd.put(repo, {path: b"%d" % number}) for number, path in enumerate(("/b", "/a", "/b", "/a", "/b"))]
        found = list(pachd.client.pfs.find_commits(start=pachd.commit(repo, made[-1]), file_path="/a"))
        assert [one.found_commit.id for one in found[:-1]] == [made[3], made[1]]
        assert (found[-1].last_searched_commit.id, found[-1].commits_searched) == (made[0], 5)
        limited = list(pachd.client.pfs.find_commits(start=pachd.commit(repo, made[-1]), file_path="/a", limit=1))
        assert [one.found_commit.id for one in limited[:-1]] == [made[3]]

    def test_an_open_commit_can_be_dropped(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        first = pachd.put(repo, {"/a": b"1"})
        commit = open_commit(pachd, repo)
        pachd.client.pfs.put_file_from_bytes(commit=commit, path="/b", data=b"x")
        pachd.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=commit.id))
        assert pachd.client.pfs.inspect_branch(branch=pachd.branch(repo)).head.id == first

    def test_a_missing_commit_set_is_not_found(self, pachd: Pachd) -> None:
        with refused(NOT_FOUND, "no commits found for commitset"):
            list(pachd.client.pfs.inspect_commit_set(commit_set=pfs.CommitSet(id="0" * 12 + "4" + "0" * 19)))

    def test_a_subscription_replays_commits_and_then_follows(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        made = [pachd.put(repo, {"/a": b"1"}), pachd.put(repo, {"/a": b"2"})]
        stream = pachd.client.pfs.subscribe_commit(
            repo=repo, branch="master", from_=pachd.commit(repo, made[0]), state=CommitState.FINISHED
        )
        assert next(stream).commit.id == made[1]
        third = pachd.put(repo, {"/a": b"3"})
        assert next(stream).commit.id == third

    def test_an_errored_commit_keeps_the_last_good_files_below_it(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.put(repo, {"/a": b"1"})
        commit = open_commit(pachd, repo)
        pachd.client.pfs.put_file_from_bytes(commit=commit, path="/b", data=b"2")
        pachd.client.pfs.finish_commit(commit=commit, error="it went wrong")
        info = pachd.client.pfs.inspect_commit(commit=commit, wait=CommitState.FINISHED)
        assert info.error == "it went wrong"
        assert pachd.paths(repo, commit.id) == ["/a", "/b"]
        after = pachd.put(repo, {"/c": b"3"})
        assert pachd.paths(repo, after) == ["/a", "/c"]


class TestFiles:
    def test_files_are_overwritten_by_default_and_appended_on_request(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.put(repo, {"/a": b"one"})
        with pachd.client.pfs.commit(branch=pachd.branch(repo)) as commit:
            commit.put_file_from_bytes("/a", b"two", append=True)
        assert pachd.read(repo, commit.id, "/a") == b"onetwo"
        again = pachd.put(repo, {"/a": b"three"})
        assert pachd.read(repo, again, "/a") == b"three"

    def test_adding_twice_in_one_stream_appends(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = open_commit(pachd, repo)
        add = [pfs.ModifyFileRequest(add_file=pfs.AddFile(path="a", raw=part)) for part in (b"x", b"y")]
        pachd.client.pfs.modify_file(iter([pfs.ModifyFileRequest(set_commit=commit), *add]))
        pachd.client.pfs.finish_commit(commit=commit)
        assert pachd.read(repo, commit.id, "/a") == b"xy"

    def test_a_file_without_a_source_is_empty(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = open_commit(pachd, repo)
        requests = [pfs.ModifyFileRequest(set_commit=commit), pfs.ModifyFileRequest(add_file=pfs.AddFile(path="/empty"))]
        pachd.client.pfs.modify_file(iter(requests))
        pachd.client.pfs.finish_commit(commit=commit)
        assert pachd.paths(repo, commit.id) == ["/empty"]
        assert pachd.read(repo, commit.id, "/empty") == b""

    def test_the_parts_of_a_file_are_told_apart_by_their_tags(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = open_commit(pachd, repo)
        parts = [pfs.AddFile(path="/a", raw=b"plain"), pfs.AddFile(path="/a", datum="x", raw=b"tagged")]
        requests = [pfs.ModifyFileRequest(set_commit=commit), *(pfs.ModifyFileRequest(add_file=part) for part in parts)]
        pachd.client.pfs.modify_file(iter(requests))
        tagged = pachd.client.pfs.get_file(file=pfs.File(commit=commit, path="/a", datum="x"))
        assert b"".join(message.value for message in tagged) == b"tagged"
        pachd.client.pfs.delete_file(commit=commit, path="/a")
        assert pachd.read(repo, commit.id, "/a") == b"tagged"

    def test_a_stream_begins_with_its_commit(self, pachd: Pachd) -> None:
        with refused(UNKNOWN, "first message must be a commit"):
            pachd.client.pfs.modify_file(iter([pfs.ModifyFileRequest(add_file=pfs.AddFile(path="/a", raw=b""))]))

    def test_the_sdks_biggest_messages_are_taken(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        data = b"0123456789" * 2_000_000
        commit = pachd.put(repo, {"/big": data})
        assert pachd.read(repo, commit, "/big") == data

    def test_differences_are_the_changed_folders_and_files(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        first = pachd.put(repo, {"/d/gone": b"1", "/d/changed": b"1", "/e/same": b"1"})
        second = pachd.put(repo, {"/d/changed": b"2", "/new": b"1"}, delete=["/d/gone"])

        def paths(**more: pfs.File) -> list[tuple[str, str]]:
            new = pfs.File(commit=pachd.commit(repo, second), path="/")
            return [(one.old_file.file.path, one.new_file.file.path) for one in pachd.client.pfs.diff_file(new_file=new, **more)]

        expected = [("/", "/"), ("/d/", "/d/"), ("/d/changed", "/d/changed"), ("/d/gone", ""), ("", "/new")]
        assert sorted(paths()) == sorted(expected)
        assert sorted(paths(old_file=pfs.File(commit=pachd.commit(repo, first), path="/"))) == sorted(expected)
        assert paths(old_file=pfs.File(commit=pachd.commit(repo, second), path="/")) == []

    def test_an_open_commit_can_be_read(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = open_commit(pachd, repo)
        pachd.client.pfs.put_file_from_bytes(commit=commit, path="/a", data=b"1")
        assert pachd.read(repo, commit.id, "/a") == b"1"
        pachd.client.pfs.put_file_from_bytes(commit=commit, path="/a", data=b"2")
        assert pachd.read(repo, commit.id, "/a") == b"2"

    def test_writing_to_a_branch_makes_a_finished_commit(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = pfs.Commit(repo=repo, branch=pachd.branch(repo))
        pachd.client.pfs.put_file_from_bytes(commit=commit, path="/a", data=b"1")
        head = pachd.client.pfs.inspect_branch(branch=pachd.branch(repo)).head
        assert pachd.client.pfs.inspect_commit(commit=head, wait=CommitState.FINISHED).finished.year > 2000
        assert pachd.read(repo, head.id, "/a") == b"1"

    def test_writing_to_a_branch_with_an_open_head_writes_into_it(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = open_commit(pachd, repo)
        pachd.client.pfs.put_file_from_bytes(commit=pfs.Commit(repo=repo, branch=pachd.branch(repo)), path="/a", data=b"1")
        assert pachd.client.pfs.inspect_branch(branch=pachd.branch(repo)).head.id == commit.id
        assert pachd.read(repo, commit.id, "/a") == b"1"

    def test_a_folder_is_deleted_only_with_a_slash_behind(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.put(repo, {"/d/a": b"1", "/d/b": b"2", "/e": b"3"})
        assert pachd.paths(repo, pachd.put(repo, {}, delete=["/d"])) == ["/d/a", "/d/b", "/e"]
        assert pachd.paths(repo, pachd.put(repo, {}, delete=["/d/"])) == ["/e"]
        assert pachd.paths(repo, pachd.put(repo, {"/f": b"4"}, delete=["/"])) == ["/f"]

    def test_a_missing_file_is_not_found(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = pachd.put(repo, {"/a": b"1"})
        file = pfs.File(commit=pachd.commit(repo, commit), path="/none")
        missing = f"file /none not found in repo default/{repo.name} at commit {commit}"
        with refused(NOT_FOUND, missing):
            list(pachd.client.pfs.get_file(file=file))
        with refused(NOT_FOUND, missing):
            list(pachd.client.pfs.get_file_tar(file=file))
        with refused(NOT_FOUND, missing):
            pachd.client.pfs.inspect_file(file=file)
        with refused(NOT_FOUND, "does not contain item"):
            list(pachd.client.pfs.walk_file(file=file))
        assert list(pachd.client.pfs.list_file(file=file)) == []
        assert infos(pachd, repo, commit, "/none*") == []

    def test_an_empty_commit_has_no_root(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        file = pfs.File(commit=pachd.commit(repo, pachd.put(repo, {})), path="/")
        with refused(NOT_FOUND, "not found"):
            pachd.client.pfs.inspect_file(file=file)
        with refused(NOT_FOUND, "not found"):
            list(pachd.client.pfs.get_file(file=file))
        assert list(pachd.client.pfs.walk_file(file=file)) == []
        assert list(pachd.client.pfs.list_file(file=file)) == []

    def test_listing_walking_and_inspecting(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = pachd.commit(repo, pachd.put(repo, {"/d/a": b"1", "/d/e/b": b"22", "/d.txt": b"333"}))

        def listed(path: str) -> list[tuple[str, int]]:
            return [(info.file.path, info.size_bytes) for info in pachd.client.pfs.list_file(file=pfs.File(commit=commit, path=path))]

        assert listed("/") == [("/d.txt", 3), ("/d/", 3)]
        assert listed("/d") == [("/d/a", 1), ("/d/e/", 2)]
        assert listed("/d/a") == [("/d/a", 1)]
        walked = pachd.client.pfs.walk_file(file=pfs.File(commit=commit, path="/"))
        assert [info.file.path for info in walked] == ["/", "/d.txt", "/d/", "/d/a", "/d/e/", "/d/e/b"]
        folder = pachd.client.pfs.inspect_file(file=pfs.File(commit=commit, path="/d"))
        assert folder.file_type == pfs.FileType.DIR
        assert folder.file.path == "/d/"
        assert folder.size_bytes == 3
        assert folder.file.commit.id == commit.id
        assert not folder.file.commit.branch.name
        for path in ("/d", "/d/**"):
            with refused(UNKNOWN, "cannot get directory or non-regular file"):
                list(pachd.client.pfs.get_file(file=pfs.File(commit=commit, path=path)))
        assert pachd.read(repo, commit.id, "/d/e/?") == b"22"

    def test_get_file_takes_a_glob_with_one_match(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = pachd.commit(repo, pachd.put(repo, {"/a": b"1", "/b": b"2"}))
        with refused(UNKNOWN, "matched multiple files"):
            list(pachd.client.pfs.get_file(file=pfs.File(commit=commit, path="/?")))

    def test_lists_of_files_come_in_pages(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = pachd.commit(repo, pachd.put(repo, {f"/{name}": b"" for name in "abcd"}))
        root = pfs.File(commit=commit, path="/")
        after = pfs.File(commit=commit, path="/b")

        def listed(**more: object) -> list[str]:
            return [info.file.path for info in pachd.client.pfs.list_file(file=root, **more)]

        assert listed(number=2) == ["/a", "/b"]
        assert listed(number=1, pagination_marker=after) == ["/c"]
        assert listed(reverse=True, number=3) == ["/d", "/c", "/b"]
        assert listed(reverse=True, number=3, pagination_marker=after) == ["/a"]
        with refused(UNKNOWN, "number must be > 0 when reverse is true"):
            listed(reverse=True)
        walked = pachd.client.pfs.walk_file(file=root, pagination_marker=after)
        assert [info.file.path for info in walked] == ["/c", "/d"]

    def test_equal_content_has_equal_hashes_however_it_came(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        data = bytes(range(256)) * 40_000
        with pachd.client.pfs.commit(branch=pachd.branch(repo)) as commit:
            commit.put_file_from_bytes("/whole", data)
            commit.put_file_from_bytes("/parts", data[:5_000_001])
            commit.put_file_from_bytes("/parts", data[5_000_001:], append=True)
        commit.wait()
        hashes = {pachd.client.pfs.inspect_file(file=pfs.File(commit=commit, path=path)).hash for path in ("/whole", "/parts")}
        assert len(hashes) == 1
        assert pachd.read(repo, commit.id, "/parts") == data

    def test_an_offset_skips_the_beginning(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        data = bytes(range(256)) * 40_000
        commit = pachd.commit(repo, pachd.put(repo, {"/a": data}))
        stream = pachd.client.pfs.get_file(file=pfs.File(commit=commit, path="/a"), offset=9_000_000)
        assert b"".join(message.value for message in stream) == data[9_000_000:]

    @pytest.mark.parametrize(
        ("pattern", "matches"),
        [
            ("/", ["/"]),
            ("/*", ["/a.csv", "/b/", "/c-1/"]),
            ("/*/", ["/a.csv", "/b/", "/c-1/"]),
            ("/*/*", ["/b/d.csv", "/b/e/", "/c-1/x"]),
            ("**.csv", ["/a.csv", "/b/d.csv"]),
            ("/{a.csv,b}", ["/a.csv", "/b/"]),
            ("/[ab]*", ["/a.csv", "/b/"]),
            ("/[!a]", ["/b/"]),
            ("/?", ["/b/"]),
            ("/+([a-z]).csv", ["/a.csv"]),
            ("/b/**", ["/b/d.csv", "/b/e/", "/b/e/f"]),
            ("/none", []),
        ],
    )
    def test_globs(self, pachd: Pachd, pattern: str, matches: list[str]) -> None:
        repo = pachd.repo()
        commit = pachd.put(repo, {"/a.csv": b"1", "/b/d.csv": b"2", "/b/e/f": b"3", "/c-1/x": b"4"})
        assert infos(pachd, repo, commit, pattern) == matches

    @pytest.mark.parametrize("path", ["/a*", "/x?", "/{a}", "/a@b", "/../a", "/a/./b", "/schön", "/a\nb"])
    def test_a_path_that_no_file_may_have_is_refused(self, pachd: Pachd, path: str) -> None:
        repo = pachd.repo()
        commit = open_commit(pachd, repo)
        with refused(UNKNOWN, "invalid"):
            pachd.client.pfs.put_file_from_bytes(commit=commit, path=path, data=b"")

    def test_a_tar_holds_the_files_below_a_folder(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        files = {"/d/a": b"1" * 1000, "/d/e/b": b"", "/x": b"3"}
        commit = pachd.commit(repo, pachd.put(repo, files))
        stream = pachd.client.pfs.get_file_tar(file=pfs.File(commit=commit, path="/d"))
        with tarfile.open(fileobj=io.BytesIO(b"".join(message.value for message in stream))) as archive:
            found = {member.name.strip("/"): archive.extractfile(member).read() for member in archive if member.isfile()}  # type: ignore[union-attr]
        assert found == {"d/a": b"1" * 1000, "d/e/b": b""}

    def test_a_file_is_copied_between_commits(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        first = pachd.put(repo, {"/a": b"1", "/d/x": b"2"})
        with pachd.client.pfs.commit(branch=pachd.branch(repo)) as commit:
            commit.copy_file(src=pfs.File(commit=pachd.commit(repo, first), path="/a"), dst="/b")
            commit.copy_file(src=pfs.File(commit=pachd.commit(repo, first), path="/d"), dst="/f")
        commit.wait()
        assert pachd.paths(repo, commit.id) == ["/a", "/b", "/d/x", "/f/x"]
        assert pachd.read(repo, commit.id, "/b") == b"1"

    def test_a_path_that_is_file_and_folder_fails_the_commit(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        commit = open_commit(pachd, repo)
        pachd.client.pfs.put_file_from_bytes(commit=commit, path="/a", data=b"")
        pachd.client.pfs.put_file_from_bytes(commit=commit, path="/a/b", data=b"")
        pachd.client.pfs.finish_commit(commit=commit)
        assert "collision" in pachd.client.pfs.inspect_commit(commit=commit, wait=CommitState.FINISHED).error

    def test_a_url_of_another_kind_is_refused(self, pachd: Pachd) -> None:
        commit = open_commit(pachd, pachd.repo())
        with refused(UNKNOWN, "unrecognized object store: ftp"):
            pachd.client.pfs.put_file_from_url(commit=commit, path="/a", url="ftp://host/a")


class TestFileSets:
    def test_file_sets_become_visible_when_they_are_added(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.put(repo, {"/old": b"0"})
        made = [
            pachd.client.pfs.create_file_set(iter([pfs.ModifyFileRequest(add_file=pfs.AddFile(path=path, raw=path.encode()))])).file_set_id
            for path in ("/a", "/b", "/c")
        ]
        pachd.client.pfs.renew_file_set(file_set_id=made[0], ttl_seconds=600)
        commit = open_commit(pachd, repo)
        pachd.client.pfs.delete_file(commit=commit, path="/")
        for file_set in made[:2]:
            pachd.client.pfs.add_file_set(commit=commit, file_set_id=file_set)
        pachd.client.pfs.finish_commit(commit=commit)
        assert pachd.paths(repo, commit.id) == ["/a", "/b"]
        assert pachd.read(repo, commit.id, "/b") == b"/b"

    def test_a_file_set_that_is_added_twice_doubles_what_is_in_its_files(self, pachd: Pachd) -> None:
        request = pfs.ModifyFileRequest(add_file=pfs.AddFile(path="/a", raw=b"1"))
        made = pachd.client.pfs.create_file_set(iter([request])).file_set_id
        commit = open_commit(pachd, pachd.repo())
        for _ in range(2):
            pachd.client.pfs.add_file_set(commit=commit, file_set_id=made)
        pachd.client.pfs.finish_commit(commit=commit)
        assert pachd.read(commit.repo, commit.id, "/a") == b"11"

    def test_file_sets_are_made_of_commits_and_of_each_other(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        before = pachd.commit(repo, pachd.put(repo, {"/a": b"1", "/b": b"2"}))
        request = pfs.ModifyFileRequest(add_file=pfs.AddFile(path="/c", raw=b"3"))
        made = pachd.client.pfs.create_file_set(iter([request])).file_set_id
        whole = pachd.client.pfs.get_file_set(commit=before).file_set_id
        both = pachd.client.pfs.compose_file_set(file_set_ids=[whole, made], ttl_seconds=60).file_set_id
        commit = open_commit(pachd, pachd.repo("other"))
        pachd.client.pfs.add_file_set(commit=commit, file_set_id=both)
        pachd.client.pfs.finish_commit(commit=commit)
        assert {path: pachd.read(commit.repo, commit.id, path) for path in pachd.paths(commit.repo, commit.id)} == {
            "/a": b"1",
            "/b": b"2",
            "/c": b"3",
        }

    def test_a_file_set_that_is_unknown_is_refused(self, pachd: Pachd) -> None:
        commit = open_commit(pachd, pachd.repo())
        with refused(UNKNOWN, "file set"):
            pachd.client.pfs.add_file_set(commit=commit, file_set_id="0" * 32)

    def test_a_file_set_deletes_nothing_of_the_commit_that_it_is_added_to(self, pachd: Pachd) -> None:
        repo = pachd.repo()
        pachd.put(repo, {"/old": b"0"})
        requests = [
            pfs.ModifyFileRequest(add_file=pfs.AddFile(path="/gone", raw=b"1")),
            pfs.ModifyFileRequest(delete_file=pfs.DeleteFile(path="/")),
            pfs.ModifyFileRequest(add_file=pfs.AddFile(path="/new", raw=b"2")),
        ]
        made = pachd.client.pfs.create_file_set(iter(requests)).file_set_id
        commit = open_commit(pachd, repo)
        pachd.client.pfs.add_file_set(commit=commit, file_set_id=made)
        pachd.client.pfs.finish_commit(commit=commit)
        assert pachd.paths(repo, commit.id) == ["/new", "/old"]


def test_a_user_cannot_wait_for_a_commit_that_is_dropped_for_ever(pachd: Pachd) -> None:
    repo = pachd.repo()
    pachd.put(repo, {"/a": b""})
    commit = open_commit(pachd, repo)
    pachd.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=commit.id))
    with refused(NOT_FOUND, "not found"):
        pachd.client.pfs.inspect_commit(commit=commit, wait=CommitState.FINISHED)


def test_one_stream_writes_thousands_of_small_files(pachd: Pachd) -> None:
    repo = pachd.repo()
    commit = open_commit(pachd, repo)
    add = (pfs.ModifyFileRequest(add_file=pfs.AddFile(path=f"/{number % 10}/{number}", raw=b"%d" % number)) for number in range(3000))

    def requests() -> Iterator[pfs.ModifyFileRequest]:
        yield pfs.ModifyFileRequest(set_commit=commit)
        yield from add

    pachd.client.pfs.modify_file(requests())
    pachd.client.pfs.finish_commit(commit=commit)
    assert pachd.read(repo, commit.id, "/9/2999") == b"2999"
    listing = eventually(lambda: list(pachd.client.pfs.list_file(file=pfs.File(commit=commit, path="/3"))))
    assert len(listing) == 300
