"""The code location: it loads fast, without the model's libraries, and Dagster accepts it."""

import subprocess
import sys
from datetime import timedelta

import dagster as dg
import psycopg
import pytest
import yaml  # type: ignore[import-untyped]  # Dagster brings it, without types
from pydantic import ValidationError

from qa_platform.answering.model import BUNDLED, BUNDLED_FOLDER, BUNDLED_REVISION_FILE, bundled_revision, find_model
from qa_platform.answering.version import code_version, current_code_version
from qa_platform.clients.services import Services
from qa_platform.contract import ANSWER_COLUMNS, ModelChoice
from qa_platform.definitions import defs
from qa_platform.embedded.stack import Stack
from qa_platform.errors import InputError
from qa_platform.orchestration.assets.raw import raw_questions
from qa_platform.orchestration.catalog import (
    ANSWERED_QUESTIONS,
    ANSWERED_SCHEMA,
    COLUMN_LINEAGE,
    MODEL_QUALITY,
    PLATFORM_STATUS,
    QUESTION_ANSWER,
    RAW_QUESTIONS,
    RAW_SCHEMA,
    TABLE_SCHEMA,
    AssetFactory,
    documentation,
)
from qa_platform.orchestration.partitions import POOL
from qa_platform.orchestration.resources import platform_resource
from qa_platform.orchestration.sensors.heartbeat import HEARTBEAT, incoming_listing
from qa_platform.provisioning.project_files import project_file
from qa_platform.settings import BucketSettings, CatalogSettings, ModelSettings, WorkSettings

# Our own part of the time that loading the definitions takes, and what it draws in besides, beside their libraries alone.
MORE_THAN_LIBRARIES = 1.5


def test_definitions_import_neither_torch_nor_transformers_nor_a_runtime() -> None:
    # Not installed beside Dagster.
    workers = ("torch", "transformers", "openvino", "tokenizers", "huggingface_hub", "safetensors")
    program = (
        f"import sys, qa_platform.definitions; print(sorted(set({workers}) & set(sys.modules)), 'qa_platform.definitions' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:qa_platform", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[] True", done.stderr


def test_a_variable_that_the_code_location_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_ANSWERED_PREFIX", "incoming/")
    done = subprocess.run([sys.executable, "-c", "import qa_platform.definitions"], capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert "InputError: the environment cannot be used: QA_ANSWERED_PREFIX: it must end with a slash" in last
    assert "validation error" not in done.stderr


def test_definitions_load_in_little_more_than_their_libraries() -> None:
    """Counted as processor time, which a busy machine does not stretch, and as a share, which a slow one does not."""
    program = (
        "import time; import dagster, dagster_gcp, google.cloud.storage, pachyderm_sdk, psycopg, pydantic_settings; "
        "libraries = time.process_time(); import qa_platform.definitions; print(time.process_time() / libraries)"
    )
    taken = [float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    assert min(taken) < MORE_THAN_LIBRARIES


def test_dagster_accepts_the_workspace(stack: Stack) -> None:
    command = ["dagster", "definitions", "validate", "-w", "workspace.yaml"]
    done = subprocess.run(command, env=stack.environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "All code locations passed validation" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def specs() -> dict[dg.AssetKey, dg.AssetSpec]:
    return {spec.key: spec for spec in defs.resolve_all_asset_specs()}


def test_every_asset_is_described_owned_and_grouped(specs: dict[dg.AssetKey, dg.AssetSpec]) -> None:
    assert set(specs) == {RAW_QUESTIONS, ANSWERED_QUESTIONS, QUESTION_ANSWER, MODEL_QUALITY, HEARTBEAT, PLATFORM_STATUS}
    for spec in specs.values():
        assert spec.description
        assert spec.group_name == "questions"
        assert spec.kinds
        assert spec.owners == ["team:question-answering"]
        page = spec.metadata["documentation"].value
        assert page.startswith("docs/")
        assert project_file(page).is_file()


def test_the_heartbeat_has_a_freshness_policy_and_the_uploads_have_one_where_they_are_expected(
    specs: dict[dg.AssetKey, dg.AssetSpec],
) -> None:
    assert specs[HEARTBEAT].freshness_policy
    assert specs[RAW_QUESTIONS].freshness_policy is None
    expected = raw_questions(AssetFactory(CatalogSettings()), expected_hours=30).freshness_policy
    assert expected
    assert expected.fail_window.to_timedelta() == timedelta(hours=30)  # type: ignore[attr-defined]


def test_a_heart_that_beats_every_second_does_not_cost_the_definitions() -> None:
    spec = incoming_listing(AssetFactory(CatalogSettings()), WorkSettings(heartbeat_seconds=1, sensor_seconds=1))
    assert spec.freshness_policy.fail_window.to_timedelta() == timedelta(minutes=1)  # type: ignore[union-attr]


def test_the_columns_of_the_catalogue_are_those_of_the_table(stack: Stack) -> None:
    query = """
        SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
        WHERE attrelid = 'question_answer'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
    """
    with psycopg.connect(stack.variables["QA_DATABASE_URL"], password=stack.tokens["postgres"]) as connection:
        columns = connection.execute(query).fetchall()
    assert [(column.name, column.type) for column in TABLE_SCHEMA.columns] == columns
    assert all(column.description for schema in (RAW_SCHEMA, ANSWERED_SCHEMA, TABLE_SCHEMA) for column in schema.columns)
    assert tuple(column.name for column in ANSWERED_SCHEMA.columns)[-len(ANSWER_COLUMNS) :] == ANSWER_COLUMNS


def test_columns_come_from_columns_that_there_are() -> None:
    names = {
        key: {column.name for column in schema.columns}
        for key, schema in ((RAW_QUESTIONS, RAW_SCHEMA), (ANSWERED_QUESTIONS, ANSWERED_SCHEMA), (QUESTION_ANSWER, TABLE_SCHEMA))
    }
    for asset, lineage in COLUMN_LINEAGE.items():
        for column, sources in lineage.deps_by_column.items():
            assert column in names[asset]
            assert all(source.column_name in names[source.asset_key] for source in sources)


def test_the_code_version_names_the_model_and_its_revision(specs: dict[dg.AssetKey, dg.AssetSpec]) -> None:
    assert specs[QUESTION_ANSWER].code_version == specs[ANSWERED_QUESTIONS].code_version == current_code_version(ModelSettings().choice)
    assert current_code_version(ModelSettings().choice).startswith("1-bundled@")
    of_hub = code_version(ModelChoice("a/b", "main", "bf16"), revision_of_bundled="unused")
    assert of_hub == "1-a/b@main-bf16"
    assert code_version(ModelChoice("a/b", "main", "bf16", -0.5), revision_of_bundled="unused") == "1-a/b@main-bf16-no_answer>-0.5"
    assert all(spec.code_version for spec in specs.values())


def test_a_threshold_for_no_answer_is_handed_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("QA_NO_ANSWER_THRESHOLD", "-0.5")
    assert platform_resource(BucketSettings()).services().model == ModelChoice("bundled", no_answer_threshold=-0.5)
    for value in ("nan", "inf"):
        monkeypatch.setenv("QA_NO_ANSWER_THRESHOLD", value)
        with pytest.raises(ValidationError, match="finite number"):
            ModelSettings()


def test_a_precision_that_workers_would_resolve_by_themselves_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    monkeypatch.setenv("QA_PRECISION", "bf16")
    assert platform_resource(BucketSettings()).services().model == ModelChoice("bundled", "", "bf16")
    monkeypatch.setenv("QA_PRECISION", "auto")
    for services in (platform_resource(BucketSettings()).services, Services.from_environment):
        with pytest.raises(InputError, match=r"QA_PRECISION is auto.*qa-platform tune"):
            services()
    # What the commands on this machine do with it is their own affair.
    assert ModelSettings().choice.precision == "auto"


def test_the_recorded_revision_is_that_of_the_bundled_weights_and_is_there_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    refresh = (
        'python -c "from qa_platform.answering.model import *; '
        'BUNDLED_REVISION_FILE.write_text(find_model(ModelChoice(BUNDLED)).revision + chr(10))"'
    )
    assert bundled_revision() == find_model(ModelChoice(BUNDLED)).revision, f"the weights have changed: {refresh}"
    # As in images that answer nothing, which are built without this folder.
    monkeypatch.setattr("qa_platform.answering.model.BUNDLED_FOLDER", BUNDLED_FOLDER.parent / "removed")
    assert current_code_version(ModelSettings().choice) == f"1-bundled@{bundled_revision()}-fp32"
    assert BUNDLED_FOLDER.parent not in BUNDLED_REVISION_FILE.parents


def test_documentation_is_a_link_where_its_address_is_known() -> None:
    settings = CatalogSettings(docs_url="https://example.org/docs/")
    assert documentation(settings, "model.md") == dg.MetadataValue.url("https://example.org/docs/model.md")


def test_what_answers_files_is_in_the_pool_and_leaves_a_run_for_the_rest() -> None:
    concurrency = yaml.safe_load(project_file("dagster.yaml").read_text())["concurrency"]
    assert concurrency["pools"]["granularity"] == "run"
    assert concurrency["pools"]["default_limit"] < concurrency["runs"]["max_concurrent_runs"]
    for job in ("answer_questions", "answer_pending_files"):
        (node,) = defs.resolve_job_def(job).graph.node_defs
        assert isinstance(node, dg.OpDefinition)
        assert node.pool == POOL
