"""The rollout of a version on Kubernetes: the chart `deploy/kubernetes/rollout` with its values, and its job on real services."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from qa_platform.cli.pachyderm import apply_command
from qa_platform.clients.pachyderm import job_of, session
from qa_platform.contract import ANSWER_PIPELINE, LOAD_PIPELINE
from qa_platform.settings import PachydermSettings
from qa_platform_tests.conftest import Database
from qa_platform_tests.kubernetes_types import problems

PROJECT = Path(__file__).parents[1]
VALUES_FILE = PROJECT / "deploy" / "kubernetes" / "values.yaml"
VALUES: dict[str, Any] = yaml.safe_load(VALUES_FILE.read_text())
DEPLOYMENT: dict[str, Any] = VALUES["dagster-user-deployments"]["deployments"][0]
REPOSITORY, TAG = DEPLOYMENT["image"]["repository"], DEPLOYMENT["image"]["tag"]

# As Dagster's chart writes it, so that a number stays as it is.
_TAG = '{{ .image.tag | toYaml | trimAll `"` }}'


@cache
def rollout() -> dict[str, Any]:
    """What the chart `rollout` makes of the values, by kind."""
    template = (VALUES_FILE.parent / "rollout" / "templates" / "manifests.yaml").read_text()
    assert template.endswith("{{- range .Values.rollout }}\n---\n{{ tpl (toYaml .) $ }}\n{{- end }}\n")
    text = yaml.safe_dump(VALUES["rollout"], width=1000)
    around = '{{ with index .Values "dagster-user-deployments" "deployments" 0 }}%s{{ end }}'
    for used, value in (
        (f"{{{{ .image.repository }}}}:{_TAG}", f"{REPOSITORY}:{TAG}"),
        ("{{ dir .image.repository }}", REPOSITORY.rpartition("/")[0]),
        (_TAG, TAG),
    ):
        text = text.replace(around % used, value)
    assert "{{" not in text
    return {document["kind"]: document for document in yaml.safe_load(text)}


def test_the_rollout_is_a_hook_that_kubernetes_takes() -> None:
    job, patch = rollout()["Job"], rollout()["ConfigMap"]
    assert list(problems(job, "V1Job")) == []
    assert list(problems(patch, "V1ConfigMap")) == []
    hooks = [document["metadata"]["annotations"] for document in (patch, job)]
    assert {hook["helm.sh/hook"] for hook in hooks} == {"pre-install,pre-upgrade"}
    assert {hook["helm.sh/hook-delete-policy"] for hook in hooks} == {"before-hook-creation"}
    # The patch is there before the job that reads it.
    assert int(hooks[0]["helm.sh/hook-weight"]) < int(hooks[1].get("helm.sh/hook-weight", "0"))


def test_the_rollout_is_of_the_code_locations_image_variables_and_rights() -> None:
    spec = rollout()["Job"]["spec"]
    pod = spec["template"]["spec"]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["image"] == f"{REPOSITORY}:{TAG}"
        assert container["env"] == DEPLOYMENT["env"]
        assert container["securityContext"] == DEPLOYMENT["securityContext"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert all(mount in DEPLOYMENT["volumeMounts"] for mount in container["volumeMounts"])
    assert all(volume in DEPLOYMENT["volumes"] for volume in pod["volumes"])
    assert pod["securityContext"] == DEPLOYMENT["podSecurityContext"]
    # A failure is shown at once, and is that of `helm upgrade`.
    assert (pod["restartPolicy"], spec["backoffLimit"]) == ("Never", 0)
    minutes = next(option.default for option in apply_command.params if option.name == "wait_minutes")
    assert isinstance(minutes, (int, float))
    assert spec["activeDeadlineSeconds"] > 2 * 60 * minutes
    assert "--no-cron" in pod["containers"][0]["args"], "Dagster could not launch jobs"


def test_the_code_location_reads_the_patch_of_the_rollout() -> None:
    patch = rollout()["ConfigMap"]
    [volume] = [volume for volume in DEPLOYMENT["volumes"] if volume["name"] == "pipelines"]
    assert volume["configMap"]["name"] == patch["metadata"]["name"]
    [mount] = [mount for mount in DEPLOYMENT["volumeMounts"] if mount["name"] == "pipelines"]
    [key] = patch["data"]
    assert {entry["name"]: entry.get("value") for entry in DEPLOYMENT["env"]}["QA_PIPELINES_PATCH"] == f"{mount['mountPath']}/{key}"
    assert json.loads(patch["data"][key]) == json.loads((PROJECT / "deploy" / "pipelines.json").read_text())


def test_the_rollouts_commands_prepare_the_services_and_fail_where_they_cannot(
    database: Database, clean_pachyderm: PachydermSettings, tmp_path: Path
) -> None:
    pod = rollout()["Job"]["spec"]["template"]["spec"]
    patch = tmp_path / "pipelines.json"
    patch.write_text(rollout()["ConfigMap"]["data"]["pipelines.json"])
    variables = {**database.environment, "PACHD_ADDRESS": clean_pachyderm.pachd_address, "QA_PIPELINES_PATCH": str(patch)}

    def run(container: dict[str, Any]) -> int:
        program, *arguments = container["args"]
        assert program == "qa-platform"
        return subprocess.run(
            [sys.executable, "-m", "qa_platform.cli.main", *arguments], env=variables, cwd=PROJECT, timeout=120
        ).returncode

    [tables], [pipelines] = pod["initContainers"], pod["containers"]
    assert [run(tables), run(pipelines)] == [0, 0]
    with session(clean_pachyderm, "looking") as client:
        images = [
            client.pps.inspect_pipeline(pipeline=job_of(name, "").pipeline, details=True).details.transform.image
            for name in (ANSWER_PIPELINE, LOAD_PIPELINE)
        ]
    registry = REPOSITORY.rpartition("/")[0]
    assert images == [f"{registry}/qa-platform-question-answer:{TAG}", f"{registry}/qa-platform-push-answers-to-sql:{TAG}"]
    patch.write_text(json.dumps({"question_answer": {"input": None}}))
    assert run(pipelines) == 1
