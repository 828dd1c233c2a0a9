"""The deployment files are consistent with the platform: chart values, compose file, images, workflows.

The Kubernetes job of a run is the one that Dagster's run launcher sends to the API, configured by exactly the values in
`deploy/kubernetes/`.
"""

import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg
import pytest
import yaml  # type: ignore[import-untyped]
from dagster._cli import create_dagster_cli
from dagster._config import validate_config
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.instance.config import dagster_instance_config
from dagster._core.launcher import LaunchRunContext
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster_gcp.gcs.compute_log_manager import GCSComputeLogManager
from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import UserDefinedDagsterK8sConfig
from dagster_k8s.launcher import K8sRunLauncher
from google.cloud import storage
from packaging.requirements import Requirement

from qa_platform.answering.model import _HUB_FILES
from qa_platform.cli.main import main as qa_platform_command
from qa_platform.definitions import defs as platform_definitions
from qa_platform.embedded.stack import Stack
from qa_platform.orchestration.jobs import executor
from qa_platform.settings import ExecutionSettings, ModelSettings
from qa_platform_tests.command_lines import parse_click
from qa_platform_tests.kubernetes_types import problems

PROJECT = Path(__file__).parents[1]
VALUES_FILE = PROJECT / "deploy" / "kubernetes" / "values.yaml"
VALUES: dict[str, Any] = yaml.safe_load(VALUES_FILE.read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((PROJECT / "deploy" / "compose.yaml").read_text())
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((PROJECT / ".github" / "workflows").glob("*.yaml"))}
DOCKERFILES = [PROJECT / "deploy" / "Dockerfile", *sorted((PROJECT / "pachyderm").glob("*/Dockerfile"))]
NAMESPACE, RELEASE = "dagster", "dagster"

# What the chart's documentation lists, as far as it is of use here, and the type of the Kubernetes API behind it.
POD = {
    "env": "list[V1EnvVar]",
    "resources": "V1ResourceRequirements",
    "podSecurityContext": "V1PodSecurityContext",
    "securityContext": "V1SecurityContext",
    "volumes": "list[V1Volume]",
    "volumeMounts": "list[V1VolumeMount]",
}
IMAGE = {"repository": "str", "tag": "str", "pullPolicy": "str"}
PROBE = {"readinessProbe": "V1Probe", "livenessProbe": "V1Probe"}
LAUNCHER = {
    "imagePullPolicy": "str",
    "envConfigMaps": "list[V1ConfigMapEnvSource]",
    "envSecrets": "list[V1SecretEnvSource]",
    "resources": "V1ResourceRequirements",
    "securityContext": "V1SecurityContext",
    "volumes": "list[V1Volume]",
    "volumeMounts": "list[V1VolumeMount]",
    "labels": "dict[str, str]",
}
RUN_CONFIG = {
    "containerConfig": "V1Container",
    "podSpecConfig": "V1PodSpec",
    "podTemplateSpecMetadata": "V1ObjectMeta",
    "jobSpecConfig": "V1JobSpec",
    "jobMetadata": "V1ObjectMeta",
}
# These are given in part; the launcher adds what Kubernetes requires.
REQUIRED_BY_KUBERNETES: dict[str, dict[str, Any]] = {
    "containerConfig": {"name": "x"},
    "podSpecConfig": {"containers": []},
    "jobSpecConfig": {"template": {}},
}
CHART = {
    *("global", "generatePostgresqlPasswordSecret", "generateCeleryConfigSecret", "postgresql", "dagster-user-deployments", "runLauncher"),
    *("dagsterWebserver", "dagsterDaemon", "concurrency", "retention", "telemetry", "computeLogManager", "additionalInstanceConfig"),
    "imagePullSecrets",
    # Of the other chart that takes these values.
    "rollout",
}
DEPLOYMENT = {**POD, **PROBE, "name": "str", "port": "int", "dagsterApiGrpcArgs": "list[str]", "annotations": "dict(str, str)"}


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def snake_case(values: Mapping[str, Any]) -> dict[str, Any]:
    return {snake(key): value for key, value in values.items()}


def launcher_config() -> dict[str, Any]:
    """The run launcher's configuration that the chart makes of the values."""
    launcher = VALUES["runLauncher"]
    assert launcher["type"] == "K8sRunLauncher"
    values = dict(launcher["config"]["k8sRunLauncher"])
    return {
        **snake_case({**values, "runK8sConfig": snake_case(values["runK8sConfig"])}),
        "job_namespace": NAMESPACE,
        "service_account_name": RELEASE,
        "instance_config_map": f"{RELEASE}-instance",
        "dagster_home": VALUES["global"]["dagsterHome"],
        "postgres_password_secret": VALUES["global"]["postgresqlSecretName"],
    }


def instance_config() -> dict[str, Any]:
    """The instance's configuration that the chart makes of the values."""
    postgres, logs = VALUES["postgresql"], VALUES["computeLogManager"]
    assert logs["type"] == "GCSComputeLogManager"
    storage = {
        "postgres_db": {
            "hostname": postgres["postgresqlHost"],
            "username": postgres["postgresqlUsername"],
            "password": {"env": "DAGSTER_PG_PASSWORD"},
            "db_name": postgres["postgresqlDatabase"],
            "port": postgres["service"]["port"],
            "params": postgres["postgresqlParams"],
        }
    }
    return {
        "run_storage": {"module": "dagster_postgres.run_storage", "class": "PostgresRunStorage", "config": storage},
        "event_log_storage": {"module": "dagster_postgres.event_log", "class": "PostgresEventLogStorage", "config": storage},
        "schedule_storage": {"module": "dagster_postgres.schedule_storage", "class": "PostgresScheduleStorage", "config": storage},
        "run_launcher": {"module": "dagster_k8s", "class": "K8sRunLauncher", "config": launcher_config()},
        "compute_logs": {
            "module": "dagster_gcp.gcs.compute_log_manager",
            "class": "GCSComputeLogManager",
            "config": snake_case(logs["config"]["gcsComputeLogManager"]),
        },
        "run_monitoring": snake_case(VALUES["dagsterDaemon"]["runMonitoring"]),
        "run_retries": snake_case(VALUES["dagsterDaemon"]["runRetries"]),
        "concurrency": {key: snake_case(value) for key, value in VALUES["concurrency"].items() if key != "enabled"},
        "retention": {key: snake_case(value) for key, value in VALUES["retention"].items() if key != "enabled"},
        "telemetry": VALUES["telemetry"],
        **VALUES["additionalInstanceConfig"],
    }


def image() -> str:
    [deployment] = VALUES["dagster-user-deployments"]["deployments"]
    return f"{deployment['image']['repository']}:{deployment['image']['tag']}"


class KubernetesApi(BaseHTTPRequestHandler):
    """Takes jobs, and keeps what was sent."""

    sent: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.sent.append((self.path, json.loads(body)))
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test says what is wrong."""


@pytest.fixture(scope="module")
def run_job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The Kubernetes job of a run, as the API gets it from Dagster's run launcher."""
    server = HTTPServer(("127.0.0.1", 0), KubernetesApi)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    access = tmp_path_factory.mktemp("kubernetes") / "config"
    access.write_text(
        yaml.safe_dump(
            {
                "current-context": "test",
                "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                "users": [{"name": "test", "user": {}}],
            }
        )
    )
    # How the API is reached is all that differs from a cluster.
    config = {**launcher_config(), "load_incluster_config": False, "kubeconfig_file": str(access)}
    overrides = {"run_launcher": {"module": "dagster_k8s", "class": "K8sRunLauncher", "config": config}}
    try:
        with dg.instance_for_test(overrides=overrides) as instance:
            assert isinstance(instance.run_launcher, K8sRunLauncher)
            repository = RepositoryPythonOrigin(
                executable_path="python",
                code_pointer=ModuleCodePointer("qa_platform.definitions", "defs", "/home/platform"),
                container_image=image(),
                entry_point=["dagster"],
                container_context={},
            )
            job_def = platform_definitions.resolve_job_def("answer_questions")
            run = instance.create_run_for_job(job_def, job_code_origin=JobPythonOrigin(job_def.name, repository))
            instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
    finally:
        server.shutdown()
        server.server_close()
    [(path, job)] = KubernetesApi.sent
    assert path == f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
    return job


@pytest.fixture
def run_container(run_job: dict[str, Any]) -> dict[str, Any]:
    [container] = run_job["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def test_the_job_of_a_run_is_one_that_kubernetes_takes(run_job: dict[str, Any]) -> None:
    assert list(problems(run_job, "V1Job")) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda pod: pod.update(serviceAcountName="x"), "V1PodSpec has no serviceAcountName"),
        (lambda pod: pod.pop("containers"), "`containers`, must not be `None`"),
        (lambda pod: pod.update(terminationGracePeriodSeconds="120"), "'120' is no int"),
        (lambda pod: pod["containers"][0]["env"].append({"value": "x"}), "`name`, must not be `None`"),
        (lambda pod: pod["containers"][0]["resources"]["limits"].update(memory=2), "2 is no str"),
    ],
)
def test_a_job_that_kubernetes_refuses_is_noticed(run_job: dict[str, Any], change: Any, problem: str) -> None:
    broken = json.loads(json.dumps(run_job))
    change(broken["spec"]["template"]["spec"])
    assert problem in "\n".join(problems(broken, "V1Job"))


def test_a_run_has_its_own_image_size_and_account(run_job: dict[str, Any], run_container: dict[str, Any]) -> None:
    pod = run_job["spec"]["template"]["spec"]
    assert run_container["image"] == image()
    assert run_container["args"][:3] == ["dagster", "api", "execute_run"]
    assert run_container["resources"] == VALUES["runLauncher"]["config"]["k8sRunLauncher"]["resources"]
    assert pod["serviceAccountName"] == RELEASE
    # Dagster's own retries know of attempts; Kubernetes' would not.
    assert (pod["restartPolicy"], run_job["spec"]["backoffLimit"]) == ("Never", 0)
    assert pod["terminationGracePeriodSeconds"] > 30


def test_a_run_has_no_more_rights_than_it_needs(run_job: dict[str, Any], run_container: dict[str, Any]) -> None:
    security = run_job["spec"]["template"]["spec"]["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] > 0
    assert run_container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert all(mount.get("readOnly") for mount in run_container["volumeMounts"] if mount["name"] == "gcsaccess")


def test_a_run_takes_its_secrets_from_where_they_are(run_job: dict[str, Any], run_container: dict[str, Any]) -> None:
    references = [entry["valueFrom"]["secretKeyRef"] for entry in run_container["env"] if "valueFrom" in entry]
    taken = {(reference["name"], reference["key"]) for reference in references}
    template = json.loads((PROJECT / "pachyderm" / "secrets" / "dbaccess.json").read_text())
    assert {key for name, key in taken if name == "dbaccess"} == set(template["stringData"])
    assert {(name, key) for name, key in taken if name != "dbaccess"} == {
        ("gcsaccess", "storage_bucket"),
        ("pachaccess", "token"),
        ("dagster-postgresql", "postgresql-password"),
    }
    volumes = run_job["spec"]["template"]["spec"]["volumes"]
    [key_file] = [f"{volume['secret']['secretName']}/{volume['secret']['items'][0]['path']}" for volume in volumes if "secret" in volume]
    assert key_file == "gcsaccess/credentials.json"
    assert _literals(run_container["env"])["GOOGLE_APPLICATION_CREDENTIALS"] == f"/var/run/{key_file}"
    # The certificates are where the TLS of libpq wants them, in whatever base64 the secret has.
    assert {"PG_SSLROOTCERT", "PG_SSLCLIENT_CERT", "PG_SSL_CLIENT_KEY"} <= {entry["name"] for entry in run_container["env"]}


def _literals(environment: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in environment if "value" in entry}


def test_the_code_location_starts_again_where_dagsters_database_moves() -> None:
    [deployment] = VALUES["dagster-user-deployments"]["deployments"]
    storage = {
        key.removeprefix("postgresql").lower(): VALUES["postgresql"][key] for key in VALUES["postgresql"] if key.startswith("postgresql")
    }
    annotations = {name.removeprefix("qa-platform/storage-"): value for name, value in deployment["annotations"].items()}
    assert annotations == {"host": storage["host"], "user": storage["username"], "database": storage["database"]}


def test_values_name_what_the_chart_and_kubernetes_know() -> None:
    [deployment] = VALUES["dagster-user-deployments"]["deployments"]
    webserver, daemon = VALUES["dagsterWebserver"], VALUES["dagsterDaemon"]
    launcher = VALUES["runLauncher"]["config"]["k8sRunLauncher"]
    found = [f"the chart has no {key}" for key in VALUES if key not in CHART]
    places: list[tuple[str, dict[str, Any], dict[str, str], set[str]]] = [
        ("code location", deployment, DEPLOYMENT, {"image", "includeConfigInLaunchedRuns"}),
        ("webserver", webserver, {**POD, **PROBE}, {"image", "service"}),
        ("daemon", daemon, POD, {"image", "runMonitoring", "runRetries"}),
        ("launcher", launcher, LAUNCHER, {"runK8sConfig"}),
        *((f"image of {name}", values["image"], IMAGE, set()) for name, values in (("webserver", webserver), ("daemon", daemon))),
    ]
    for place, values, types, others in places:
        found += [f"{place}: the chart has no {key}" for key in values if key not in types and key not in others]
        for key, kind in types.items():
            if key in values:
                found += problems(values[key], kind, f"{place}.{key}")
    for key, given in launcher["runK8sConfig"].items():
        found += problems({**REQUIRED_BY_KUBERNETES.get(key, {}), **given}, RUN_CONFIG[key], key)
    assert found == []


def test_values_and_dagster_yaml_say_the_same() -> None:
    project = yaml.safe_load((PROJECT / "dagster.yaml").read_text())
    rendered = instance_config()
    for kind in rendered["retention"].values():
        # The chart wants a word on ticks that never ended; Dagster keeps them unless told.
        kind["purge_after_days"] = {state: days for state, days in kind["purge_after_days"].items() if (state, days) != ("started", -1)}
    # What a deployment has of its own.
    for key in ("storage", "run_launcher"):
        del project[key]
    assert {key: value for key, value in rendered.items() if key in project} == project


def test_dagster_takes_the_instance_that_the_values_make(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(instance_config()))
    config, _ = dagster_instance_config(str(tmp_path))
    for section, component in (("run_launcher", K8sRunLauncher), ("compute_logs", GCSComputeLogManager)):
        checked = validate_config(dg.Shape(component.config_type()), config[section]["config"])
        assert checked.success, checked.errors


def test_the_code_location_has_the_charts_instance() -> None:
    [deployment] = VALUES["dagster-user-deployments"]["deployments"]
    [volume] = [volume for volume in deployment["volumes"] if volume["name"] == "dagster-instance"]
    assert volume["configMap"]["name"] == launcher_config()["instance_config_map"]
    [mount] = [mount for mount in deployment["volumeMounts"] if mount["name"] == volume["name"]]
    assert (mount["mountPath"], mount["subPath"]) == (f"{VALUES['global']['dagsterHome']}/dagster.yaml", "dagster.yaml")


def test_every_component_is_of_one_image() -> None:
    assert VALUES["dagsterWebserver"]["image"] == VALUES["dagsterDaemon"]["image"]
    assert VALUES["dagsterWebserver"]["image"] == VALUES["dagster-user-deployments"]["deployments"][0]["image"]
    assert {service["image"] for name, service in COMPOSE["services"].items() if name != "postgres"} == {COMPOSE["x-platform"]["image"]}


def executors(defs: dg.Definitions) -> list[str]:
    return [defs.resolve_job_def(name).executor_def.name for name in ("answer_questions", "answer_pending_files", "housekeeping")]


def test_steps_work_in_their_runs_process_unless_told_otherwise() -> None:
    assert executors(platform_definitions) == ["in_process"] * 3


@cache
def loaded_in_kubernetes() -> dict[str, list[str]]:
    """Of a process that loads the code location as the cluster does: the executors, and what it has imported."""
    program = (
        "import json, sys; from qa_platform.definitions import defs; names = ('answer_questions', 'answer_pending_files', 'housekeeping'); "
        "print(json.dumps({'executors': [defs.resolve_job_def(n).executor_def.name for n in names], 'modules': list(sys.modules)}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"QA_EXECUTOR": "kubernetes"}, capture_output=True, text=True, check=True, cwd=PROJECT
    )
    loaded: dict[str, list[str]] = json.loads(done.stdout)
    return loaded


def test_one_variable_gives_the_steps_that_answer_pods_of_their_own() -> None:
    assert loaded_in_kubernetes()["executors"] == ["k8s", "k8s", "in_process"]


def test_steps_pods_may_have_a_size_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"requests": {"memory": "1Gi"}, "limits": {"memory": "4Gi"}}
    monkeypatch.setenv("QA_EXECUTOR", "kubernetes")
    monkeypatch.setenv("QA_STEP_RESOURCES", json.dumps(size))
    steps = executor(ExecutionSettings())
    resolved = steps.apply_config_mapping({"config": {}})
    assert steps.name == "k8s"
    assert resolved.success, resolved.errors
    assert resolved.value is not None
    context = K8sContainerContext(run_k8s_config=UserDefinedDagsterK8sConfig(container_config={"resources": {"limits": {"cpu": "2"}}}))
    of_step = context.merge(K8sContainerContext(resources=resolved.value["config"]["resources"]))
    assert of_step.run_k8s_config.container_config["resources"] == {**size, "limits": {"memory": "4Gi", "cpu": "2"}}


# --- One set of environment variables ---

# Of what the embedded stack sets: what says that it is embedded, and what is for people's own `psql`.
ONLY_EMBEDDED = {"API_ENDPOINT_OVERRIDE", "GOOGLE_CLOUD_PROJECT", "QA_DATABASE_URL"} | {
    f"PG{name}" for name in ("HOST", "PORT", "USER", "PASSWORD", "DATABASE")
}
# What the chart says in its own way: Dagster's storage in dagster.yaml.
BY_THE_CHART = {"DAGSTER_HOME", "DAGSTER_PG_URL"}
# Addresses that only people know.
LINKS = {"QA_DAGSTER_URL", "QA_DOCS_URL"}
WITH_CERTIFICATES = {"PG_SSLROOTCERT", "PG_SSLCLIENT_CERT", "PG_SSL_CLIENT_KEY"}


def embedded_variables() -> set[str]:
    addresses = {"postgres": "/socket", "gcs": "127.0.0.1:1", "pachd": "127.0.0.1:2"}
    return set(Stack(Path("/nowhere"), addresses, dict.fromkeys(addresses, "token")).variables) - ONLY_EMBEDDED


def test_the_compose_file_sets_what_the_embedded_stack_sets() -> None:
    of_deployments = {"TINI_KILL_PROCESS_GROUP", "DAGSTER_SENSOR_GRPC_TIMEOUT_SECONDS"}
    assert set(COMPOSE["x-platform"]["environment"]) - of_deployments == embedded_variables() | {
        "QA_PIPELINES_PATCH",
        "QA_PIPELINES_PG_HOST",
    }


def test_one_list_of_secrets_to_pull_with_is_that_of_all_pods() -> None:
    text = (PROJECT / "deploy" / "kubernetes" / "values.yaml").read_text()
    values = yaml.safe_load(text.replace("&pull_secrets []", "&pull_secrets [{name: registry}]"))
    [job] = [part for part in values["rollout"] if part["kind"] == "Job"]
    expected = [{"name": "registry"}]
    assert values["imagePullSecrets"] == values["dagster-user-deployments"]["imagePullSecrets"] == expected
    assert job["spec"]["template"]["spec"]["imagePullSecrets"] == expected


def test_daemons_give_a_sensor_the_time_to_list_a_large_bucket() -> None:
    chart = {entry["name"]: entry.get("value") for entry in VALUES["dagsterDaemon"]["env"]}
    for environment in (COMPOSE["x-platform"]["environment"], chart):
        assert environment["DAGSTER_SENSOR_GRPC_TIMEOUT_SECONDS"] == "300"


def test_a_run_in_kubernetes_is_given_what_the_embedded_stack_sets(run_container: dict[str, Any]) -> None:
    given = {entry["name"] for entry in run_container["env"]} - {
        "DAGSTER_RUN_JOB_NAME",
        "DAGSTER_PG_PASSWORD",
        "QA_EXECUTOR",
        "QA_PIPELINES_PATCH",
        "QA_PRECISION",
        *LINKS,
    }
    expected = (embedded_variables() - BY_THE_CHART) | WITH_CERTIFICATES | {"DAGSTER_HOME"}
    assert given == expected


def test_the_page_lists_the_variables_that_make_a_deployment() -> None:
    page = (PROJECT / "docs" / "deploying.md").read_text()
    listed = embedded_variables() | WITH_CERTIFICATES | {"API_ENDPOINT_OVERRIDE", "QA_EXECUTOR"}
    assert [name for name in sorted(listed) if f"`{name}`" not in page] == []


def test_only_what_starts_servers_knows_the_embedded_ones() -> None:
    """The code location cannot tell a laptop from a cluster: it imports nothing of the embedded stack, and reads no such variable."""
    assert not any(module.startswith("qa_platform.embedded") for module in loaded_in_kubernetes()["modules"])
    for path in (PROJECT / "qa_platform").rglob("*.py"):
        folder = path.relative_to(PROJECT / "qa_platform").parts[0]
        text = path.read_text()
        assert folder == "embedded" or not any(f'"{name}"' in text for name in ("STORAGE_EMULATOR_HOST", "API_ENDPOINT_OVERRIDE")), path
        starts_servers = folder in ("embedded", "tools")
        # A default that is set for Dagster, or for the tokenizer's threads, is no reading.
        reads = re.search(r"\bos\.(environ(?!\.setdefault\(\"(DAGSTER|RAYON)_)|getenv)|\bfrom os import", text)
        assert starts_servers or not reads, f"{path} reads the environment"


# --- Compose ---


def test_the_compose_file_refers_to_what_it_declares() -> None:
    services = COMPOSE["services"]
    assert set(COMPOSE) == {"name", "x-platform", "services", "configs", "secrets", "volumes"}
    for name, service in services.items():
        unknown = set(service) - COMPOSE_SERVICE_KEYS
        assert not unknown, f"{name}: {unknown}"
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        assert {config["source"] for config in service.get("configs", ())} <= set(COMPOSE["configs"])
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= set(COMPOSE["volumes"])
        for other, condition in service.get("depends_on", {}).items():
            healthy = condition["condition"] == "service_healthy"
            assert other in services
            assert condition["condition"] in ("service_healthy", "service_completed_successfully")
            assert not healthy or "healthcheck" in services[other]
        if "build" in service:
            folder = PROJECT / "deploy" / service["build"]["context"]
            assert (folder / service["build"]["dockerfile"]).exists()
    assert (PROJECT / "deploy" / COMPOSE["configs"]["dagster"]["file"]).resolve() == PROJECT / "dagster.yaml"


COMPOSE_SERVICE_KEYS = {
    *("image", "build", "command", "environment", "secrets", "configs", "volumes", "ports", "depends_on", "healthcheck", "restart"),
    *("init", "cap_drop", "security_opt", "stop_grace_period", "env_file"),
}


def test_the_compose_file_is_reached_from_its_own_machine_only() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert sorted(published) == [
        "${PG_LISTEN:-127.0.0.1}:5432:5432",
        "127.0.0.1:${METRICS_PORT:-9464}:9464",
        "127.0.0.1:${PORT:-3000}:3000",
    ]


def test_the_compose_file_hands_on_whatever_else_is_set() -> None:
    assert COMPOSE["x-platform"]["env_file"] == [{"path": "qa.env", "required": False}]


def test_the_compose_file_names_every_variable_that_it_asks_for() -> None:
    text = (PROJECT / "deploy" / "compose.yaml").read_text()
    head, _, body = text.partition("name: qa-platform")
    asked = set(re.findall(r"\$\{([A-Z_]+)", body))
    assert asked == set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b(?=[, ] )", head.partition("# Set in")[2])) | (
        asked & set(re.findall(r"\w+", head))
    )
    # What there is no usual value for is asked for with a word on what it is, or defaults.
    first_uses = {name: re.search(rf"\$\{{{name}(:[?-][^}}]*)?\}}", body) for name in asked}
    assert all(use and use[1] for name, use in first_uses.items()), first_uses


def test_the_workflow_sets_what_the_compose_file_requires() -> None:
    required = set(re.findall(r"\$\{([A-Z_]+):\?", (PROJECT / "deploy" / "compose.yaml").read_text()))
    [step] = [step for step in WORKFLOWS["tests.yaml"]["jobs"]["deploying"]["steps"] if "docker compose" in step.get("run", "")]
    assert required <= set(step["env"])
    assert required == {"STORAGE_BUCKET", "GOOGLE_APPLICATION_CREDENTIALS", "PACHD_ADDRESS", "PG_PASSWORD", "PG_ADDRESS", "REGISTRY"}


def test_no_secret_is_written_where_dagster_shows_it() -> None:
    secrets = set(re.findall(r"^- `(\w+)` \(\*\*secret\*\*", (PROJECT / "docs" / "configuration.md").read_text(), re.MULTILINE))
    assert {"QA_SLACK_WEBHOOK", "PG_PASSWORD"} <= secrets
    [deployment] = VALUES["dagster-user-deployments"]["deployments"]
    assert [entry["name"] for entry in deployment["env"] if "value" in entry and entry["name"] in secrets] == []


def test_the_webserver_finds_the_code_location() -> None:
    [place] = yaml.safe_load(COMPOSE["configs"]["workspace"]["content"])["load_from"]
    server = place["grpc_server"]
    command = COMPOSE["services"][server["host"]]["command"]
    assert command[command.index("-p") + 1] == str(server["port"])
    parse_click(create_dagster_cli(), command[1:])


def test_the_tables_are_made_before_anything_needs_them() -> None:
    services, done = COMPOSE["services"], {"condition": "service_completed_successfully"}
    assert services["code-location"]["depends_on"] == {"pipelines": done}
    assert services["pipelines"]["depends_on"] == {"tables": done}
    parse_click(qa_platform_command, services["tables"]["command"][1:])
    parse_click(qa_platform_command, services["pipelines"]["command"][1:])
    assert "--no-cron" in services["pipelines"]["command"], "Dagster could not launch jobs"
    # Pachyderm's workers are elsewhere, and are given another address of the same database, whichever service applies the pipelines.
    for service in ("pipelines", "code-location"):
        given = services[service]["environment"]
        assert given["PG_HOST"] == "postgres"
        assert given["QA_PIPELINES_PG_HOST"].startswith("${PG_ADDRESS:?")
    assert services["tables"]["restart"] == services["pipelines"]["restart"] == "no"


# --- Images ---


BASE = r"python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}"


@dataclass(frozen=True)
class Stage:
    """A stage of a Dockerfile: what it begins with, and its instructions."""

    base: str
    instructions: tuple[tuple[str, str], ...]

    def of(self, instruction: str) -> list[str]:
        return [text for name, text in self.instructions if name == instruction]


def stages(path: Path) -> dict[str, Stage]:
    """The stages by name; the last, which is the image, has none."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, Stage] = {}
    for part in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        first, *lines = [line for line in part.splitlines() if line.strip()]
        base, _, name = first.partition(" AS ")
        found[name] = Stage(base, tuple((line.split()[0], line.partition(" ")[2]) for line in lines))
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_is_slim_pinned_and_without_root(path: Path) -> None:
    of_image = stages(path)
    assert re.fullmatch(BASE, of_image["base"].base)
    assert {stage.base for name, stage in of_image.items() if name != "base"} <= of_image.keys()
    [user] = of_image[""].of("USER")
    # By number: Kubernetes does not start what says `runAsNonRoot` with a name.
    assert int(user) > 0
    [install] = of_image["dependencies"].of("RUN")
    assert install.count("pip install") == install.count("--constraint constraints.txt")
    # pip leaves out of the image what an earlier command has installed beside it.
    assert install.startswith("pip install --prefix /installed ")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_that_cannot_start_its_program_is_not_built(path: Path) -> None:
    [command] = [json.loads(text) for text in stages(path)[""].of("CMD")]
    check = stages(path)[""].of("RUN")[-1]
    assert check.startswith("--network=none python -c ")
    assert command[command.index("-m") + 1] in check


def test_all_images_are_built_on_one_that_is_kept_current() -> None:
    assert len({stages(path)["base"].base for path in DOCKERFILES}) == 1
    updates = yaml.safe_load((PROJECT / ".github" / "dependabot.yml").read_text())["updates"]
    kept = {update["package-ecosystem"]: update.get("directories", [update.get("directory")]) for update in updates}
    assert set(kept["docker"]) == {f"/{path.parent.relative_to(PROJECT)}" for path in DOCKERFILES}
    assert kept["github-actions"] == ["/"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_a_changed_line_of_the_project_downloads_nothing_and_pushes_only_the_project(path: Path) -> None:
    of_image = stages(path)
    # The packages and the model depend on the list of packages, not on what it was made of.
    for name in ("dependencies", "model"):
        if name in of_image:
            assert set(of_image[name].of("COPY")) <= {"constraints.txt ./", "--from=requirements /build/requirements.txt ./"}
            assert of_image[name].base in ("base", "dependencies")
    # Whatever runs beside the project's files has no network to download from.
    for name in ("requirements", "project"):
        assert all(run.startswith("--network=none ") for run in of_image[name].of("RUN"))
    final = of_image[""].instructions
    own = next(index for index, (_, text) in enumerate(final) if text == "--from=project /project /usr/local")
    assert all(text.startswith("--network=none ") for name, text in final[own:] if name in ("RUN", "ADD"))
    # What is large and stays the same comes before; the project is the last that is copied.
    assert ("COPY", "--from=dependencies /installed /usr/local") in final[:own]
    assert [text for name, text in final[own:] if name == "COPY"] == [final[own][1]]
    assert [text for name, text in final[:own] if name == "COPY" and re.match(r"(?!--from)(?!qa_platform/answering/models/ )", text)] == []


@pytest.mark.parametrize("extras", [["cron"], ["loader"], ["kubernetes"], ["cron", "torch"]])
def test_the_list_of_packages_is_that_of_the_extras_and_no_version_of_the_project_is_in_it(extras: list[str]) -> None:
    def listed(text: str) -> list[str]:
        command = [sys.executable, str(PROJECT / "deploy" / "requirements.py"), *extras]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.splitlines()

    text = (PROJECT / "pyproject.toml").read_text()
    expected, seen = {_plain(requirement) for requirement in _wanted("")}, [*extras]
    for name in seen:
        for requirement in _wanted(name):
            if requirement.name == "qa-platform":
                seen += requirement.extras
            else:
                expected.add(_plain(requirement))
    assert {_plain(Requirement(line)) for line in listed(text)} == expected
    version = tomllib.loads(text)["project"]["version"]
    assert listed(text.replace(f'version = "{version}"', 'version = "99"')) == listed(text)


def _wanted(extra: str) -> list[Requirement]:
    """What the installed distribution requires for an extra alone, or without any."""
    requirements = [Requirement(line) for line in metadata.requires("qa-platform") or ()]
    if not extra:
        return [requirement for requirement in requirements if requirement.marker is None]
    return [requirement for requirement in requirements if requirement.marker and requirement.marker.evaluate({"extra": extra})]


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{sorted(requirement.extras)}{requirement.specifier}"


def test_the_page_builds_workers_for_gpus_with_an_extra_that_there_is() -> None:
    page = (PROJECT / "docs" / "deploying.md").read_text()
    [(extra, file)] = re.findall(r"^docker build --build-arg EXTRA=(\S+) --file (\S+) ", page, re.MULTILINE)
    listing = stages(PROJECT / file)["requirements"]
    assert listing.of("ARG") == ["EXTRA="]
    assert "requirements.py cron $EXTRA <" in listing.of("RUN")[0]
    assert {requirement.name for requirement in _wanted(extra)} == {"torch", "transformers"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_is_built_from_what_is_there(path: Path) -> None:
    of_image = stages(path)
    sent = tuple(line.removeprefix("!") for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!"))
    for stage in of_image.values():
        for copy in stage.of("COPY"):
            if not copy.startswith("--from="):
                for source in copy.split()[:-1]:
                    assert (PROJECT / source).exists()
                    assert source.startswith(sent)
    pyproject = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    [listing] = of_image["requirements"].of("RUN")
    assert listing.split()[listing.split().index("requirements.py") + 1] in pyproject["project"]["optional-dependencies"]
    # What builds the project's wheel, without a network.
    assert all(f"'{requirement}'" in of_image["dependencies"].of("RUN")[0] for requirement in pyproject["build-system"]["requires"])
    [command] = of_image[""].of("CMD")
    words = json.loads(command)
    if words[0] == "dagster":
        parse_click(create_dagster_cli(), words[1:])
    else:
        assert (PROJECT / (words[2].replace(".", "/") + ".py")).exists()


def test_the_code_locations_image_is_what_deployments_use() -> None:
    name = "qa-platform-code-location"
    assert f"/{name}:" in image()
    assert f"/{name}:" in COMPOSE["x-platform"]["image"]
    pushed = {entry["image"]: entry["dockerfile"] for entry in WORKFLOWS["images.yaml"]["jobs"]["image"]["strategy"]["matrix"]["include"]}
    assert pushed[name] == "deploy/Dockerfile"
    assert set(pushed.values()) == {str(path.relative_to(PROJECT)) for path in DOCKERFILES}


def test_the_platform_asks_for_the_model_that_the_workers_image_holds() -> None:
    def model(path: Path) -> set[str]:
        return set(re.findall(r"^ARG MODEL.*|QA_MODEL\w*=\S+", path.read_text(), re.MULTILINE))

    worker = PROJECT / "pachyderm" / "question_answer" / "Dockerfile"
    default = "distilbert/distilbert-base-uncased-distilled-squad"
    assert model(worker) == model(PROJECT / "deploy" / "Dockerfile")
    assert f"ARG MODEL={default}" in model(worker)
    assert {"QA_MODEL=${MODEL}", "QA_MODEL_REVISION=${MODEL_REVISION}"} < model(worker)
    # All images are built with the same arguments, and at run time nothing is fetched.
    builds = [step for _, step in steps() if step.get("uses", "").startswith("docker/build-push-action@")]
    assert builds
    assert all(f"MODEL=${{{{ vars.MODEL || '{default}' }}}}" in build["with"]["build-args"] for build in builds)
    of_image = stages(worker)
    [fetch] = of_image["model"].of("RUN")
    assert set(shlex.split(fetch.partition('"$MODEL_REVISION"')[2].partition(";")[0])) == set(_HUB_FILES)
    assert "HF_HUB_OFFLINE=1" in of_image[""].of("ENV")[0]
    assert "find_model(" in of_image[""].of("RUN")[-1]
    # On a laptop it is the bundled one, as ever.
    assert ModelSettings.model_fields["model"].default == "bundled"


# --- Workflows ---


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for file, workflow in WORKFLOWS.items():
        for job_name, job in workflow["jobs"].items():
            yield from ((f"{file}: {job_name}", step) for step in job.get("steps", ()))


def test_workflows_use_actions_at_commits() -> None:
    """A tag can be moved to another commit by whoever takes an action's repository over."""
    used = {step["uses"] for _, step in steps() if "uses" in step}
    assert used
    assert [action for action in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action)] == []


def test_workflows_end_and_have_no_rights_that_they_do_not_need() -> None:
    for file, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"}, file
        # A job that is another workflow has the limits of that one's jobs.
        assert all("timeout-minutes" in job or "uses" in job for job in workflow["jobs"].values()), file
        rights = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
        assert rights == ({"release": {"contents": "write"}} if file == "images.yaml" else {})
    for place, step in steps():
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False, place
        # What comes from outside goes through the environment: it would else be part of the script.
        assert "${{" not in step.get("run", ""), place


@pytest.mark.parametrize(("tag", "status"), [("v{}", 0), ("v{}.1", 1), ("v0.0.0", 1)])
def test_only_a_tag_of_this_version_is_released(tag: str, status: int) -> None:
    first = next(step for step in WORKFLOWS["images.yaml"]["jobs"]["version"]["steps"] if "run" in step)
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    done = subprocess.run(
        ["bash", "-e", "-c", first["run"]], env={"GITHUB_REF_NAME": tag.format(version), "PATH": "/usr/bin:/bin"}, cwd=PROJECT
    )
    assert done.returncode == status


def test_a_release_is_tested_built_and_scanned_before_one_job_pushes_it() -> None:
    jobs = WORKFLOWS["images.yaml"]["jobs"]
    needed = {name: job["needs"] for name, job in jobs.items() if "needs" in job}
    assert needed == {"tests": "version", "image": "tests", "release": "image"}
    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yaml"
    # YAML reads `on` as true.
    assert "workflow_call" in WORKFLOWS["tests.yaml"][True]
    names = [step.get("uses", step.get("name", "")).partition("@")[0] for step in jobs["image"]["steps"]]
    assert names.index("docker/build-push-action") < names.index("aquasecurity/trivy-action") < names.index("actions/upload-artifact")
    assert [name for name, job in jobs.items() if ".github/release push" in json.dumps(job)] == ["release"]
    assert not any("push" in step.get("with", {}) or "docker push" in step.get("run", "") for _, step in steps())


def test_an_image_says_what_it_was_made_of() -> None:
    [build] = [step["with"] for step in WORKFLOWS["images.yaml"]["jobs"]["image"]["steps"] if "build-push-action" in step.get("uses", "")]
    labels = {line.partition("=")[0].rpartition(".")[2] for line in build["labels"].splitlines()}
    assert {"version", "revision", "source"} <= labels
    assert (build["provenance"], build["sbom"]) == ("mode=max", True)


def test_the_version_is_looked_up_for_the_images_that_are_pushed() -> None:
    images = [entry["image"] for entry in WORKFLOWS["images.yaml"]["jobs"]["image"]["strategy"]["matrix"]["include"]]
    lookup = WORKFLOWS["images.yaml"]["jobs"]["version"]["steps"][-1]["run"].split()
    assert lookup[:2] == [".github/release", "refuse"]
    assert lookup[4:] == images
    # What the tests build, a release builds upon.
    matrices = [WORKFLOWS[file]["jobs"]["image"]["strategy"]["matrix"] for file in ("tests.yaml", "images.yaml")]
    assert matrices[0] == matrices[1]


def test_the_tests_run_on_every_python_that_is_promised() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    versions = WORKFLOWS["tests.yaml"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert project["requires-python"] == f">={versions[0]}"


def test_the_tests_workflow_runs_commands_that_exist() -> None:
    commands = [line for _, step in steps() if "run" in step for line in step["run"].splitlines()]
    assert any(shlex.split(line)[:2] == ["make", "test"] for line in commands if line.startswith("make"))
    assert any("dagster job execute -m qa_platform.definitions -j answer_pending_files" in line for line in commands)


def test_a_run_starts_with_the_roles_that_the_page_names(
    bucket: storage.Bucket, gcs_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = set(re.findall(r"`(roles/storage\.\w+)`", (PROJECT / "docs" / "deploying.md").read_text()))
    policy = bucket.get_iam_policy()
    policy.bindings = [{"role": role, "members": {"allUsers"}} for role in roles]
    bucket.set_iam_policy(policy)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{gcs_address}")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    monkeypatch.setenv("STORAGE_BUCKET", bucket.name)
    logs = VALUES["computeLogManager"]["config"]["gcsComputeLogManager"]
    config = {"bucket": logs["bucket"], "prefix": logs["prefix"], "upload_interval": logs["uploadInterval"]}
    manager = {"module": "dagster_gcp.gcs.compute_log_manager", "class": "GCSComputeLogManager", "config": config}
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"telemetry": {"enabled": False}, "compute_logs": manager}))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))

    @dg.op
    def say() -> None:
        sys.stdout.write("hello")

    @dg.job(executor_def=dg.in_process_executor)
    def one() -> None:
        say()

    with dg.DagsterInstance.get() as instance:
        assert one.execute_in_process(instance=instance, raise_on_error=False).success
    assert [blob.name for blob in bucket.list_blobs(prefix="dagster-logs/")]
