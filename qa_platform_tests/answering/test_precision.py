import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qa_platform.answering.model import find_model
from qa_platform.answering.precision import remember_precision, tuned_precision
from qa_platform.contract import ModelChoice
from qa_platform_tests.answering_models import make_bert


def test_what_was_found_on_one_gpu_does_not_hold_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_gpu(name: str) -> None:
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(get_device_name=lambda device: name)))

    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path))
    files = find_model(ModelChoice(str(make_bert(tmp_path / "bert"))))
    with_gpu("one GPU")
    remember_precision(files, "cuda", {"chosen": "bf16"})
    assert (tuned_precision(files, "cuda"), tuned_precision(files, "cpu")) == ("bf16", "fp32")
    with_gpu("another GPU")
    assert tuned_precision(files, "cuda") == "fp32"
