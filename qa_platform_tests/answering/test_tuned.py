import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qa_platform.answering.model import find_model
from qa_platform.answering.tuned import remember_precision, remember_threshold, tuned_precision, tuned_threshold
from qa_platform.contract import ModelChoice
from qa_platform.errors import InputError
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


def test_precision_and_threshold_of_a_model_are_stored_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path / "cache"))
    files, other = (find_model(ModelChoice(str(make_bert(tmp_path / name, seed=seed)))) for name, seed in (("one", 1), ("other", 2)))
    assert tuned_threshold(files, "cpu") is None
    remember_precision(files, "cpu", {"chosen": "bf16", "trials": []})
    remember_threshold(files, "cpu", -1.5)
    assert (tuned_precision(files, "cpu"), tuned_threshold(files, "cpu")) == ("bf16", -1.5)
    remember_precision(files, "cpu", {"chosen": "int8", "trials": []})
    assert (tuned_precision(files, "cpu"), tuned_threshold(files, "cpu")) == ("int8", -1.5)
    assert tuned_threshold(other, "cpu") is None
    (stored,) = (tmp_path / "cache").rglob("*.json")
    stored.write_text("[1")
    assert (tuned_precision(files, "cpu"), tuned_threshold(files, "cpu")) == ("fp32", None)


def test_what_was_tuned_holds_however_the_folder_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bert(tmp_path / "model")
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    remember_threshold(find_model(ModelChoice("model")), "cpu", 3.25)
    for spelled in ("model/", "./model", str(tmp_path / "model")):
        assert tuned_threshold(find_model(ModelChoice(spelled)), "cpu") == 3.25


def test_without_a_home_nothing_is_stored_and_storing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As of a user without a home: nobody has this name.
    monkeypatch.setenv("QA_CACHE_DIR", "~no-such-user/cache")
    files = find_model(ModelChoice(str(make_bert(tmp_path / "bert"))))
    assert (tuned_precision(files, "cpu"), tuned_threshold(files, "cpu")) == ("fp32", None)
    with pytest.raises(InputError, match="QA_CACHE_DIR"):
        remember_threshold(files, "cpu", 0.5)
