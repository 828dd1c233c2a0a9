"""Pipeline specifications are compared as messages: pachd's two forms of one are equal, and real differences are shown."""

import json
from typing import Any

import betterproto
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pachyderm_sdk.api import pps

from qa_platform.provisioning.comparison import difference, plain
from qa_platform.provisioning.pipelines import Options, specifications
from qa_platform.settings import BucketSettings, PostgresSettings

# One pipeline, as a file has it, and as pachd 2.12.2 gives it back: in the reply to CreatePipelineV2, and later by InspectPipeline.
FILE = {
    "pipeline": {"name": "p"},
    "input": {"pfs": {"repo": "in", "glob": "/*/"}},
    "transform": {"image": "x:1", "cmd": ["true"], "datum_batching": True, "secrets": [{"name": "s", "mount_path": "/secrets/s"}]},
    "datum_tries": 2,
    "parallelism_spec": {"constant": 1},
    "datum_set_spec": {"per_worker": 1},
    "datum_timeout": "14400s",
    "autoscaling": True,
}
REPLY = (
    '{"pipeline":{"project":{"name":"default"}, "name":"p"}, "transform":{"image":"x:1", "cmd":["true"], "secrets":[{"name":"s", '
    '"mountPath":"/secrets/s"}], "datumBatching":true}, "parallelismSpec":{"constant":"1"}, "update":true, "outputBranch":"master", '
    '"resourceRequests":{"cpu":1, "memory":"256Mi", "disk":"1Gi"}, "input":{"pfs":{"repo":"in", "glob":"/*/"}}, '
    '"datumSetSpec":{"perWorker":"1"}, "datumTimeout":"14400s", "datumTries":"2", "reprocessSpec":"until_success", "autoscaling":true, '
    '"sidecarResourceRequests":{"cpu":1, "memory":"256Mi", "disk":"1Gi"}, "dryRun":true}'
)
STORED = (
    '{"autoscaling":true,"datumSetSpec":{"perWorker":1},"datumTimeout":"14400s","datumTries":2,"input":{"pfs":{"glob":"/*/","repo":"in"}},"outputBranch":"master",'
    '"parallelismSpec":{"constant":1},"pipeline":{"name":"p"},"reprocessSpec":"until_success","resourceRequests":{"cpu":1,"disk":"1Gi",'
    '"memory":"256Mi"},"sidecarResourceRequests":{"cpu":1,"disk":"1Gi","memory":"256Mi"},"transform":{"cmd":["true"],"datumBatching":true,'
    '"image":"x:1","secrets":[{"mountPath":"/secrets/s","name":"s"}]}}'
)
# The same with all that pachd fills in when it works with it.
WHOLE = {
    **FILE,
    "pipeline": {"project": {"name": "default"}, "name": "p"},
    "input": {"pfs": {"project": "default", "name": "in", "repo": "in", "repoType": "user", "branch": "master", "glob": "/*"}},
    "outputBranch": "master",
    "reprocessSpec": "until_success",
    "salt": "31c7e077042042ca82fdae50faa52f4f",
}
FORMS = {"file": json.dumps(FILE), "reply": REPLY, "stored": STORED, "whole": json.dumps(WHOLE)}


@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
def test_all_forms_of_one_specification_are_the_same(old: str, new: str) -> None:
    assert difference(FORMS[old], FORMS[new]) == ""


@pytest.mark.parametrize("cron", [False, True])
def test_the_specifications_of_the_project_are_the_same_in_every_form(cron: bool) -> None:
    for _, spec in specifications(Options(cron=cron), PostgresSettings(), bucket=BucketSettings()):
        text = json.dumps(spec)
        request = pps.CreatePipelineRequest().from_dict(json.loads(text))
        assert difference(text, request.to_json(casing=betterproto.Casing.CAMEL)) == ""
        assert difference(text, json.dumps(plain(text))) == ""


def test_a_difference_is_shown_in_the_words_of_a_file() -> None:
    shown = difference(STORED, REPLY.replace('"datumTries":"2"', '"datumTries":"7"').replace('"mountPath"', '"mount_path"'))
    changed = [line.strip() for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("---", "+++")]
    assert changed == ['-  "datum_tries": 2,', '+  "datum_tries": 7,']


CHANGES: list[dict[str, Any]] = [
    {"pipeline": {"name": "p", "project": {"name": "other"}}},
    {"input": {"pfs": {"repo": "in", "glob": "/*/*"}}},
    {"input": {"pfs": {"repo": "in", "glob": "/*", "branch": "staging"}}},
    {"input": {"pfs": {"repo": "in", "glob": "/*", "name": "files"}}},
    {"input": {"pfs": {"repo": "in", "glob": "/*", "emptyFiles": True}}},
    {"transform": {**FILE["transform"], "image": "x:2"}},  # type: ignore[dict-item]
    {"transform": {**FILE["transform"], "secrets": [{"name": "s", "env_var": "A", "key": "a"}]}},  # type: ignore[dict-item]
    {"transform": {**FILE["transform"], "env": {"A": "1"}}},  # type: ignore[dict-item]
    {"parallelism_spec": {"constant": "4"}},
    {"datum_set_spec": {"number": 8}},
    {"datum_timeout": "90s"},
    {"resource_requests": {"cpu": 0.5}},
    {"resource_requests": {"memory": "1Gi"}},
    {"reprocess_spec": "every_job"},
    {"output_branch": "staging"},
    {"autoscaling": False},
    {"description": "new"},
    {"tolerations": [{"key": "gpu", "operator": "EXISTS", "toleration_seconds": "0"}]},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: json.dumps(change)[:60])
def test_every_real_difference_is_seen(change: dict[str, Any]) -> None:
    assert difference(STORED, json.dumps({**FILE, **change})) != ""


@pytest.mark.parametrize("change", [{"update": True}, {"reprocess": True}, {"dry_run": True}, {"salt": "a"}, {"metadata": {}}])
def test_how_a_specification_is_applied_is_no_part_of_it(change: dict[str, Any]) -> None:
    assert difference(STORED, json.dumps({**FILE, **change})) == ""


def test_the_start_of_a_cron_input_counts_only_where_the_file_gives_one() -> None:
    def ticking(**more: str) -> str:
        return json.dumps({**FILE, "input": {"cron": {"name": "tick", "spec": "@every 60s", **more}}})

    old = ticking(start="2026-01-02T03:04:05.123456Z", repo="p_tick", project="default")
    assert difference(old, ticking()) == ""
    assert difference(old, ticking(), with_start=True) != ""
    assert difference(ticking(), ticking(overwrite="")) == ""


def test_values_of_the_environment_are_not_shown() -> None:
    def with_env(**env: str) -> str:
        return json.dumps({**FILE, "transform": {"image": "x:1", "env": env}})

    shown = difference(with_env(PGPASSWORD="hunter2", A="1"), with_env(PGPASSWORD="hunter3", B="1"))
    assert "hunter" not in shown
    assert "*** (another value)" in shown


numbers = st.integers(1, 2**62)
specs = st.fixed_dictionaries(
    {"pipeline": st.fixed_dictionaries({"name": st.just("p")}, optional={"project": st.just({"name": "default"})})},
    optional={
        "input": st.fixed_dictionaries(
            {"pfs": st.fixed_dictionaries({"repo": st.just("in")}, optional={"glob": st.sampled_from(["/*", "/*/", "*"])})}
        ),
        "datum_tries": numbers,
        "parallelism_spec": st.fixed_dictionaries({"constant": numbers}),
        "datum_set_spec": st.fixed_dictionaries({}, optional={"number": numbers, "size_bytes": numbers, "per_worker": numbers}),
        "datum_timeout": st.integers(1, 10**6).map("{}s".format),
        "resource_requests": st.fixed_dictionaries({}, optional={"cpu": st.sampled_from([1, 2, 0.5]), "memory": st.just("1Gi")}),
        "transform": st.fixed_dictionaries(
            {}, optional={"env": st.dictionaries(st.sampled_from("AB"), st.just("x")), "accept_return_code": st.lists(numbers)}
        ),
    },
)


def in_another_form(value: Any, name: str = "") -> Any:
    """The same in protobuf's own JSON: keys in camel case, whole numbers as text. Names of environment variables are no keys of it."""
    if isinstance(value, dict):
        return {key if name == "env" else betterproto.casing.camel_case(key): in_another_form(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [in_another_form(part) for part in value]
    return str(value) if isinstance(value, int) and name != "cpu" else value


@given(specs)
def test_case_of_keys_and_kind_of_numbers_make_no_difference(spec: dict[str, Any]) -> None:
    assert difference(json.dumps(spec), json.dumps(in_another_form(spec))) == ""


@given(specs, specs)
def test_two_specifications_are_the_same_exactly_if_their_plain_forms_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    old, new = json.dumps(one), json.dumps(in_another_form(other))
    assert (difference(old, new) == "") == (plain(old) == plain(new)) or "env" in str((one, other))
