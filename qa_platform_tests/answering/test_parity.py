"""The engine compared with transformers 4.57's pipeline, which runs in a separate process.

They are compared under the definition of equality in docs/model.md: the pipeline's span is widened to whole characters, and if an answer
has several mentions, the engine is asked for the pipeline's choice.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from transformers import AutoTokenizer

from qa_platform.answering import Answer, Answerer
from qa_platform.answering.model import BUNDLED_FOLDER, find_model, load_tokenizer
from qa_platform.answering.runtimes.base import WindowBatch, pad
from qa_platform.answering.runtimes.graph import supports
from qa_platform.answering.runtimes.openvino import OpenVinoRuntime
from qa_platform.answering.runtimes.torch import TorchRuntime
from qa_platform.answering.windows import Layout, WindowSize, tokenize
from qa_platform.contract import ModelChoice, RowReason
from qa_platform.errors import InputError
from qa_platform.evaluation.gold import GoldAnswer, GoldQuestion, read_gold
from qa_platform.evaluation.tune import tune
from qa_platform.tools.bench.reference import ORACLE_FOLDER, ReferenceAnswer, ReferenceRequest, run_reference
from qa_platform_tests.answering_models import FAMILIES, make_bert, make_model, pairs

GOLD = Path(__file__).parents[2] / "samples" / "gold.csv"
ON_OPENVINO = ("bert", "distilbert", "roberta", "albert", "electra")

needs_oracle = pytest.mark.skipif(not ORACLE_FOLDER.is_dir(), reason=f"the reference is not installed in {ORACLE_FOLDER}: run make setup")


def same(ours: Answer, theirs: ReferenceAnswer, context: str) -> bool:
    borders = [*(match.start() for match in regex.finditer(r"\X", context)), len(context)]
    start = max(border for border in borders if border <= theirs.start)
    end = min(border for border in borders if border >= theirs.end)
    return (ours.answer, ours.start, ours.end) == (context[start:end], start, end)


def different_rows(
    rows: Iterable[tuple[str, str]], answers: Iterable[Answer], reference: Iterable[ReferenceAnswer]
) -> list[tuple[str, Answer, ReferenceAnswer]]:
    """The questions that are not answered alike, with both answers."""
    together = zip(rows, answers, reference, strict=True)
    return [(question, ours, theirs) for (question, context), ours, theirs in together if not same(ours, theirs, context)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.slow
@needs_oracle
def test_every_family_answers_as_the_reference_does(folders: dict[str, Path]) -> None:
    # Texts may spell a model's own tokens, too.
    rows = [
        *pairs(40, longest=150),
        ("Who [SEP] keeps <pad> it?", "[CLS] Marta <pad> Olsen </s> keeps it, [PAD] northern <s> museum <mask> x"),
    ]
    runs = run_reference([ReferenceRequest(str(folders[family]), tuple(rows), threads=1) for family in FAMILIES])
    for family, run in zip(FAMILIES, runs, strict=True):
        answers = Answerer(str(folders[family]), threads=1).answer(rows, best_mention=False)
        different = different_rows(rows, answers, run.best)
        # Where a token is a part of an emoji, two candidates of the pipeline can be one answer here, whose probability is their sum.
        assert len(different) <= 1, (family, different)


@pytest.mark.slow
@needs_oracle
def test_the_bundled_model_answers_as_the_reference_does_on_the_samples() -> None:
    rows = [(question.question, question.context) for question in read_gold(GOLD)]
    (run,) = run_reference([ReferenceRequest(str(BUNDLED_FOLDER), tuple(rows), threads=1)])
    answers = list(Answerer("bundled").answer(rows))
    differences = different_rows(rows, answers, run.best)
    assert len(differences) <= 0.003 * len(rows), differences
    score = find_model(ModelChoice("bundled")).calibration.score
    expected = [score(min(theirs.score, 1.0)) for theirs in run.best]
    assert [ours.score for ours in answers] == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
@needs_oracle
def test_options_mean_what_they_mean_in_the_reference(tmp_path: Path) -> None:
    folder = make_bert(tmp_path)
    rows = tuple(pairs(15, seed=21, longest=200))
    choices: list[dict[str, Any]] = [
        {"max_answer_len": 3},
        {"max_answer_len": 60},
        {"max_seq_len": 96, "doc_stride": 16},
        {"max_seq_len": 64, "doc_stride": 10, "max_answer_len": 5},
        {"handle_impossible_answer": True},
        {"align_to_words": False},
        {"top_k": 3},
    ]
    runs = run_reference([ReferenceRequest(str(folder), rows, threads=1, options=options) for options in choices])
    answerer = Answerer(str(folder), threads=1)
    for options, run in zip(choices, runs, strict=True):
        for answer, reference, (_, context) in zip(answerer.answer(rows, **options, best_mention=False), run.answers, rows, strict=True):
            if isinstance(reference, str):
                assert answer.error is RowReason.QUESTION_EXCEEDS_WINDOW or answer.answer, (options, reference)
                continue
            assert same(answer, reference[0], context), options
            # The others are as they are there, but for marks.
            assert len(answer.alternatives) == len(reference) - 1, options
            for ours, theirs in zip(answer.alternatives, reference[1:], strict=True):
                assert ours.text.startswith(theirs.answer), options


@pytest.mark.slow
@needs_oracle
@pytest.mark.parametrize("top_k", [1, 2])
def test_unwidened_answers_are_those_of_the_reference_where_texts_are_mentioned_several_times(top_k: int) -> None:
    places = ["Paris", "Rome", "Oslo", "Berlin"]
    questions = ["Where did the man go?", "Which city was visited?", "Where did she travel?", "Which place is nice?"]
    rows = [
        (question, f"The man went to {a}. She saw {b} in spring. They travelled to {c}. A visit to {d} is nice.")
        for question in questions
        for one, other in itertools.permutations(places, 2)
        for a, b, c, d in ((one, other, one, one), (other, one, one, other), (one, other, one, other))
    ]
    options: dict[str, Any] = {"align_to_words": False, "top_k": top_k}
    (run,) = run_reference([ReferenceRequest(str(BUNDLED_FOLDER), tuple(rows), threads=1, options=options)])
    answers = Answerer("bundled", threads=1).answer(rows, **options, best_mention=False)
    assert different_rows(rows, answers, run.best) == []


@pytest.mark.slow
@needs_oracle
def test_the_best_mention_is_another_than_the_references_in_few_rows(record_property: Callable[[str, object], None]) -> None:
    questions = list(read_gold(GOLD))
    contexts = list(dict.fromkeys(question.context for question in questions))
    # Contexts of several windows, in which an answer may stand several times.
    rows = [(question.question, " ".join(contexts[number % 7 :: 7])) for number, question in enumerate(questions[::2])]
    (run,) = run_reference([ReferenceRequest(str(BUNDLED_FOLDER), tuple(rows), threads=1)])
    answerer = Answerer("bundled")
    first = list(answerer.answer(rows, best_mention=False))
    assert different_rows(rows, first, run.best) == []
    best = list(answerer.answer(rows))
    assert [answer.answer.lower() for answer in best] == [answer.answer.lower() for answer in first]
    assert [answer.score for answer in best] == [answer.score for answer in first]
    moved = [(ours.start, theirs.start) for ours, theirs in zip(best, run.best, strict=True) if ours.start != theirs.start]
    record_property("rows with another place", f"{len(moved)} of {len(rows)}")
    assert 0 < len(moved) <= 0.2 * len(rows)


@pytest.mark.slow
@needs_oracle
@pytest.mark.skipif("QA_PARITY_DATA" not in os.environ, reason="QA_PARITY_DATA names no folder of SQuAD JSON")
@pytest.mark.timeout(1800)
def test_the_bundled_model_answers_as_the_reference_does_on_a_large_set(record_property: Callable[[str, object], None]) -> None:
    gold = [question for path in sorted(Path(os.environ["QA_PARITY_DATA"]).rglob("*.json")) for question in read_gold(path)]
    rows = [(question.question, question.context) for question in gold[:: max(1, len(gold) // 2000)]]
    (run,) = run_reference([ReferenceRequest(str(BUNDLED_FOLDER), tuple(rows))])
    answerer = Answerer("bundled")
    differences = [row for row in zip(rows, answerer.answer(rows), run.best, strict=True) if not same(row[1], row[2], row[0][1])]
    # In the report also where they are few enough.
    record_property("differences", [(pair[0], ours.answer, theirs.answer) for pair, ours, theirs in differences])
    assert len(differences) <= 0.003 * len(rows), differences
    for pair, _, theirs in differences:
        (best,) = answerer.answer([pair], top_k=20)
        scores = {text.lower(): score for text, score in ((best.answer, best.score), *((s.text, s.score) for s in best.alternatives))}
        assert scores[theirs.answer.lower()] == pytest.approx(best.score, rel=1e-3), "the two are as good as each other, but for rounding"


@pytest.mark.slow
@pytest.mark.parametrize("family", ON_OPENVINO)
def test_logits_equal_those_of_transformers(folders: dict[str, Path], family: str) -> None:
    files = find_model(ModelChoice(str(folders[family])))
    assert supports(files)
    layout = Layout.of(load_tokenizer(files))
    rng = np.random.default_rng(1)
    lengths = np.array([40, 17], np.int32)
    ids = rng.integers(5, 60, (2, 40), dtype=np.int32)
    types = np.full((2, 40), layout.question_type, np.int32)
    types[:, 9:] = layout.context_type
    ids[1, 17:] = 0
    batch = WindowBatch(ids, types, lengths)
    ours = OpenVinoRuntime(files, precision="fp32", threads=1).run(batch)
    theirs = TorchRuntime(files, precision="fp32", threads=1, device="cpu").run(batch)
    for left, right in zip(ours, theirs, strict=True):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(left[row, :length], right[row, :length], atol=2e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ON_OPENVINO)
def test_int8_logits_follow_float32_in_every_family(folders: dict[str, Path], family: str) -> None:
    files = find_model(ModelChoice(str(folders[family])))
    tokenizer = load_tokenizer(files)
    layout = Layout.of(tokenizer)
    tokenized = tokenize(tokenizer, layout, pairs(6), WindowSize.of(384, None))
    batch = pad([window for row in tokenized for window in row.windows], layout)
    real = np.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    exact = OpenVinoRuntime(files, precision="fp32", threads=1).run(batch)
    rounded = OpenVinoRuntime(files, precision="int8", threads=1).run(batch)
    for left, right in zip(rounded, exact, strict=True):
        # How near depends on the processor: without 8-bit dot products (VNNI), OpenVINO's sums saturate.
        assert not np.array_equal(left[real], right[real])
        assert np.corrcoef(left[real], right[real])[0, 1] > 0.8


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused_by_name(folders: dict[str, Path], device: str) -> None:
    with pytest.raises(InputError, match=device):
        TorchRuntime(find_model(ModelChoice(str(folders["bert"]))), precision="fp32", threads=1, device=device)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_bfloat16_on_torch_stays_near_float32(folders: dict[str, Path], family: str) -> None:
    files = find_model(ModelChoice(str(folders[family])))
    ids = np.random.default_rng(2).integers(5, 60, (3, 24), dtype=np.int32)
    batch = WindowBatch(ids, np.zeros_like(ids), np.array([24, 24, 24], np.int32))
    exact = TorchRuntime(files, precision="fp32", threads=1, device="cpu").run(batch)
    half = TorchRuntime(files, precision="bf16", threads=1, device="cpu").run(batch)
    for left, right in zip(half, exact, strict=True):
        assert left.dtype == np.float32
        assert np.abs(left - right).mean() < 0.1 * np.abs(right).max()


def test_a_precision_that_a_model_does_not_run_in_is_refused_and_not_tuned(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QA_CACHE_DIR", str(tmp_path))
    model = str(folders["deberta"])
    for precision in ("bf16", "int8"):
        with pytest.raises(InputError, match=precision):
            Answerer(ModelChoice(model, precision=precision), threads=1).warm_up()
    gold = GoldQuestion("1", "g", "Who keeps it?", "Marta Olsen keeps it.", (GoldAnswer("Marta Olsen", None),))
    found = tune(ModelChoice(model), [gold], threads=1)
    assert (found.chosen, [trial.precision for trial in found.trials]) == ("fp32", ["fp32"])


@needs_oracle
@pytest.mark.parametrize("wanted", [True, False])
def test_a_prefix_space_is_added_as_the_tokenizers_config_says(tmp_path: Path, wanted: bool) -> None:
    folder = make_model("roberta", tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = not wanted
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": wanted}))
    rows = [(f"{q.split()[0]} keeps it?", " ".join(c.split())) for q, c in pairs(30, longest=40)]
    (run,) = run_reference([ReferenceRequest(str(folder), tuple(rows), threads=1)])
    answers = Answerer(str(folder), threads=1).answer(rows, best_mention=False)
    assert len(different := different_rows(rows, answers, run.best)) <= 1, different


def test_a_prefix_space_moves_no_offset(tmp_path: Path) -> None:
    folder = make_model("roberta", tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": True}))
    ours = load_tokenizer(find_model(ModelChoice(str(folder)))).encode("Who?", "Marta keeps it.")
    theirs = AutoTokenizer.from_pretrained(folder)("Who?", "Marta keeps it.", return_offsets_mapping=True)
    assert (ours.ids, ours.offsets) == (theirs.input_ids, theirs.offset_mapping)
