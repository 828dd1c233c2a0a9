"""The manifests and rules for `qa-platform metrics` are well-formed, and consistent with the rest of the deployment.

`cli/test_metrics.py` tests that the metrics in the rules and on the dashboard exist.
"""

import json
import re
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from qa_platform.cli.main import main
from qa_platform.cli.metrics.exporter import DEADLINE_SECONDS
from qa_platform_tests.checkout import PROJECT
from qa_platform_tests.command_lines import parse_click
from qa_platform_tests.kubernetes_types import problems

DEPLOY = PROJECT / "deploy"
VALUES: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes" / "values.yaml").read_text())
MANIFESTS: dict[str, dict[str, Any]] = {
    document["kind"]: document for document in yaml.safe_load_all((DEPLOY / "kubernetes" / "metrics.yaml").read_text())
}
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((DEPLOY / "monitoring" / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
BOARD: dict[str, Any] = json.loads((DEPLOY / "monitoring" / "board.json").read_text())
PAGE = (PROJECT / "docs" / "operating.md").read_text(encoding="utf-8")
# What the metrics do not need of what the code location is given.
NOT_NEEDED = {"QA_PRECISION", "QA_DOCS_URL", "QA_DAGSTER_URL", "QA_EXECUTOR", "QA_PIPELINES_PATCH"}


def location() -> dict[str, Any]:
    [deployment] = VALUES["dagster-user-deployments"]["deployments"]
    assert isinstance(deployment, dict)
    return deployment


def pod() -> dict[str, Any]:
    spec = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def container() -> dict[str, Any]:
    [container] = pod()["containers"]
    assert isinstance(container, dict)
    return container


def test_the_manifests_are_ones_that_kubernetes_takes() -> None:
    assert set(MANIFESTS) == {"Deployment", "Service", "ServiceMonitor"}
    for kind in ("Deployment", "Service"):
        assert list(problems(MANIFESTS[kind], f"V1{kind}")) == []


def test_the_exporter_is_found_by_its_service_and_that_by_its_monitor() -> None:
    labels = MANIFESTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    service, monitor = MANIFESTS["Service"], MANIFESTS["ServiceMonitor"]["spec"]
    assert MANIFESTS["Deployment"]["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    [port], [endpoint] = service["spec"]["ports"], monitor["endpoints"]
    assert endpoint["port"] == port["name"]
    assert {"name": port["targetPort"], "containerPort": port["port"]} in container()["ports"]
    # Otherwise the label `service` of `qa_up` is replaced by the name of the Kubernetes service.
    assert endpoint["honorLabels"]
    assert DEADLINE_SECONDS < int(endpoint["scrapeTimeout"].removesuffix("s")) < int(endpoint["interval"].removesuffix("s"))


def test_the_exporter_has_the_code_locations_image_environment_and_rights() -> None:
    environment = {entry["name"]: entry for entry in container()["env"]}
    assert environment.pop("DAGSTER_PG_PASSWORD")["valueFrom"]["secretKeyRef"]["name"] == VALUES["global"]["postgresqlSecretName"]
    assert environment == {entry["name"]: entry for entry in location()["env"] if entry["name"] not in NOT_NEEDED}
    assert container()["image"] == f"{location()['image']['repository']}:{location()['image']['tag']}"
    assert container()["securityContext"] == location()["securityContext"]
    assert pod()["securityContext"] == location()["podSecurityContext"]
    for mine, theirs in ((pod()["volumes"], location()["volumes"]), (container()["volumeMounts"], location()["volumeMounts"])):
        assert mine == [entry for entry in theirs if entry["name"] != "pipelines"]


@pytest.mark.parametrize("words", [container()["args"], COMPOSE["services"]["metrics"]["command"]])
def test_the_exporter_is_a_command_that_exists(words: list[str]) -> None:
    assert words[0] == "qa-platform"
    parse_click(main, words[1:])


def test_every_alert_is_whole_and_explained() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) >= 5
    for rule in RULES:
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}, rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("page", "warning")
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "0m"))
        assert f"`{rule['alert']}`" in PAGE, f"{rule['alert']} is not in docs/operating.md"


def test_a_heartbeat_that_never_came_is_as_bad_as_an_old_one() -> None:
    [rule] = [rule for rule in RULES if rule["alert"] == "QaHeartbeatStale"]
    old, never = rule["expr"].split(" or ")
    assert old == "time() - qa_heartbeat_timestamp_seconds > qa_heartbeat_limit_seconds"
    # The limit is served alone only if Dagster's storage was read and has no heartbeat.
    assert never == "0 * qa_heartbeat_limit_seconds unless qa_heartbeat_timestamp_seconds"
    assert rule["annotations"]["description"].startswith("{{ if $value }}")


def test_every_panel_has_its_place_and_the_boards_data_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [variable["name"] for variable in BOARD["templating"]["list"]] == ["datasource"]
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
