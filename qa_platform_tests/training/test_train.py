"""The training script, on a tiny model and a few questions."""

import json
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from qa_platform.answering.calibration import Calibration
from qa_platform.answering.model import find_model
from qa_platform.contract import ModelChoice
from qa_platform.errors import InputError
from qa_platform.evaluation.gold import GoldAnswer, GoldQuestion, held_out
from qa_platform.training import data
from qa_platform.training import teacher as asking
from qa_platform.training import train as training
from qa_platform.training.calibrate import write
from qa_platform.training.data import LONGEST_ANSWER, Example, Guess, Recipe, arithmetic, features, masked, negatives, shortened, tensors
from qa_platform.training.losses import divergence, loss_of
from qa_platform.training.teacher import UNLIKELY, taught
from qa_platform.training.train import train, train_averaged
from qa_platform_tests.answering_models import make_model

pytestmark = pytest.mark.slow

RECIPE = Recipe(epochs=2, learning_rate=2e-3, tokens_per_batch=1600, weight_decay=0.01, negatives=0.1, masked=0.1, left_out=0.5, seed=3)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(training, "WARM_UP_STEPS", 5)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("bert", tmp_path_factory.mktemp("start"))


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))


def untaught(count: int) -> list[Example]:
    return [Example(question) for question in gold(count)]


def gold(count: int) -> list[GoldQuestion]:
    rng = random.Random(5)
    questions = []
    for number in range(count):
        words = [rng.choice(["harbour", "keeper", "river", "orchard", "copper", "kettle"]) for _ in range(30)]
        words[place := rng.randrange(30)] = "1987"
        begin = len(" ".join([*words[:place], ""]))
        answers = (GoldAnswer("1987", begin), GoldAnswer("1987", begin))
        questions.append(GoldQuestion(str(number), f"article {number % 4}", "museum opened", " ".join(words), answers))
    return questions


def losses(out: Path) -> list[float]:
    lines = (out.with_name(out.name + ".work") / "train_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_training_learns_and_writes_an_ordinary_folder(start: Path, tmp_path: Path) -> None:
    calibrated = shutil.copytree(start, tmp_path / "calibrated")
    write(calibrated, Calibration(0.5, 0.5))
    train(calibrated, untaught(480), tmp_path / "model", RECIPE)
    assert find_model(ModelChoice(str(tmp_path / "model"))).calibration == Calibration(), "it was that of other weights"
    first, *_, last = losses(tmp_path / "model")
    assert last < first / 2
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    question = gold(1)[0]
    encoded = tokenizer(question.question, question.context, return_tensors="pt")
    with torch.no_grad():
        out = model(**encoded)
    span = encoded["input_ids"][0, out.start_logits.argmax() : out.end_logits.argmax() + 1]
    assert tokenizer.decode(span) == "1987"


def test_a_cpu_that_has_no_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for capability in ("DEFAULT", "AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        found[capability] = (arithmetic("cpu:0"), arithmetic("cuda"))
    single, half = torch.float32, torch.bfloat16
    assert found == {"DEFAULT": (single, half), "AVX2": (single, half), "AVX512": (half, half)}


def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_weights(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 3)
    questions = untaught(160)
    train(start, questions, tmp_path / "whole", RECIPE)

    calls = iter(range(5))

    def dying(batch: dict[str, torch.Tensor], share: float, mask: int, special: list[int]) -> dict[str, torch.Tensor]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return masked(batch, share, mask, special)

    with monkeypatch.context() as patch:
        patch.setattr(training, "masked", dying)
        with pytest.raises(KeyboardInterrupt):
            train(start, questions, tmp_path / "resumed", RECIPE)
    assert not (tmp_path / "resumed").exists()
    train(start, questions, tmp_path / "resumed", RECIPE)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


def test_each_round_starts_from_the_average_of_the_members_before(start: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1)
    train_averaged(start, untaught(64), tmp_path / "model", recipe, members=2, rounds=2)
    folders = [tmp_path / f"model{name}" for name in ("", ".round-2.member-1", ".round-2.member-2")]
    mean, *members = (load_file(folder / "model.safetensors") for folder in folders)
    name = "qa_outputs.weight"
    assert not torch.equal(members[0][name], members[1][name]), "the members differ in their seeds"
    assert torch.allclose(mean[name].float(), (members[0][name].float() + members[1][name].float()) / 2, atol=1e-3)
    AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model")
    again = tmp_path / "again"
    later = replace(recipe, seed=RECIPE.seed + 2, learning_rate=RECIPE.learning_rate / 2)
    train(tmp_path / "model.round-1", untaught(64), again, later)
    assert (again / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()


def test_every_annotators_answer_is_right(start: Path) -> None:
    tokenizer = tokenizer_of(start)
    context = "the keeper of the harbour opened the museum"
    answers = tuple(GoldAnswer(text, context.index(text)) for text in ("keeper", "the keeper", "keeper"))
    ((window,),) = features(tokenizer, [Example(GoldQuestion("1", "a", "who opened the museum", context, answers))])
    spans = {tokenizer.decode(window.ids[first : last + 1]): share for first, last, share in window.spans}
    assert spans == {"keeper": pytest.approx(2 / 3), "the keeper": pytest.approx(1 / 3)}
    model = BertForQuestionAnswering(BertConfig.from_pretrained(start)).eval()
    batch = tensors([window], tokenizer)
    with torch.no_grad():
        out = model(**{name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")})
        starts, ends = (logits[0, : len(window.ids)].softmax(-1) for logits in (out.start_logits, out.end_logits))
        right = sum(share * starts[first] * ends[last] for first, last, share in window.spans)
        right_f1 = expected_f1_by_hand(starts, ends, [(first, last) for first, last, _ in window.spans])
        assert loss_of(model, batch).item() == pytest.approx(-torch.log(torch.as_tensor(right)).item() + 1 - right_f1, rel=1e-4)


def expected_f1_by_hand(starts: torch.Tensor, ends: torch.Tensor, right: list[tuple[int, int]]) -> float:
    spans = [(i, j) for i in range(len(starts)) for j in range(i, min(len(ends), i + LONGEST_ANSWER))]
    weights = [float(starts[i] * ends[j]) for i, j in spans]
    best = [max(2 * len({*range(i, j + 1)} & {*range(a, b + 1)}) / (j - i + b - a + 2) for a, b in right) for i, j in spans]
    return sum(weight * f1 for weight, f1 in zip(weights, best, strict=True)) / sum(weights)


def test_answers_that_are_too_long_to_be_given_are_learnt_by_their_beginning(start: Path) -> None:
    tokenizer = tokenizer_of(start)
    context = "kettle " * 40
    long, short = GoldAnswer("kettle " * 29 + "kettle", 7), GoldAnswer("kettle", 14)
    questions = [GoldQuestion("1", "a", "museum", context, answers) for answers in ((long, short), (long,))]
    ((both,), (only,)) = features(tokenizer, [Example(question) for question in questions])
    assert both.spans == ((5, 5, 1.0),)
    assert only.spans == ((4, 4 + LONGEST_ANSWER - 1, 1.0),)


@given(st.lists(st.sampled_from(["Dr. Who", "the U.S. Senate", "a river ran", "by night!", "(so.)", "in 1987."]), min_size=1), st.randoms())
def test_what_is_left_of_a_context_holds_every_answer(sentences: list[str], rng: random.Random) -> None:
    context = " ".join(sentences)
    starts = rng.choices(range(len(context)), k=3)
    answers = [GoldAnswer(context[at : at + rng.randrange(1, 20)].rstrip(), at) for at in starts if not context[at].isspace()]
    left = shortened(Example(GoldQuestion("1", "a", "who", context, tuple(answers))), 1.0, rng).gold
    assert [answer.text for answer in left.answers] == [answer.text for answer in answers]
    for answer in left.answers:
        assert answer.start is not None
        assert left.context[answer.start :].startswith(answer.text)


def test_sentences_without_an_answer_are_left_out() -> None:
    question = GoldQuestion("1", "a", "who", "A kettle sang. The keeper slept. Rain fell.", (GoldAnswer("keeper", 19),))
    rng = random.Random(1)
    contexts = {shortened(Example(question), 1.0, rng).gold.context.strip() for _ in range(200)}
    assert contexts == {
        "The keeper slept.",
        "A kettle sang. The keeper slept.",
        "The keeper slept. Rain fell.",
        "A kettle sang. The keeper slept. Rain fell.",
    }
    assert shortened(Example(question), 0.0, rng).gold == question


def test_masking_spares_the_answer_and_what_frames_the_texts(start: Path) -> None:
    tokenizer = tokenizer_of(start)
    (window,) = features(tokenizer, untaught(1))[0]
    batch = tensors([window] * 50, tokenizer)
    torch.manual_seed(1)
    hidden = masked(batch, 1.0, tokenizer.mask_token_id, tokenizer.all_special_ids)["input_ids"]
    ((first, last, _),) = window.spans
    changed = (hidden != batch["input_ids"]).any(0).nonzero().ravel().tolist()
    assert (hidden[:, changed] == batch["input_ids"][:, changed]).any(0).all(), "how much is masked differs between windows"
    spared = [i for i, token in enumerate(window.ids) if token in tokenizer.all_special_ids or first <= i <= last]
    assert changed == [i for i in range(len(window.ids)) if i not in spared]
    assert set(hidden[hidden != batch["input_ids"]].tolist()) == {tokenizer.mask_token_id}


def test_a_window_without_the_answer_has_its_target_on_the_first_token(start: Path) -> None:
    tokenizer = tokenizer_of(start)
    context = "1987 " + "river " * 600
    windows = features(tokenizer, [Example(GoldQuestion("1", "a", "museum opened", context, (GoldAnswer("1987", 0),)))])[0]
    assert len(windows) > 1
    assert windows[0].spans[0][:2] != (0, 0)
    assert all(window.spans == ((0, 0, 1.0),) for window in windows[1:])


def test_negative_contexts_hold_no_answer() -> None:
    questions = [GoldQuestion("1", "a", "who", "the keeper", (GoldAnswer("keeper", 4),)), GoldQuestion("2", "a", "what", "a kettle", ())]
    chosen = negatives(questions * 20, 1.0, random.Random(1))
    assert chosen
    assert all(question.answers == () for question in chosen)
    assert not any(question.question == "who" and "keeper" in question.context for question in chosen)


def logits_of(folder: Path, batch: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(**{name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")})
    return torch.stack([out.start_logits, out.end_logits], -1).float().masked_fill((batch["attention_mask"] == 0)[..., None], -1e4)


def test_a_teachers_guess_is_what_it_answers_itself(start: Path, tmp_path: Path) -> None:
    train(start, untaught(160), tmp_path / "teacher", RECIPE)
    examples = taught(tmp_path / "teacher", gold(8))
    tokenizer = tokenizer_of(start)
    batch = tensors([window for windows in features(tokenizer, examples) for window in windows], tokenizer)
    assert batch["taught"].all()
    # Nothing is guessed of the question's tokens.
    logits = [logits_of(folder, batch).masked_fill(~batch["odds"].isfinite(), -1e4) for folder in (tmp_path / "teacher", start)]
    itself, another = (divergence(of, batch["odds"]) for of in logits)
    assert itself.max() < 0.01
    assert another.min() > 0.1


def test_what_was_guessed_is_kept_and_read_again(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "GUESSED_TOGETHER", 3)
    teacher = shutil.copytree(start, tmp_path / "teacher")
    guessed = taught(teacher, gold(5))
    monkeypatch.setattr(asking, "_guesses", None)
    for first, again in zip(guessed, taught(teacher, gold(5)), strict=True):
        assert first.gold == again.gold
        assert first.guess is not None
        assert again.guess is not None
        assert (first.guess.odds == again.guess.odds).all()
    weights = load_file(teacher / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TypeError, match="NoneType"):
        taught(teacher, gold(5))


def test_where_windows_overlap_the_higher_guess_counts(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_LENGTH", 24)
    monkeypatch.setattr(data, "STRIDE", 12)
    (question,) = gold(1)
    (example,) = taught(shutil.copytree(start, tmp_path / "teacher"), [question])
    assert example.guess is not None
    tokenizer = tokenizer_of(start)
    windows = features(tokenizer, [example])[0]
    batch = tensors(windows, tokenizer)
    # As teachers compute.
    of_window = (logits := logits_of(start, batch, arithmetic("cpu"))) - logits[:, :1]
    found: dict[int, list[float]] = {}
    for window, odds in zip(windows, of_window[:, :, 0].tolist(), strict=True):
        for (first, after), value in zip(window.offsets.tolist(), odds, strict=False):
            if after > first:
                found.setdefault(first, []).append(value)
    assert max(max(values) - min(values) for values in found.values()) > 1, "windows differ"
    for first, values in found.items():
        assert example.guess.odds[first, 0] == pytest.approx(max(values), abs=0.15)
    assert (example.guess.odds[[i for i in range(len(question.context)) if i not in found], 0] == UNLIKELY).all()


def test_only_windows_with_a_guess_are_taught(start: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(start)
    model = BertForQuestionAnswering(BertConfig.from_pretrained(start)).eval()
    model.save_pretrained(tmp_path / "student")
    guessed = taught(shutil.copytree(start, tmp_path / "teacher"), gold(1))
    examples = [*guessed, *untaught(1)]
    windows = [window for of in features(tokenizer, examples) for window in of]
    with torch.no_grad():
        mixed = loss_of(model, batch := tensors(windows, tokenizer)).item()
        with_guess, without = (loss_of(model, tensors([window], tokenizer)).item() for window in windows)
    far = divergence(logits_of(tmp_path / "student", batch), batch["odds"])[0].item()
    assert far > 0.1
    assert with_guess == pytest.approx(without + far, rel=1e-3)
    assert mixed == pytest.approx((with_guess + without) / 2, rel=1e-5)


def test_a_family_without_token_types_is_trained(tmp_path: Path) -> None:
    folder = make_model("roberta", tmp_path)
    tokenizer = tokenizer_of(folder)
    batch = tensors(features(tokenizer, untaught(1))[0], tokenizer)
    assert "token_type_ids" not in batch
    loss_of(AutoModelForQuestionAnswering.from_pretrained(folder), batch).backward()


@given(st.lists(st.sampled_from(["A kettle sang.", "The keeper slept!", "Rain fell."]), min_size=1), st.randoms())
def test_a_guess_moves_with_the_sentences_that_are_left(sentences: list[str], rng: random.Random) -> None:
    context = " ".join(sentences)
    odds = np.array([[ord(character)] * 2 for character in context], np.float16)
    left = shortened(Example(GoldQuestion("1", "a", "who", context, (GoldAnswer(sentences[0], 0),)), Guess(odds)), 1.0, rng)
    assert left.guess is not None
    assert left.guess.odds[:, 0].tolist() == [ord(character) for character in left.gold.context]


def test_a_student_learns_what_its_teacher_guesses(start: Path, tmp_path: Path) -> None:
    """Here the teacher finds every answer in the first word, which no annotator does."""
    questions = gold(160)
    odds = [np.full((len(question.context), 2), UNLIKELY, np.float16) for question in questions]
    for question, guess in zip(questions, odds, strict=True):
        guess[0, 0] = guess[question.context.index(" ") - 1, 1] = 20
    examples = [Example(question, Guess(guess)) for question, guess in zip(questions, odds, strict=True)]
    recipe = replace(RECIPE, masked=0.0, left_out=0.0)
    train(start, [Example(question) for question in questions], tmp_path / "alone", recipe)
    train(start, examples, tmp_path / "student", recipe)
    tokenizer = tokenizer_of(start)
    windows = [window for of in features(tokenizer, examples[:8]) for window in of]
    batch = tensors(windows, tokenizer)
    words = [window.offsets[:, 1].tolist().index(question.context.index(" ")) for window, question in zip(windows, questions, strict=False)]
    # Start and end, each for itself.
    alone, student = (logits_of(tmp_path / name, batch).softmax(1)[range(8), words].mean(0) for name in ("alone", "student"))
    assert (student > 2 * alone).all()


def test_the_command_asks_the_teacher_and_repeats_what_it_is_told_to(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paragraphs = [
        {
            "context": question.context,
            "qas": [
                {
                    "id": question.id,
                    "question": question.question,
                    "answers": [{"text": answer.text, "answer_start": answer.start} for answer in question.answers],
                }
            ],
        }
        for question in gold(24)
    ]
    path, teacher = tmp_path / "data.json", shutil.copytree(start, tmp_path / "teacher")
    path.write_text(json.dumps({"data": [{"title": "harbours", "paragraphs": paragraphs}]}))
    asked = sum(not held_out(question) for question in gold(24))

    def run(*arguments: str) -> None:
        command = ["train", "--start", str(start), "--data", str(path), "--out", str(tmp_path / "model"), "--epochs", "1", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        training.main()

    with pytest.raises(SystemExit):
        run("--repeat", str(tmp_path / "other.json"))
    assert "other.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--device", "cuda:99")
    assert "device 'cuda:99': torch " in capsys.readouterr().err
    run("--repeat", str(path), "--teacher", str(teacher), "--members", "1", "--device", "cpu")
    output = capsys.readouterr().out
    assert f"{2 * asked} questions, on cpu" in output
    assert str({"guessed": asked, "of": asked}) in output
    assert 0 < asked < 24
    AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model")


def squad(path: Path, *, answer: str = "1987", shift: int = 0, question: str = "museum opened") -> Path:
    paragraphs = []
    for entry in gold(24):
        answers = [{"text": answer, "answer_start": (a.start or 0) + shift} for a in entry.answers]
        qas = [{"id": entry.id, "question": question, "answers": answers}]
        paragraphs.append({"context": entry.context.replace("1987", answer), "qas": qas})
    path.write_text(json.dumps({"data": [{"title": "harbours", "paragraphs": paragraphs}]}))
    return path


def run(monkeypatch: pytest.MonkeyPatch, start: Path, data: Path, out: Path, *more: str) -> None:
    command = ["train", "--start", str(start), "--data", str(data), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--epochs", "1", "--members", "1", "--device", "cpu", *more])
    training.main()


def test_another_run_into_the_same_folder_is_refused(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, start, squad(tmp_path / "a.json"), tmp_path / "out")
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    run(monkeypatch, start, squad(tmp_path / "a.json"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    for path, more in ((squad(tmp_path / "b.json", answer="2023"), ()), (tmp_path / "a.json", ("--seed", "99"))):
        with pytest.raises(SystemExit):
            run(monkeypatch, start, path, tmp_path / "out", *more)


def test_an_answer_without_its_offset_is_refused(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "gold.csv"
    csv.write_text("question,context,answers\n" + "".join(f"who came,The keeper {n} Marta Olsen came.,Marta Olsen\n" for n in range(9)))
    for path, message in ((csv, "offset of every answer"), (squad(tmp_path / "c.json", shift=3), "does not stand at")):
        with pytest.raises(SystemExit):
            run(monkeypatch, start, path, tmp_path / f"out-{path.stem}")
        assert message in capsys.readouterr().err


def test_a_question_that_fills_the_window_is_named(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = squad(tmp_path / "d.json", question="river " * 260)
    document = json.loads(path.read_text())
    for paragraph in document["data"][0]["paragraphs"]:
        paragraph["context"] += " kettle" * 500
    path.write_text(json.dumps(document))
    with pytest.raises(SystemExit):
        run(monkeypatch, start, path, tmp_path / "out")
    assert "leave no room for the context" in capsys.readouterr().err


def test_a_question_that_just_fills_the_window_of_roberta_is_named(tmp_path: Path) -> None:
    tokenizer = data.load_tokenizer(make_model("roberta", tmp_path / "model"))
    question = GoldQuestion("1", "g", "?" * 252, "the river " * 800, ())
    with pytest.raises(InputError, match="leave no room"):
        features(tokenizer, [Example(question)])
    assert len(features(tokenizer, [Example(replace(question, context="the river"))])) == 1
