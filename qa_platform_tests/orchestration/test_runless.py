"""Events that belong to no run."""

import logging
from typing import Any

import dagster as dg
import pytest

from qa_platform.orchestration.catalog import RAW_QUESTIONS
from qa_platform.orchestration.reports.runless import store


def test_an_event_that_is_refused_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    report = dg.DagsterInstance.report_runless_asset_event

    def refuse(*_: Any) -> None:
        raise RuntimeError("refused")

    def refuse_one(self: dg.DagsterInstance, event: dg.AssetMaterialization) -> None:
        if event.partition == "1":
            refuse()
        report(self, event)

    with dg.DagsterInstance.ephemeral() as instance:
        monkeypatch.setattr(type(instance.event_log_storage), "store_event_batch", refuse)
        monkeypatch.setattr(dg.DagsterInstance, "report_runless_asset_event", refuse_one)
        store(instance, [dg.AssetMaterialization(RAW_QUESTIONS, partition=str(number)) for number in range(3)], logging.getLogger())
        found = instance.fetch_materializations(RAW_QUESTIONS, limit=5).records
    assert {each.partition_key for each in found} == {"0", "2"}
