"""The rules of pipelines: creating, updating, stopping, ticking and deleting them."""

import time
from collections.abc import Iterable

from qa_platform.embedded.pachd import schedule
from qa_platform.embedded.pachd import spec as specs
from qa_platform.embedded.pachd.errors import AlreadyExists, NotFound, PachError
from qa_platform.embedded.pachd.pfs import BranchKey, Commit, CommitRef, Pfs, RepoKey, new_id
from qa_platform.embedded.pachd.pps.jobs import Jobs
from qa_platform.embedded.pachd.pps.records import JobState, Pipeline, PipelineKey, PipelineState, pipeline_of
from qa_platform.embedded.pachd.secrets import Secrets
from qa_platform.embedded.pachd.spec import CronInput, EffectiveSpec, PipelineSpec

_SELECT_PIPELINE = (
    "SELECT p.pk, p.project, p.name, p.stopped, p.state, p.reason, p.created, v.version, v.user_json, "
    "v.effective_json, v.filled_json, v.salt, v.spec_commit, v.updated FROM pipeline p JOIN pipeline_version v ON v.pipeline = p.pk"
)


class Pipelines:
    """The pipelines in the metadata."""

    def __init__(self, pfs: Pfs, secrets: Secrets, jobs: Jobs) -> None:
        self._pfs = pfs
        self._secrets = secrets
        self._jobs = jobs
        self._db = pfs.store.metadata

    def create(self, spec: EffectiveSpec, user_json: str, *, update: bool = False, reprocess: bool = False) -> None:
        """Create a pipeline or a new version of it, with a job unless the pipeline is stopped.

        Raises:
            PachError: it already exists, or something that it needs does not.
        """
        with self._db.transaction():
            parsed = specs.parse_text(spec.filled_json)
            key = PipelineKey(parsed.project, parsed.name)
            old = self.find(key)
            self._check(parsed, old, update=update)
            set_id = new_id()
            first = self._make_repos(parsed, set_id)
            spec_commit = self._pfs.add_finished_commit(parsed.spec_branch, set_id).id
            salt = old.salt if old is not None and not reprocess else specs.salt(spec) or new_id()
            self._store_version(key, old, user_json, spec, salt, spec_commit)
            if old is not None:
                self._jobs.kill_all(old.pk, "pipeline has been updated")
            if old is None or not old.stopped:
                self._connect(parsed, set_id)
                # The first commit of the output is the first job's.
                self._db.execute_many("DELETE FROM commit_ WHERE pk = ?", [(pk,) for pk in first])

    def _check(self, spec: PipelineSpec, old: Pipeline | None, *, update: bool) -> None:
        key = PipelineKey(spec.project, spec.name)
        self._pfs.project(spec.project)
        if old is not None and not update:
            raise AlreadyExists(f'pipeline "{key}" already exists')
        if old is None and self._pfs.repo_exists(spec.repo):
            raise PachError(f"cannot create pipeline {key}: a repo with the same name already exists")
        for leaf in spec.leaves():
            if isinstance(leaf, CronInput):
                schedule.check(leaf.spec)
                continue
            self._pfs.repo_pk(leaf.repo)
            if leaf.repo == spec.repo:
                raise PachError(f"pipeline {key} cannot have its own output as an input")
        for use in spec.secrets:
            if (problem := self.missing_secret(use)) is not None:
                raise PachError(problem)

    def missing_secret(self, use: specs.SecretUse) -> str | None:
        """The message about a missing secret or key; None if it exists."""
        try:
            values = self._secrets.values(use.name)
        except PachError:
            return f"missing Kubernetes secret {use.name}"
        return f"Kubernetes secret {use.name} missing key {use.key}" if use.key and use.key not in values else None

    def _make_repos(self, spec: PipelineSpec, set_id: str) -> list[int]:
        """Create the missing repos and branches of a pipeline. Returns the first commits of new output branches."""
        for repo_type in ("user", "spec", "meta"):
            repo = RepoKey(spec.project, spec.name, repo_type)
            self._pfs.create_repo(repo, f"Output repo for pipeline {repo.name}." if repo_type == "user" else "", update=True)
        for cron in spec.crons:
            self._pfs.create_repo(cron.repo, f"Cron tick repo for pipeline {spec.name}.", update=True)
        for leaf in spec.leaves():
            self._pfs.ensure_branch(leaf.branch_key, set_id)
        return [first for branch in (spec.output, spec.meta) if (first := self._make_branch(branch)) is not None]

    def _make_branch(self, branch: BranchKey) -> int | None:
        if any(one.key == branch for one in self._pfs.branches(branch.repo)):
            return None
        self._pfs.ensure_branch(branch, new_id())
        return self._pfs.branch(branch).head

    def _store_version(
        self, key: PipelineKey, old: Pipeline | None, user_json: str, spec: EffectiveSpec, salt: str, spec_commit: str
    ) -> None:
        now = time.time()
        if old is None:
            version = 1
            pk = self._db.execute(
                "INSERT INTO pipeline (project, name, version, stopped, created, updated) VALUES (?, ?, 1, 0, ?, ?)",
                key.project, key.name, now, now,
            )  # fmt: skip
        else:
            pk, version = old.pk, old.version + 1
            state = PipelineState.PAUSED if old.stopped else PipelineState.STARTING
            self._db.execute(
                "UPDATE pipeline SET version = ?, updated = ?, state = ?, reason = '' WHERE pk = ?", version, now, int(state), pk
            )
        self._db.execute(
            "INSERT INTO pipeline_version (pipeline, version, user_json, effective_json, filled_json, salt, spec_commit, updated) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            pk, version, user_json, spec.raw_json, spec.filled_json, salt, spec_commit, now,
        )  # fmt: skip

    def _connect(self, spec: PipelineSpec, set_id: str) -> None:
        upstream = [*(leaf.branch_key for leaf in spec.leaves()), spec.spec_branch]
        for branch in (spec.output, spec.meta):
            self._pfs.set_provenance(branch, upstream)
        self._pfs.propagate(set_id, [spec.output, spec.meta])

    def _disconnect(self, spec: PipelineSpec) -> None:
        for branch in (spec.output, spec.meta):
            self._pfs.set_provenance(branch, ())

    def create_jobs(self, commits: list[Commit]) -> None:
        """Create jobs for those of the new commits that are output commits of pipelines."""
        for commit in commits:
            pipeline = self.find(PipelineKey(commit.repo.project, commit.repo.name)) if commit.repo.type == "user" else None
            if pipeline is not None and commit.branch == pipeline.spec.output_branch:
                self._db.execute(
                    "INSERT INTO job (pipeline, id, version, commit_, state, created) VALUES (?, ?, ?, ?, ?, ?)",
                    pipeline.pk, commit.id, pipeline.version, commit.pk, int(JobState.CREATED), time.time(),
                )  # fmt: skip

    def find(self, key: PipelineKey, version: int = 0) -> Pipeline | None:
        """A version of a pipeline; 0 for the current one."""
        row = self._db.row(
            f"{_SELECT_PIPELINE} WHERE p.project = ? AND p.name = ? AND v.version = CASE WHEN ? = 0 THEN p.version ELSE ? END",
            key.project, key.name, version, version,
        )  # fmt: skip
        return None if row is None else pipeline_of(row)

    def get(self, key: PipelineKey, version: int = 0) -> Pipeline:
        """As ``find``. Raises NotFound if there is none."""
        found = self.find(key, version)
        if found is None:
            raise NotFound(f'pipeline was not inspected: couldn\'t find up to date spec for pipeline "{key}": pipeline "{key}" not found')
        return found

    def pipelines(self, *, key: PipelineKey | None = None, history: int = 0, projects: Iterable[str] = ()) -> list[Pipeline]:
        """The current versions and ``history`` older ones (-1: all), the newest pipelines first."""
        wanted = set(projects)
        rows = self._db.rows(
            f"{_SELECT_PIPELINE} WHERE ? < 0 OR v.version >= p.version - ? ORDER BY p.pk DESC, v.version DESC",
            history, history,
        )  # fmt: skip
        found = [pipeline_of(row) for row in rows]
        return [one for one in found if (key is None or one.key == key) and (not wanted or one.key.project in wanted)]

    def versions(self) -> list[tuple[int, int, int]]:
        """The pipelines as (primary key, current version, whether it is stopped)."""
        return [(row["pk"], row["version"], row["stopped"]) for row in self._db.rows("SELECT pk, version, stopped FROM pipeline")]

    def by_pk(self, pk: int) -> Pipeline | None:
        row = self._db.row(f"{_SELECT_PIPELINE} WHERE p.pk = ? AND v.version = p.version", pk)
        return None if row is None else pipeline_of(row)

    def set_state(self, pk: int, version: int, state: PipelineState, reason: str) -> None:
        """Set the state of a pipeline, as its workers are, unless the version is no longer the current one."""
        self._db.execute("UPDATE pipeline SET state = ?, reason = ? WHERE pk = ? AND version = ?", int(state), reason, pk, version)

    def stop(self, key: PipelineKey) -> None:
        """Stop a pipeline. An unknown one is no error. The state changes when the workers are gone."""
        with self._db.transaction():
            pipeline = self.find(key)
            if pipeline is None:
                return
            self._db.execute("UPDATE pipeline SET stopped = 1 WHERE pk = ?", pipeline.pk)
            self._disconnect(pipeline.spec)
            self._jobs.kill_all(pipeline.pk, "pipeline has been stopped")

    def start(self, key: PipelineKey) -> None:
        with self._db.transaction():
            pipeline = self.get(key)
            self._db.execute("UPDATE pipeline SET stopped = 0 WHERE pk = ?", pipeline.pk)
            # No ticks for the time that the pipeline was stopped.
            for cron in pipeline.spec.crons:
                self._db.execute("INSERT OR REPLACE INTO cron_tick VALUES (?, ?, ?)", pipeline.pk, cron.name, time.time())
            self._connect(pipeline.spec, new_id())

    def rerun(self, key: PipelineKey, *, reprocess: bool) -> None:
        """Create a new version with the same spec, as `create` does."""
        old = self.get(key)
        self.create(EffectiveSpec(old.effective_json, old.filled_json), old.user_json, update=True, reprocess=reprocess)

    def delete(self, key: PipelineKey, *, force: bool, keep_repo: bool, must_exist: bool) -> None:
        with self._db.transaction():
            pipeline = self.find(key)
            if pipeline is None:
                if must_exist:
                    raise NotFound(f'pipeline "{key}" not found')
                return
            spec = pipeline.spec
            downstream = self._downstream(key, spec)
            if downstream and not force and not keep_repo:
                raise PachError(f"cannot delete pipeline {key}: pipelines {', '.join(map(str, downstream))} depend on it")
            self._jobs.kill_all(pipeline.pk, "pipeline has been deleted")
            self._disconnect(spec)
            self._db.execute("DELETE FROM pipeline WHERE pk = ?", pipeline.pk)
            gone = [spec.meta.repo, spec.spec_branch.repo]
            gone += [] if keep_repo else [spec.repo, *(cron.repo for cron in spec.crons)]
            for repo in gone:
                self._pfs.delete_repo(repo, force=True)
        self._pfs.store.gate.garbage.set()
        self._pfs.store.logs.delete_pipeline(key.project, key.name)

    def _downstream(self, key: PipelineKey, spec: PipelineSpec) -> list[PipelineKey]:
        others = [one for one in self.pipelines() if one.key != key]
        return [one.key for one in others if any(leaf.repo == spec.repo for leaf in one.spec.leaves())]

    # Cron

    def with_crons(self) -> list[Pipeline]:
        """The pipelines that may tick."""
        rows = self._db.rows(f"{_SELECT_PIPELINE} WHERE v.version = p.version AND p.stopped = 0 AND v.effective_json LIKE '%\"cron\"%'")
        return [pipeline_of(row) for row in rows]

    def last_tick(self, pipeline: Pipeline, cron: CronInput) -> float:
        """The scheduled time of the last tick, or when the schedule began."""
        last = self._db.value("SELECT last FROM cron_tick WHERE pipeline = ? AND input = ?", pipeline.pk, cron.name)
        return max(float(last or 0), cron.start)

    def run_cron(self, key: PipelineKey) -> None:
        """Tick all cron inputs of a pipeline now, independently of their schedules."""
        pipeline = self.get(key)
        if not pipeline.spec.crons:
            raise PachError(f"pipeline {key} doesn't have a cron input")
        for cron in pipeline.spec.crons:
            self.tick(pipeline, cron, None, schedule.file_name(time.time()))

    def tick(self, pipeline: Pipeline, cron: CronInput, when: float | None, file_name: str) -> None:
        """Write the file of a tick into the cron repo, which starts a job. ``when`` is its scheduled time, if any."""
        writer = self._pfs.store.filesets.writer()
        if cron.overwrite:
            writer.delete("/", "default")
        writer.add(f"/{file_name}", "default", b"")
        with self._pfs.store.gate.writing(), self._db.transaction():
            fileset = writer.close(None)
            self._pfs.add_fileset(CommitRef(cron.repo, branch="master"), fileset, owned=True)
            if when is not None:
                self._db.execute("INSERT OR REPLACE INTO cron_tick VALUES (?, ?, ?)", pipeline.pk, cron.name, when)
