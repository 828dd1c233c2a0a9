"""Workers and patches of the pipelines: what a deployment may change, and what is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qa_platform.cli.doctor.pachyderm import PART
from qa_platform.cli.main import main
from qa_platform.clients.pachyderm import session
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE
from qa_platform.errors import InputError
from qa_platform.provisioning.merge_patch import merge_patch
from qa_platform.provisioning.pipelines import Options, apply, find_pipeline, specifications
from qa_platform.provisioning.project_files import project_file
from qa_platform.settings import BucketSettings, PachydermSettings, PostgresSettings
from qa_platform_tests.kubernetes_types import problems

SPECS = ("question_answer/pipeline.json", "question_answer/pipeline_cron.json", "push_answers_to_sql/pipeline.json")
SIZED = {
    "resource_requests": {"cpu": 4, "memory": "8Gi"},
    "resource_limits": {"cpu": 4, "memory": "8Gi", "gpu": {"type": "nvidia.com/gpu", "number": 1}},
    "scheduling_spec": {"node_selector": {"pool": "answers"}},
    "tolerations": [{"key": "answers", "operator": "EXISTS", "effect": "NO_SCHEDULE"}],
    "transform": {"image_pull_secrets": ["registry"], "user": "10001", "env": {"QA_THREADS": "4"}},
    "datum_set_spec": {"size_bytes": 1048576},
    "datum_timeout": None,
}


def patch_file(folder: Path, document: Any) -> Path:
    file = folder / "patch.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def wanted(**options: Any) -> dict[str, dict[str, Any]]:
    return dict(specifications(Options(**options), PostgresSettings(), bucket=BucketSettings()))


@pytest.mark.parametrize(
    ("target", "patch", "merged"),
    # From the appendix of RFC 7396.
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_patch_is_merged_as_its_rfc_says(target: Any, patch: Any, merged: Any) -> None:
    assert merge_patch(target, patch) == merged


def test_workers_are_set_for_the_answering_pipeline_and_win_over_the_patch(tmp_path: Path) -> None:
    patch = patch_file(tmp_path, {ANSWER_PIPELINE: {"parallelism_spec": {"constant": 3}}})
    plain, sized = wanted(), wanted(workers=8, patch=patch)
    assert wanted(patch=patch)[ANSWER_PIPELINE]["parallelism_spec"] == {"constant": 3}
    assert sized[ANSWER_PIPELINE]["parallelism_spec"] == {"constant": 8}
    assert sized[LOAD_PIPELINE] == plain[LOAD_PIPELINE]


def test_the_cron_variant_takes_another_interval_from_the_patch(tmp_path: Path) -> None:
    patch = patch_file(tmp_path, {ANSWER_PIPELINE: {"input": {"cron": {"spec": "@every 300s"}}}})
    plain, changed = wanted(cron=True), wanted(cron=True, patch=patch)
    assert changed[ANSWER_PIPELINE]["input"] == {"cron": {**plain[ANSWER_PIPELINE]["input"]["cron"], "spec": "@every 300s"}}


def test_sizes_are_kept_compared_and_shown(clean_pachyderm: PachydermSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACHD_ADDRESS", clean_pachyderm.pachd_address)
    monkeypatch.setenv("QA_PIPELINES_WORKERS", "2")
    monkeypatch.setenv("QA_PIPELINES_PATCH", str(patch_file(tmp_path, {ANSWER_PIPELINE: SIZED})))

    def applied(*options: str) -> str:
        done = CliRunner().invoke(main, ["pachyderm", "apply", *options])
        assert done.exit_code == 0, done.output
        return done.output

    def doctor() -> str:
        return dict(zip(PART.names, PART.examine(), strict=True))[f"pipeline {ANSWER_PIPELINE}"].detail

    applied()
    assert f"pipeline {ANSWER_PIPELINE}: unchanged" in applied("--now")
    with session(clean_pachyderm, "looking") as client:
        info = find_pipeline(client, ANSWER_PIPELINE)
        assert info
        details = info.details
        assert (details.parallelism_spec.constant, details.resource_limits.memory, details.resource_limits.gpu.number) == (2, "8Gi", 1)
        assert (details.transform.user, details.transform.image_pull_secrets) == ("10001", ["registry"])
        assert details.tolerations[0].key == "answers"
    assert "specification" not in doctor()
    monkeypatch.setenv("QA_PIPELINES_WORKERS", "5")
    assert '+ "constant": 5' in doctor()
    shown = applied("--dry-run", "--workers", "7")
    assert '"constant": 7' in shown
    assert "would be updated" in shown


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ("{", "it is not valid JSON"),
        ("[]", "it is not a JSON object"),
        ({"other": {}}, "there is no pipeline other"),
        ({ANSWER_PIPELINE: 1}, "the patch of question_answer is not a JSON object"),
        ({ANSWER_PIPELINE: {"input": {"pfs": {"glob": "/"}}}}, "it changes input.pfs, which the platform relies on"),
        ({ANSWER_PIPELINE: {"input": {"cron": {"name": "x"}}}}, "it changes input.cron.name, which the platform relies on"),
        ({ANSWER_PIPELINE: {"input": {"cron": None}}}, "it changes input.cron, which the platform relies on"),
        ({ANSWER_PIPELINE: {"transform": {"cmd": ["sh"]}}}, "it changes transform.cmd,"),
        ({ANSWER_PIPELINE: {"transform": {"datum_batching": False}}}, "it changes transform.datum_batching,"),
        ({ANSWER_PIPELINE: {"transform": None}}, "it changes transform,"),
        ({LOAD_PIPELINE: {"transform": {"secrets": []}}}, "it changes transform.secrets,"),
        ({LOAD_PIPELINE: {"transform": {"env": {"PG_PORT": "1"}}}}, "it changes transform.env.PG_PORT,"),
        ({LOAD_PIPELINE: {"transform": {"env": None}}}, "it changes transform.env,"),
        ({LOAD_PIPELINE: {"transform": {"env": {"pg_host": "x"}}}}, "it changes transform.env.pg_host,"),
        ({ANSWER_PIPELINE: {"transform": {"env": {"QA_THREADS": 4}}}}, "transform.env must be an object with string values"),
        ({ANSWER_PIPELINE: {"parallelism_spec": {"constant": -1}}}, "parallelism_spec.constant must be a whole number"),
        ({ANSWER_PIPELINE: {"reprocess": True}}, "it changes reprocess,"),
        ({ANSWER_PIPELINE: {"resourceLimits": {}}}, "have no resourceLimits"),
        ({ANSWER_PIPELINE: {"transform": {"usr": "1"}}}, "have no transform.usr"),
        ({ANSWER_PIPELINE: {"resource_limits": {"cpus": 1}}}, "have no resource_limits.cpus"),
        ({ANSWER_PIPELINE: {"resource_limits": {"cpu": "500m"}}}, "resource_limits.cpu must be a number"),
        ({ANSWER_PIPELINE: {"resource_limits": {"memory": "2GB"}}}, "resource_limits.memory is '2GB', which Pachyderm cannot read"),
        ({ANSWER_PIPELINE: {"resource_limits": {"gpu": {"number": 0.5}}}}, "resource_limits.gpu.number must be a whole number"),
        ({ANSWER_PIPELINE: {"resource_limits": []}}, "resource_limits must be an object"),
        ({ANSWER_PIPELINE: {"tolerations": {}}}, "tolerations must be a list"),
        ({ANSWER_PIPELINE: {"tolerations": [{"operator": "Exists"}]}}, "tolerations[0].operator must be one of"),
        ({ANSWER_PIPELINE: {"scheduling_spec": {"node_selector": {"a": 1}}}}, "node_selector must be an object with string values"),
        ({ANSWER_PIPELINE: {"transform": {"user": "root"}}}, "transform.user is 'root'"),
        ({ANSWER_PIPELINE: {"datum_timeout": 60}}, "datum_timeout must be a time in seconds"),
        ({ANSWER_PIPELINE: {"autoscaling": "no"}}, "autoscaling must be true or false"),
        ({ANSWER_PIPELINE: {"pod_spec": "["}}, "pod_spec is not valid JSON"),
        ({ANSWER_PIPELINE: {"pod_spec": "[]"}}, "pod_spec is not a JSON object"),
        ({ANSWER_PIPELINE: {"pod_spec": '{"containers": []}'}}, "pod_spec changes containers,"),
        (
            {ANSWER_PIPELINE: {"pod_patch": '[{"op": "replace", "path": "/containers/0/command"}]'}},
            "pod_patch changes /containers/0/command,",
        ),
        ({LOAD_PIPELINE: {"pod_patch": '[{"op": "remove", "path": "/volumes/0"}]'}}, "pod_patch changes /volumes/0,"),
        ({LOAD_PIPELINE: {"pod_patch": '[{"op": "move", "from": "/containers/0/volumeMounts", "path": "/x"}]'}}, "volumeMounts,"),
    ],
)
def test_a_patch_that_cannot_be_used_is_refused_with_its_place_and_advice(document: Any, problem: str, tmp_path: Path) -> None:
    file = patch_file(tmp_path, document)
    # Nothing is asked of pachd before.
    with pytest.raises(InputError) as refused:
        apply(PachydermSettings(pachd_address="grpc://127.0.0.1:1"), PostgresSettings(), BucketSettings(), Options(patch=file))
    assert problem in refused.value.what
    assert str(file) in refused.value.where
    assert refused.value.advice


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file") as refused:
        wanted(patch=tmp_path / "nothing.json")
    assert "QA_PIPELINES_PATCH" in refused.value.advice


def test_a_pod_patch_may_add_to_the_pod(tmp_path: Path) -> None:
    operations = [
        {"op": "add", "path": "/volumes/-", "value": {"name": "cache", "emptyDir": {}}},
        {"op": "add", "path": "/containers/0/volumeMounts/-", "value": {"name": "cache", "mountPath": "/cache"}},
        {"op": "add", "path": "/containers/0/resources/limits/ephemeral-storage", "value": "1Gi"},
    ]
    patch = {"pod_patch": json.dumps(operations), "pod_spec": '{"priorityClassName": "batch"}'}
    spec = wanted(patch=patch_file(tmp_path, {LOAD_PIPELINE: patch}))[LOAD_PIPELINE]
    assert spec["pod_spec"] == patch["pod_spec"]
    assert json.loads(wanted(patch=patch_file(tmp_path, {LOAD_PIPELINE: {"pod_patch": "null"}}))[LOAD_PIPELINE]["pod_patch"])
    # Behind the platform's own, which take the program's rights away.
    assert json.loads(spec["pod_patch"]) == [*json.loads(wanted()[LOAD_PIPELINE]["pod_patch"]), *operations]


def test_the_patches_of_the_page_are_accepted(tmp_path: Path) -> None:
    page = (project_file("pachyderm").parent / "docs" / "deploying.md").read_text()
    patches: list[Any] = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", page, re.DOTALL | re.MULTILINE)]
    [gpu] = [patch for patch in patches if "QA_DEVICE" in str(patch)]
    for patch in patches:
        spec = wanted(patch=patch_file(tmp_path, patch))[ANSWER_PIPELINE]
        assert spec.items() >= {name: value for name, value in patch[ANSWER_PIPELINE].items() if name != "transform"}.items()
    assert gpu[ANSWER_PIPELINE]["resource_limits"]["gpu"] == {"type": "nvidia.com/gpu", "number": 1}


# --- As they ship ---


@pytest.mark.parametrize("file", SPECS)
def test_the_workers_have_a_size_and_no_more_rights_than_they_need(file: str) -> None:
    spec = json.loads((project_file("pachyderm") / file).read_text())
    assert spec["resource_requests"].keys() == {"cpu", "memory"}
    # No limit of the processor: the engine would then use no more threads than that, on an idle node too.
    assert spec["resource_limits"].keys() == {"memory"}
    # Pachyderm runs the pod as a user that is not root, and with RuntimeDefault, only for a user by number.
    assert spec["transform"]["user"] == "10001"
    [operation] = json.loads(spec["pod_patch"])
    assert (operation["op"], operation["path"]) == ("add", "/containers/0/securityContext")
    context = operation["value"]
    assert list(problems(context, "V1SecurityContext")) == []
    # The restricted pod security standard. It does not accept Pachyderm's own `all`, in lower case.
    assert context == {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


@pytest.mark.parametrize("folder", ["question_answer", "push_answers_to_sql"])
def test_the_workers_user_is_that_of_their_image(folder: str) -> None:
    text = (project_file("pachyderm") / folder / "Dockerfile").read_text()
    assert "useradd --create-home --uid 10001 " in text
    assert "\nUSER 10001\n" in text


@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        # "guess uid from transform user by reading /etc/passwd: user 20001 not found": the worker ends before it serves.
        ({"transform": {"user": "20001"}}, "transform.user is '20001', which the images do not have"),
        # Pachyderm's worker divides by per_worker.
        ({"datum_set_spec": {"size_bytes": None}}, "datum_set_spec has no number, size_bytes or per_worker"),
        ({"datum_set_spec": {"size_bytes": 0}}, "datum_set_spec has no number, size_bytes or per_worker"),
    ],
)
def test_what_crashes_pachyderms_own_worker_is_refused(tmp_path: Path, patch: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        wanted(patch=patch_file(tmp_path, {ANSWER_PIPELINE: patch}))


@pytest.mark.parametrize(
    "patch", [{"datum_set_spec": None}, {"datum_set_spec": {"size_bytes": None, "per_worker": 4}}, {"transform": {"user": None}}]
)
def test_what_does_not_is_accepted(tmp_path: Path, patch: dict[str, Any]) -> None:
    assert wanted(patch=patch_file(tmp_path, {ANSWER_PIPELINE: patch}))
