"""The replies of a real Pachyderm 2.12.2 about a few small pipelines, compared with those of the pachd under test.

They are in ``pachd_golden.json``. Ids, times and the like are ``*`` there: only whether they are set is compared.
"""

import json
import re
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import betterproto
import grpc
import pytest
from pachyderm_sdk.api import pfs, pps

from qa_platform_tests.pachd_helpers import FAILURE, IMAGE, SUCCESS, Pachd, eventually, needs_workers

pytestmark = needs_workers
GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("pachd_golden.json").read_text())
# What differs from run to run, or is the test's own.
VARYING = {
    "cmd", "commit", "committed", "created", "created_at", "created_by", "download_time", "finished", "finishing", "hash",
    "id", "image", "image_id", "process_time", "restart", "salt", "started", "stdin", "updated_at", "upload_time",
    "worker_id", "workers_started_at",
}  # fmt: skip
# Lines about processes that only a real worker prints, and the ends of others.
ONLY_REAL = re.compile(r"^(warning: unable to get stats|note: about to kill)")
BATCH = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from pachyderm_sdk import Client

    print("started", flush=True)
    out = Path(os.environ.get("QA_PFS_ROOT", "/pfs"), "out")
    worker = Client().worker
    error = ""
    while True:
        env = dict(pair.split("=", 1) for pair in worker.next_datum(error=error).env if "=" in pair)
        source = Path(env["gin"])
        print("at", source.name, flush=True)
        error = '{"v": 1, "blameless": false, "cause": "b is bad"}' if source.name == "b" else ""
        if source.name == "c":
            sys.exit(9)
        if not error:
            (out / source.name).write_text("six b\\n")
    """
)
PLAIN = [
    "echo at $(basename $gin)",
    "case $gin in */b) echo bad; exit 3;; esac",
    "cp -r $gin ${QA_PFS_ROOT:-/pfs}/out/",
]


def comparable(value: Any) -> Any:
    """JSON without what varies and without durations of nothing; the specs in texts are read."""
    if isinstance(value, list):
        return [comparable(part) for part in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, part in value.items():
        if key.endswith("_spec_json"):
            found[key] = comparable(json.loads(part))
        elif key in VARYING and not isinstance(part, dict):
            found.update({} if part == "0s" else {key: "*"})
        else:
            found[key] = comparable(part)
    return found


class Told:
    """What the pachd under test says of one pipeline, in the words of the golden data."""

    def __init__(self, pachd: Pachd, name: str) -> None:
        self._pachd = pachd
        self._name = name
        self.paths: dict[str, str] = {}

    def of(self, message: betterproto.Message) -> Any:
        text = json.dumps(message.to_dict(casing=betterproto.Casing.SNAKE))  # type: ignore[arg-type]
        return comparable(json.loads(self.plain(text)))

    def plain(self, text: str) -> str:
        """The text with the golden names, and the paths of datums for their ids."""
        for made in ("gin", "gsec", self._name):
            text = text.replace(self._pachd.name(made), made)
        for datum, path in self.paths.items():
            text = text.replace(datum, path)
        return text

    def job(self, job: str) -> pps.JobInfo:
        return self._pachd.client.pps.inspect_job(job=pps.Job(pipeline=self.named, id=job), details=True)

    @property
    def named(self) -> pps.Pipeline:
        return pps.Pipeline(name=self._pachd.name(self._name))

    def pipeline(self) -> pps.PipelineInfo:
        return self._pachd.client.pps.inspect_pipeline(pipeline=self.named, details=True)

    def datums(self, job: str) -> list[Any]:
        """Sorted by path: the ids have the repo's name in them, which is the test's own."""
        found = self._pachd.datums(self.named.name, job)
        self.paths |= {info.datum.id: path for path, info in found.items()}
        return [self.of(found[path]) for path in sorted(found)]

    def commit(self, job: str) -> Any:
        [info] = [info for info in self._pachd.client.pfs.list_commit(repo=pfs.Repo(name=self.named.name)) if info.commit.id == job]
        told = self.of(info)
        told["direct_provenance"].sort(key=json.dumps)
        return {key: value for key, value in told.items() if key != "details"}

    def meta_paths(self, job: str) -> list[str]:
        return sorted(self.plain(path) for path in self._pachd.paths(pfs.Repo(name=self.named.name, type="meta"), job))

    def meta_files(self, job: str) -> list[Any]:
        repo = pfs.Repo(name=self.named.name, type="meta")
        texts = [self._pachd.read(repo, job, f"/meta/{datum}/meta").decode() for datum in sorted(self.paths, key=self.paths.__getitem__)]
        return [comparable(snake_keys(json.loads(self.plain(text)))) for text in texts]

    def logs(self, job: str, number: int) -> list[Any]:
        """A job's lines, as soon as there are so many: Loki has them late."""
        found: list[Any] = []

        def look() -> bool:
            lines = self._pachd.client.pps.get_logs(job=pps.Job(pipeline=self.named, id=job))
            found[:] = log_lines(json.loads(self.plain(json.dumps([log_line(line) for line in lines]))))
            return len(found) >= number

        with suppress(AssertionError):
            eventually(look)
        return found


def snake_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [snake_keys(part) for part in value]
    if isinstance(value, dict):
        return {re.sub("[A-Z]", lambda found: f"_{found[0].lower()}", key): snake_keys(part) for key, part in value.items()}
    return value


def log_line(line: pps.LogMessage) -> dict[str, Any]:
    return {"datum": line.datum_id, "paths": [one.path for one in line.data], "user": line.user, "message": line.message}


def log_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without lines that only a real worker prints, and without how long things took."""
    found = [{**line, "message": re.sub(r"after [^:\n]*", "after *", line["message"].split("\n")[0])} for line in lines]
    return [line for line in found if not ONLY_REAL.match(line["message"])]


def make_input(pachd: Pachd) -> pfs.Repo:
    repo = pachd.repo("gin")
    pachd.put(repo, {f"/{name}": f"{name}\n".encode() for name in "abcd"})
    return repo


def make(pachd: Pachd, name: str, repo: pfs.Repo, transform: dict[str, Any], **more: Any) -> str:
    """A new pipeline as it stands in the golden data; the id of its first job."""
    source = {"pfs": {"name": "gin", "repo": repo.name, "glob": "/*"}}
    pipeline = {"name": pachd.name(name), "project": {"name": "default"}}
    pachd.create({"pipeline": pipeline, "transform": {"image": IMAGE, **transform}, "input": source, **more})
    [job] = pachd.jobs(pachd.name(name))
    return str(job.job.id)


def test_a_batching_pipeline_with_a_bad_and_a_dying_datum(pachd: Pachd) -> None:
    transform = {"cmd": ["python", "-u", "-c", BATCH], "datum_batching": True}
    job = make(pachd, "gbatch", make_input(pachd), transform, datum_set_spec={"number": 10}, datum_tries=2)
    told, golden = Told(pachd, "gbatch"), GOLDEN["gbatch"]
    assert pachd.wait(pachd.name("gbatch"), job).state == FAILURE
    assert told.datums(job) == golden["datums"]
    assert told.of(told.job(job)) == golden["job"]
    assert told.of(told.pipeline()) == golden["pipeline"]
    assert told.commit(job) == golden["commit"]
    assert told.meta_paths(job) == golden["meta_paths"]
    assert told.meta_files(job) == golden["meta_files"]
    assert told.logs(job, len(golden["logs"])) == golden["logs"]
    assert pachd.paths(pachd.name("gbatch"), job) == golden["out"]


def test_a_plain_pipeline_with_a_bad_datum_and_its_next_two_jobs(pachd: Pachd) -> None:
    repo = make_input(pachd)
    name = pachd.name("gplain")
    first = make(pachd, "gplain", repo, {"cmd": ["sh"], "stdin": PLAIN}, datum_tries=2)
    told, golden = Told(pachd, "gplain"), GOLDEN["gplain"]
    assert pachd.wait(name, first).state == FAILURE
    assert told.datums(first) == golden["datums"]
    assert told.of(told.job(first)) == golden["job"]
    assert told.of(told.pipeline()) == golden["pipeline"]
    assert told.commit(first) == golden["commit"]
    assert told.meta_paths(first) == golden["meta_paths"]
    assert told.meta_files(first) == golden["meta_files"]
    assert told.logs(first, len(golden["logs"])) == golden["logs"]
    assert pachd.paths(name, first) == golden["out"]
    second = pachd.put(repo, {}, delete=["/b", "/c"])
    assert pachd.wait(name, second).state == SUCCESS
    assert told.datums(second) == golden["second_datums"]
    third = pachd.put(repo, {"/b": b"b\n", "/e": b"e\n"})
    assert pachd.wait(name, third).state == FAILURE
    assert told.datums(third) == golden["third_datums"]
    owners = {path: info.datum.job.id for path, info in pachd.datums(name, third).items()}
    assert owners == {"/a": second, "/b": third, "/d": second, "/e": third}
    assert told.of(told.job(third)) == golden["third_job"]
    assert pachd.paths(name, third) == golden["third_out"]


@pytest.mark.slow
def test_a_batching_program_that_does_not_start(pachd: Pachd) -> None:
    repo = make_input(pachd)
    transform = {"cmd": ["python", "-c", "import nothing_here"], "datum_batching": True}
    first = make(pachd, "gnostart", repo, transform)
    told, golden = Told(pachd, "gnostart"), GOLDEN["gnostart"]
    second = pachd.put(repo, {"/e": b"e\n"})
    eventually(lambda: told.job(first).restart >= 3)
    assert told.of(told.job(first)) == golden["job"]
    assert told.of(told.job(second)) == golden["next_job"]
    assert told.of(told.pipeline()) == golden["pipeline"]


def test_a_plain_program_that_does_not_exist(pachd: Pachd) -> None:
    job = make(pachd, "gnocmd", make_input(pachd), {"cmd": ["no-such-program"]}, datum_tries=1)
    told, golden = Told(pachd, "gnocmd"), GOLDEN["gnocmd"]
    assert pachd.wait(pachd.name("gnocmd"), job).state == FAILURE
    assert {info["state"] for info in told.datums(job)} == {"FAILED"}
    assert told.of(told.job(job)) == golden["job"]
    assert told.of(told.pipeline()) == golden["pipeline"]


def test_a_secret_that_is_gone_when_the_pod_starts(pachd: Pachd) -> None:
    repo, secret = make_input(pachd), pachd.name("gsec")
    pachd.client.pps.create_secret(name=secret, data={"k": "v"})
    uses = [{"name": secret, "key": "k", "env_var": "K"}]
    first = make(pachd, "gnosecret", repo, {"cmd": ["true"], "secrets": uses}, autoscaling=True)
    told, golden = Told(pachd, "gnosecret"), GOLDEN["gnosecret"]
    assert pachd.wait(pachd.name("gnosecret"), first).state == SUCCESS
    eventually(lambda: told.pipeline().state == pps.PipelineState.PIPELINE_STANDBY)
    pachd.client.pps.delete_secret(secret=pps.Secret(name=secret))
    second = pachd.put(repo, {"/e": b"e\n"})
    eventually(lambda: told.pipeline().state == pps.PipelineState.PIPELINE_CRASHING)
    info = told.pipeline()
    assert info.reason.startswith('CreateContainerConfigError: secret "')
    assert secret in info.reason
    info.reason = "*"
    assert told.of(info) == golden["pipeline"]
    assert told.of(told.job(second)) == golden["waiting_job"]
    assert told.of(told.job(first)) == golden["job"]
    with pytest.raises(grpc.RpcError):
        pachd.client.pps.inspect_secret(secret=pps.Secret(name=secret))
    pachd.client.pps.create_secret(name=secret, data={"k": "v"})
    assert pachd.wait(pachd.name("gnosecret"), second).state == SUCCESS
