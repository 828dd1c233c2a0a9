"""Generated questions, by tiny models."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qa_platform.evaluation.gold import GoldAnswer, GoldQuestion, held_out, read_gold
from qa_platform.training import generator as generator_module
from qa_platform.training import questions as generating
from qa_platform.training.data import Example, Guess
from qa_platform.training.generator import CONTEXT_TOKENS, Generator, Passage, _loss, train_generator
from qa_platform.training.questions import _apart, agreed
from qa_platform_tests.answering_models import make_model

KINDS = [(["harbour", "keeper"], "1987", "museum opened"), (["river", "orchard"], "copper", "kettle")]
CONTEXT = "Ada Blum built the bridge in 1872, and Ida Falk painted it."


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("bert", tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def untrained(start: Path) -> Generator:
    return Generator(start)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def asked(count: int, *, seed: int = 5) -> list[GoldQuestion]:
    """Questions of two kinds, which the words of their contexts tell."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        words, answer, question = rng.choice(KINDS)
        drawn = [rng.choice(words) for _ in range(20)]
        drawn[place := rng.randrange(20)] = answer
        begin = len(" ".join([*drawn[:place], ""]))
        made.append(GoldQuestion(str(number), f"article {number % 4}", question, " ".join(drawn), (GoldAnswer(answer, begin),)))
    return made


def passages_of(questions: list[GoldQuestion]) -> list[Passage]:
    return [Passage(q.context, a.start or 0, (a.start or 0) + len(a.text)) for q in questions for a in q.answers]


def odds(context: str, start: int, end: int) -> np.ndarray:
    """The guess of a teacher who is sure of an answer."""
    found = np.full((len(context), 2), -20.0, np.float16)
    found[start, 0] = found[end - 1, 1] = 5.0
    return found


@pytest.mark.slow
def test_a_generator_learns_to_ask_what_people_asked(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_module, "_WARM_UP_STEPS", 10)
    generator = train_generator(start, asked(1500), epochs=8, learning_rate=2e-3, seed=3)
    unseen = asked(100, seed=6)
    found = generator.sample(generator.prompts(passages_of(unseen)))
    right = sum(question == gold.question for question, gold in zip(found, unseen, strict=True))
    assert right >= 90


def test_a_question_is_sampled_by_the_same_logits_that_are_trained(untrained: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = untrained.prompts(passages_of(asked(7)))
    drawn: list[torch.Tensor] = []

    def draw(logits: torch.Tensor) -> torch.Tensor:
        drawn.append(logits)
        return torch.full((len(logits),), 5 + len(drawn))

    monkeypatch.setattr(generator_module, "_drawn", draw)
    with torch.inference_mode():
        untrained.eval()._sample(prompts)
        questions = [[5 + number for number in range(1, len(drawn))] for _ in prompts]
        sampled = torch.stack(drawn, 1).log_softmax(-1)[:, :-1]
        targets = torch.tensor(questions)[:, :, None]
        monkeypatch.setattr(generator_module, "_LABEL_SMOOTHING", 0.0)
        end = untrained.tokenizer.sep_token_id
        trained = [_loss(untrained, [(prompt, question)]) for prompt, question in zip(prompts, questions, strict=True)]
        last = torch.stack(drawn, 1).log_softmax(-1)[:, -1, end]
    expected = -(sampled.gather(-1, targets)[:, :, 0].sum(1) + last) / len(drawn)
    assert torch.stack(trained).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@given(st.integers(0, 400), st.integers(1, 60), st.integers())
def test_a_prompt_marks_its_answer_and_has_no_more_tokens_than_it_may(untrained: Generator, begin: int, words: int, seed: int) -> None:
    passage = Passage("river " * 500, 6 * begin, 6 * (begin + words) - 1)
    (prompt,) = untrained.prompts([passage], random.Random(seed))
    # The tiny vocabulary has no unused words.
    mark = untrained.tokenizer.unk_token_id
    first, after = (place for place, token in enumerate(prompt) if token == mark)
    assert after - first - 1 == min(words, 20)
    assert len(prompt) == CONTEXT_TOKENS + 2


def test_a_question_is_kept_with_the_teachers_answer_where_both_agree() -> None:
    person = Passage(CONTEXT, 0, len("Ada Blum"))
    longer, other = (0, len("Ada Blum built")), (CONTEXT.index("Ida"), CONTEXT.index(" painted"))
    examples = [
        Example(GoldQuestion(str(place), "group", "Who?", CONTEXT, ()), Guess(odds(CONTEXT, *place)) if place else None)
        for place in (longer, other, None)
    ]
    assert [(gold.id, start, end) for gold, start, end in agreed([person] * 3, examples)] == [(str(longer), *longer)]


def test_an_answer_that_is_less_likely_than_none_is_not_kept() -> None:
    example = Example(GoldQuestion("1", "group", "Who?", CONTEXT, ()), Guess(np.full((len(CONTEXT), 2), -1.0, np.float16)))
    assert list(agreed([Passage(CONTEXT, 0, len(CONTEXT))], [example])) == []


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 50), st.integers(0, 50))),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50))),
)
def test_proposed_answers_do_not_overlap(marked: list[tuple[float, int, int]], known: list[tuple[int, int]]) -> None:
    ranges = [(score, min(a, b), max(a, b)) for score, a, b in marked]
    taken = _apart(CONTEXT, ranges, [(min(pair), max(pair)) for pair in known])
    assert all(one[1] <= two[0] for one, two in zip(sorted(taken), sorted(taken)[1:], strict=False))
    assert {(start, end) for start, end in taken} <= {(start, end) for _, start, end in ranges}


@pytest.mark.slow
def test_the_command_writes_squad_json_of_the_paragraphs_that_are_not_held_out(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data.json", tmp_path / "generated.json"
    questions = asked(60)
    data.write_text(json.dumps(generating._squad([(q, p.start, p.end) for q, p in zip(questions, passages_of(questions), strict=True)])))
    assert sorted(read_gold(data), key=lambda q: int(q.id)) == questions
    monkeypatch.setattr(generating, "AGREEMENT", 0.0)
    folders = ["--start", str(start), "--teacher", str(start), "--data", str(data), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["questions", *folders, "--epochs", "8", "--learning-rate", "5e-3"])

    generating.main()

    made = read_gold(out)
    assert {question.context for question in made} <= {question.context for question in questions if not held_out(question)}
    assert all(q.context[a.start : (a.start or 0) + len(a.text)] == a.text != "" for q in made for a in q.answers)
    assert all(question.question for question in made)
