"""Every command in the operators' pages is run by a test or, if only a cluster could run it, compared with the thing that it acts on.

`CHECKED_BY` maps each command to its check. A command that is missing there fails, and so does an entry without a command or a check.
"""

import os
import pty
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from qa_platform.cli.main import main as qa_platform_command
from qa_platform.contract import ANSWER_PIPELINE, INCOMING, LOAD_PIPELINE, PROCESSED, REJECTED
from qa_platform.embedded.postgres_access import bin_folder
from qa_platform.loading import migrate
from qa_platform.provisioning.roles import ROLES, grant_commands
from qa_platform.settings import PostgresSettings, WorkSettings
from qa_platform_tests.checkout import PROJECT, make_checkout
from qa_platform_tests.command_lines import parse_click
from qa_platform_tests.conftest import Database, new_database
from qa_platform_tests.kubernetes_types import problems
from qa_platform_tests.tools.test_documentation import BLOCKS, simple_commands

PAGES = ("deploying.md", "operating.md", "upgrading.md")
COMMANDS = [(block, command) for block in BLOCKS if block.page.name in PAGES and block.language == "console" for command in block.commands]
HERE = "tools/test_operators_commands.py::"
# By how a command begins: the test that runs or compares it, or the step of a workflow that does. The longest that fits counts.
CHECKED_BY = {
    "qa-platform ": "tools/test_documentation.py::test_commands_for_a_deployment_run",
    "qa-platform metrics": "cli/test_metrics.py::test_the_values_are_those_of_what_was_uploaded",
    "export PGHOST=": f"{HERE}test_the_original_rows_are_counted_and_saved_as_the_page_says",
    "export PG_DBNAME=": f"{HERE}test_a_database_of_another_encoding_is_copied_as_the_page_says",
    "psql -c ": f"{HERE}test_the_original_rows_are_counted_and_saved_as_the_page_says",
    "pg_dump --table question_answer": f"{HERE}test_the_original_rows_are_counted_and_saved_as_the_page_says",
    "psql -d ": f"{HERE}test_a_database_of_another_encoding_is_copied_as_the_page_says",
    "pg_dump --table 'question_*' OLD": f"{HERE}test_a_database_of_another_encoding_is_copied_as_the_page_says",
    "pg_dump --format custom": "batches/test_restore.py::test_a_dump_from_before_the_uploads_is_made_good_by_one_command",
    "pg_restore": "batches/test_restore.py::test_a_dump_from_before_the_uploads_is_made_good_by_one_command",
    "psql --host HOST": f"{HERE}test_a_password_is_changed_as_the_page_says",
    "docker build --file": "tests.yaml: The image can be built",
    "docker build --build-arg EXTRA": "test_deploy.py::test_the_page_builds_workers_for_gpus_with_an_extra_that_there_is",
    "docker build --network host": "test_offline_install.py::test_the_page_builds_on_the_image_that_was_loaded",
    'docker run --rm --volume "$PWD/gold.csv': f"{HERE}test_what_runs_in_a_container_is_a_command",
    'docker run --rm --volume "$PWD:/source"': "test_offline_install.py::test_the_page_collects_what_the_images_need",
    "docker pull": f"{HERE}test_what_is_saved_was_pulled_or_run",
    "docker save": "test_offline_install.py::test_the_page_collects_what_the_images_need",
    "docker load": f"{HERE}test_what_was_collected_is_what_is_loaded_and_served",
    "python3 -m http.server": f"{HERE}test_what_was_collected_is_what_is_loaded_and_served",
    "docker compose": f"{HERE}test_the_commands_of_compose_name_its_services",
    "kubectl create namespace": f"{HERE}test_all_objects_are_in_one_namespace",
    "kubectl --namespace dagster create secret": f"{HERE}test_the_secrets_have_the_keys_that_the_values_name",
    "kubectl --namespace dagster patch secret": f"{HERE}test_the_patch_of_a_secret_is_one",
    "kubectl --namespace dagster rollout restart": f"{HERE}test_all_objects_are_in_one_namespace",
    "kubectl --namespace dagster rollout status": f"{HERE}test_the_objects_of_the_chart_have_the_names_that_it_gives_them",
    "kubectl --namespace dagster delete": "test_monitoring.py::test_the_manifests_are_ones_that_kubernetes_takes",
    "kubectl --namespace dagster exec": f"{HERE}test_the_objects_of_the_chart_have_the_names_that_it_gives_them",
    "kubectl --namespace dagster port-forward": f"{HERE}test_the_objects_of_the_chart_have_the_names_that_it_gives_them",
    "kubectl --namespace dagster apply": "test_monitoring.py::test_the_manifests_are_ones_that_kubernetes_takes",
    "helm upgrade": f"{HERE}test_helm_is_given_charts_and_values_that_a_workflow_renders",
    "helm uninstall": f"{HERE}test_helm_is_given_charts_and_values_that_a_workflow_renders",
    "pachctl auth": f"{HERE}test_the_roles_are_granted_by_the_commands_that_the_doctor_names",
    "pachctl ": "test_upgrading.py::test_there_and_back_keeps_every_row_and_every_answer",
    "gcloud storage": f"{HERE}test_the_buckets_folders_are_the_platforms",
}


def starting(*starts: str) -> list[list[str]]:
    """The words of the commands that begin so; there are some."""
    found = [words for _, command in COMMANDS for words in simple_commands(command) if shlex.join(words).startswith(starts)]
    assert found, starts
    return found


def test_every_command_is_checked_by_somebody() -> None:
    unused = set(CHECKED_BY)
    for block, line in COMMANDS:
        for command in line.split(" && "):
            fitting = [start for start in CHECKED_BY if command.startswith(start)]
            assert fitting, f"{block}: nobody checks {command!r}"
            unused.discard(max(fitting, key=len))
    assert not unused


@pytest.mark.parametrize("check", sorted(set(CHECKED_BY.values())))
def test_a_check_exists(check: str) -> None:
    file, _, test = check.partition("::")
    if test:
        assert f"\ndef {test}(" in (PROJECT / "qa_platform_tests" / file).read_text()
    else:
        workflow, _, step = check.partition(": ")
        jobs = yaml.safe_load((PROJECT / ".github" / "workflows" / workflow).read_text())["jobs"]
        assert step in {step.get("name") for job in jobs.values() for step in job.get("steps", ())}


# --- PostgreSQL ---


def platform_environment(database: Database) -> dict[str, str]:
    """A deployment's variables, without those of `psql`."""
    address = {"PG_HOST": database.host, "PG_PORT": str(database.port), "PG_USER": database.user, "PG_DBNAME": database.dbname}
    return {**address, "PG_PASSWORD": "", "PATH": f"{bin_folder()}{os.pathsep}{os.defpath}"}


def lines_of(page: str, *starts: str) -> Iterator[str]:
    return (command for block, command in COMMANDS if block.page.name == page and command.startswith(starts))


def run(line: str, database: Database, folder: Path) -> str:
    """Run a line in a shell in which the variables of `psql` were set as the page says."""
    [export] = lines_of("operating.md", "export PGHOST=")
    script, environment = f"{export}\n{line}", platform_environment(database)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


FIVE_COLUMNS = "question varchar(10000), answer varchar(10000), context varchar(500000), model varchar(1000), qa_timestamp timestamp"
CREATE = f"CREATE TABLE question_answer ({FIVE_COLUMNS})"
INSERT = "INSERT INTO question_answer (question) VALUES ('Zürich?'), ('Où?')"


def count(output: str) -> int:
    return int(output.splitlines()[2])


def test_the_original_rows_are_counted_and_saved_as_the_page_says(database: Database, tmp_path: Path) -> None:
    with database.connect(autocommit=True) as connection:
        connection.execute(CREATE)
        connection.execute(INSERT)
        before, after = lines_of("upgrading.md", "psql -c ")
        [save] = lines_of("upgrading.md", "pg_dump --table question_answer")
        assert count(run(before, database, tmp_path)) == 2
        run(save, database, tmp_path)
        assert "Zürich?" in (tmp_path / "question_answer.sql").read_text()
        migrate.upgrade(PostgresSettings(host=database.host, port=database.port, user=database.user, dbname=database.dbname))
        connection.execute("INSERT INTO question_answer (question, source_file) VALUES ('Who?', 'a.csv')")
        assert count(run(after, database, tmp_path)) == 2


def test_a_database_of_another_encoding_is_copied_as_the_page_says(postgres_socket: str, tmp_path: Path) -> None:
    with new_database(postgres_socket, encoding="LATIN1") as old, old.connect(autocommit=True) as connection:
        connection.execute(CREATE)
        connection.execute(INSERT)
        new = f"{old.dbname}_utf8"
        lines = [
            line.replace("answers_utf8", new).replace("OLD", old.dbname)
            for line in lines_of("upgrading.md", "psql -d ", "pg_dump --table 'question_*' OLD")
        ]
        try:
            outputs = [run(line, old, tmp_path) for line in lines]
            assert [count(output) for output in outputs[-2:]] == [2, 2]
            copied = Database(old.host, old.port, old.user, new)
            with copied.connect() as other:
                assert other.info.parameter_status("server_encoding") == "UTF8"
                assert other.execute("SELECT question FROM question_answer ORDER BY 1").fetchall() == [("Où?",), ("Zürich?",)]
        finally:
            connection.execute(f"DROP DATABASE IF EXISTS {new}")


def test_a_password_is_changed_as_the_page_says(database: Database) -> None:
    """psql asks for it on the terminal, twice."""
    [words] = starting("psql --host HOST")
    values = {"HOST": database.host, "ADMIN": database.user, "NAME": database.dbname, r"\password USER": rf"\password {database.dbname}"}
    words = [values.get(word, word) for word in words]
    with database.connect(autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {database.dbname} LOGIN")
        terminal, inside = pty.openpty()
        # `\\password` asks the terminal that it is controlled by, whatever its input is.
        command = ["setsid", "--ctty", "--wait", *words]
        environment = {**platform_environment(database), "PGPORT": str(database.port)}
        try:
            with subprocess.Popen(command, env=environment, stdin=inside, stdout=inside, stderr=inside) as psql:
                for prompt in (b'": ', b"again: "):
                    said = b""
                    while prompt not in said:
                        said += os.read(terminal, 1000)
                    os.write(terminal, b"a new pass'word\n")
                assert psql.wait(30) == 0
            [(stored,)] = connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", [database.dbname])
            assert stored.startswith("SCRAM-SHA-256$")
        finally:
            os.close(terminal)
            os.close(inside)
            connection.execute(f"DROP ROLE {database.dbname}")


# --- Docker ---


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_what_was_collected_is_what_is_loaded_and_served() -> None:
    [save], [load], [serve] = starting("docker save"), starting("docker load"), starting("python3 -m http.server")
    assert option(save, "--output") == option(load, "--input")
    [collect] = [words for words in starting("docker run") if "wheel" in words]
    assert option(collect, "--wheel-dir") == option(serve, "--directory")
    builds = starting("docker build --network host")
    # The builds share the network of the machine, on whose loopback the wheels are.
    links = {word for words in builds for word in words if word.startswith("PIP_FIND_LINKS=")}
    assert links == {f"PIP_FIND_LINKS=http://{option(serve, '--bind')}:{serve[-1]}"}


def test_what_runs_in_a_container_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [tune] = [words for words in starting("docker run") if "qa-platform" in words]
    mounted = option(tune, "--volume").split(":")[1]
    command = tune[tune.index("qa-platform") + 1 :]
    assert command[-1] == mounted
    monkeypatch.chdir(make_checkout(tmp_path))
    parse_click(qa_platform_command, [*command[:-1], mounted.removeprefix("/")])


def test_the_commands_of_compose_name_its_services() -> None:
    for words in starting("docker compose"):
        compose = yaml.safe_load((PROJECT / option(words, "--file")).read_text())
        action, *rest = words[words.index("--file") + 2 :]
        if action == "exec":
            service, program, *arguments = rest
            assert service in compose["services"]
            assert program == "qa-platform"
            parse_click(qa_platform_command, arguments)
        elif action == "run":
            assert [word for word in rest if word != "--no-deps"] == ["--rm", "pipelines"]
            assert compose["services"]["pipelines"]["command"][:3] == ["qa-platform", "pachyderm", "apply"]
        else:
            assert action == "up"
            assert {word for word in rest if word.startswith("-")} <= {"--detach", "--build", "--no-deps"}
            assert {word for word in rest if not word.startswith("-")} <= compose["services"].keys()


def test_what_is_saved_was_pulled_or_run() -> None:
    [save], [pull] = starting("docker save"), starting("docker pull")
    run = {word for words in starting("docker run") for word in words}
    assert set(save[4:]) <= {pull[-1], *run}
    compose = yaml.safe_load((PROJECT / "deploy" / "compose.yaml").read_text())
    assert pull[-1] == compose["services"]["postgres"]["image"]


# --- Kubernetes ---

VALUES: dict[str, Any] = yaml.safe_load((PROJECT / "deploy" / "kubernetes" / "values.yaml").read_text())
RENDER = next(
    step["run"]
    for job in yaml.safe_load((PROJECT / ".github" / "workflows" / "tests.yaml").read_text())["jobs"].values()
    for step in job["steps"]
    if step.get("name") == "Dagster's chart takes the values"
)


def test_all_objects_are_in_one_namespace() -> None:
    [create] = starting("kubectl create namespace")
    namespace = create[-1]
    others = [words for words in starting("kubectl", "helm") if words != create]
    assert {option(words, "--namespace") for words in others} == {namespace}
    assert f"--namespace {namespace} " in RENDER
    [restart] = starting("kubectl --namespace dagster rollout restart")
    assert restart[3:] == ["rollout", "restart", "deployment"]


def test_the_secrets_have_the_keys_that_the_values_name() -> None:
    made: dict[str, set[str]] = {}
    for words in starting("kubectl --namespace dagster create secret generic"):
        keys = [word.partition("=")[2].partition("=")[0] for word in words if word.startswith("--from-")]
        made[words[words.index("generic") + 1]] = set(keys)
    [deployment] = VALUES["dagster-user-deployments"]["deployments"]
    references = [entry["valueFrom"]["secretKeyRef"] for entry in deployment["env"] if "valueFrom" in entry]
    needed = {(reference["name"], reference["key"]) for reference in references if not reference.get("optional")}
    needed |= {
        (volume["secret"]["secretName"], item["key"])
        for volume in deployment["volumes"]
        for item in volume.get("secret", {}).get("items", ())
    }
    # Certificates and tokens are only where they are wanted; the page names them.
    optional = {"pachaccess": {"token"}, "dbaccess": {"sslrootcert", "sslcert", "sslkey"}}
    expected: dict[str, set[str]] = {VALUES["global"]["postgresqlSecretName"]: {"postgresql-password"}}
    for name, key in needed:
        if key not in optional.get(name, ()):
            expected.setdefault(name, set()).add(key)
    assert made == expected


def test_the_patch_of_a_secret_is_one() -> None:
    [patch] = starting("kubectl --namespace dagster patch secret")
    page = (PROJECT / "docs" / "operating.md").read_text()
    [line] = re.findall(rf"The file `{option(patch, '--patch-file')}` has one line, `([^`]+)`", page)
    assert list(problems(yaml.safe_load(line), "V1Secret")) == []
    [create] = [words for words in starting("kubectl --namespace dagster create secret generic") if option(words, "generic") == patch[-3]]
    assert set(yaml.safe_load(line)["stringData"]) <= {word.rpartition("=")[2] for word in create}


def test_the_objects_of_the_chart_have_the_names_that_it_gives_them() -> None:
    """The workflow renders the chart and looks for them."""
    [deployment] = VALUES["dagster-user-deployments"]["deployments"]
    for words in starting("kubectl --namespace dagster exec"):
        kind, _, name = words[4].partition("/")
        assert (kind, name) == ("deploy", f"dagster-dagster-user-deployments-{deployment['name']}")
        assert f"grep -q 'name: {name}$' rendered.yaml" in RENDER
        program, *arguments = words[words.index("--") + 1 :]
        assert program == "qa-platform"
        parse_click(qa_platform_command, arguments)
    [status] = starting("kubectl --namespace dagster rollout status")
    assert status[5] == f"deployment/dagster-dagster-user-deployments-{deployment['name']}"
    [forward] = starting("kubectl --namespace dagster port-forward")
    assert f"grep -q 'name: {forward[4].removeprefix('service/')}$' rendered.yaml" in RENDER
    assert forward[5].split(":")[1] == str(VALUES["dagsterWebserver"]["service"]["port"])


def test_helm_is_given_charts_and_values_that_a_workflow_renders() -> None:
    releases = set()
    for words in starting("helm upgrade"):
        release, chart = [word for word in words[2:] if not word.startswith("--")][:2]
        releases.add(release)
        values = option(words, "--values")
        assert (PROJECT / values).exists()
        assert f"--values {values}" in RENDER
        if chart == "dagster/dagster":
            version = subprocess.run(
                ["bash", "-c", f'echo "{option(words, "--version")}"'], cwd=PROJECT, capture_output=True, text=True, check=True
            ).stdout
            assert f"dagster=={version.strip()}\n" in (PROJECT / "constraints.txt").read_text()
            assert f"helm template {release} dagster/helm/dagster" in RENDER
            # Otherwise the next command, by `kubectl exec`, would run in a pod of the old version.
            assert "--wait" in words
        else:
            assert (PROJECT / chart / "Chart.yaml").exists()
            assert f"helm template {release} {chart}" in RENDER
            # Longer than its job may take.
            [job] = [each for each in VALUES["rollout"] if each["kind"] == "Job"]
            assert int(option(words, "--timeout").removesuffix("m")) * 60 > job["spec"]["activeDeadlineSeconds"]
    notes = (PROJECT / ".github" / "workflows" / "images.yaml").read_text()
    assert "chart=$(sed -n 's/^dagster==//p' constraints.txt)" in notes
    assert "helm upgrade dagster dagster/dagster --version $chart " in notes
    [uninstall] = starting("helm uninstall")
    assert uninstall[2] in releases


# --- Pachyderm and the bucket ---


def test_the_roles_are_granted_by_the_commands_that_the_doctor_names() -> None:
    granting = [shlex.join(words) for words in starting("pachctl auth set")]
    robot = starting("pachctl auth get-robot-token")[0][-1]
    assert " && ".join(granting) == grant_commands(f"robot:{robot}", {role.name for role in ROLES})
    # The first gives what the last takes away.
    assert [words[2] for words in starting("pachctl auth get-robot-token", "pachctl auth revoke")].count("revoke") == 1


def test_the_pipelines_that_pachctl_is_told_of_are_the_platforms_and_are_created_of_what_was_saved() -> None:
    named, saved = set(), set()
    for block, line in COMMANDS:
        words = next(simple_commands(line), [])
        if words[:1] == ["pachctl"] and words[1] != "auth":
            assert block.page.name == "upgrading.md"
            named |= {word.partition("@")[0] for word in words if word.partition("@")[0] in (ANSWER_PIPELINE, LOAD_PIPELINE)}
            if words[1:3] == ["list", "pipeline"]:
                # `inspect --raw` writes more than `create` takes.
                assert "--spec" in words
                saved.add(line.partition("> ")[2])
            if words[1] == "create":
                assert option(words, "--file") in saved
    assert named == {ANSWER_PIPELINE, LOAD_PIPELINE}


def test_the_buckets_folders_are_the_platforms() -> None:
    folders = set()
    for words in starting("gcloud storage"):
        for word in words[3:]:
            if word.startswith("gs://"):
                _, _, path = word.removeprefix("gs://").partition("/")
                folder = path.partition("/")[0]
                folders |= {folder} if folder and "*" not in folder else set()
            else:
                assert word == "--recursive"
    answered = "answered/"
    assert f"`{answered}`" in (WorkSettings.model_fields["answered_prefix"].description or "")
    logs = VALUES["computeLogManager"]["config"]["gcsComputeLogManager"]["prefix"]
    assert {f"{folder}/" for folder in folders} == {INCOMING, PROCESSED, REJECTED, answered, f"{logs}/"}


def test_globs_are_for_gcloud_and_not_for_the_shell() -> None:
    lines = [line for _, line in COMMANDS if line.startswith("gcloud storage") and "*" in line]
    assert lines
    assert all(re.search(r'"[^"]*\*[^"]*"', line) for line in lines)
