"""Generate questions: SQuAD JSON in, more questions of the same paragraphs out, as SQuAD JSON.

    python -m qa_platform.training.questions --start FOLDER --teacher FOLDER --data A.json B.json --out generated.json

A small model overfits to the few questions that people asked about a paragraph. This makes more of them:

1. ``--answerer``, a trained model, marks answers to general questions (`GENERAL`) in every paragraph.
2. A generator (`generator.Generator`), trained on people's questions from the encoder ``--start``, samples a question for each of them.
3. ``--teacher``, a larger model that `train` made, answers the question. It is kept if the teacher's answer has at least `AGREEMENT` of F1
   with the one that the question was made for (round-trip consistency, Alberti et al., 2019). The teacher's answer becomes the right one.

Paragraphs that are held out (`gold.held_out`) are left out. The result is one more file for ``train --data``; the teacher's guesses are
stored, so ``train --teacher`` does not ask again.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qa_platform.answering import Answerer
from qa_platform.contract import ModelChoice
from qa_platform.evaluation.gold import GoldQuestion, f1, held_out, read_gold
from qa_platform.training.data import LONGEST_ANSWER, Example
from qa_platform.training.generator import Generator, Passage, train_generator
from qa_platform.training.teacher import taught

GENERAL = ("Who was it?", "When was it?", "Where was it?", "How many?", "What is it called?", "What kind?", "Why?")
AGREEMENT = 0.5
# Answers that questions are made for, in a paragraph.
_ANSWERS = 7
_MARKED = 3
_WORDS = 9
# The most likely first and last characters of which the teacher's answer is chosen.
_ENDS = 12


def proposed(answerer: Answerer, questions: Sequence[GoldQuestion]) -> list[Passage]:
    """Answers that the answerer marks in the paragraphs of ``questions``, but for those that people have asked for."""
    known: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for question in questions:
        known[question.context] += [(a.start, a.start + len(a.text)) for a in question.answers if a.start is not None]
    pairs = [(general, context) for context in known for general in GENERAL]
    marked: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    for (_, context), answer in zip(pairs, answerer.answer(pairs, top_k=_MARKED), strict=True):
        if not answer.is_rejected:
            marked[context].append((answer.score, answer.start, answer.end))
            marked[context] += [(span.score, span.start, span.end) for span in answer.alternatives]
    return [Passage(context, *place) for context in known for place in _apart(context, marked[context], known[context])]


def _apart(context: str, marked: list[tuple[float, int, int]], known: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The best of the marked places that do not overlap each other or, for the most part, a known one."""
    taken: list[tuple[int, int]] = []
    for _, start, end in sorted(marked, reverse=True):
        is_short = end - start > 1 and len(context[start:end].split()) <= _WORDS
        is_new = not any(2 * (min(end, after) - max(start, first)) > max(end - start, after - first) for first, after in known)
        if is_short and is_new and not any(start < after and end > first for first, after in taken):
            taken.append((start, end))
    return taken[:_ANSWERS]


def generated(generator: Generator, passages: Sequence[Passage], groups: Mapping[str, str]) -> list[tuple[Passage, GoldQuestion]]:
    """A question for each passage, except where the generator finds none or gives the answer away.

    Args:
        groups: the articles, by context.
    """
    prompted = [(passage, prompt) for passage, prompt in zip(passages, generator.prompts(passages), strict=True) if prompt]
    made: list[tuple[Passage, GoldQuestion]] = []
    for (passage, _), text in zip(prompted, generator.sample([prompt for _, prompt in prompted]), strict=True):
        if text and passage.context[passage.start : passage.end].lower() not in text.lower():
            made.append((passage, GoldQuestion(f"generated-{len(made)}", groups[passage.context], text, passage.context, ())))
    return made


def agreed(passages: Sequence[Passage], examples: Sequence[Example]) -> Iterator[tuple[GoldQuestion, int, int]]:
    """Questions whose teacher agrees, with the character range of its answer. An example's passage is what its question was made for."""
    for passage, example in zip(passages, examples, strict=True):
        if example.guess is None:
            continue
        start, end = _best(example.guess.odds)
        if start < end and f1(passage.context[start:end], [passage.context[passage.start : passage.end]]) >= AGREEMENT:
            yield example.gold, start, end


def _best(odds: np.ndarray) -> tuple[int, int]:
    """The character range of a guess's best answer; empty if it is less likely than no answer."""
    first, last = (odds[:, side].astype(np.float32) for side in (0, 1))
    score, start, end = 0.0, 0, 0
    for begin in np.argsort(-first)[:_ENDS].tolist():
        for stop in np.argsort(-last)[:_ENDS].tolist():
            if begin <= stop < begin + 8 * LONGEST_ANSWER and first[begin] + last[stop] > score:
                score, start, end = float(first[begin] + last[stop]), begin, stop + 1
    return start, end


def _squad(questions: Sequence[tuple[GoldQuestion, int, int]]) -> dict:
    articles: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for gold, start, end in questions:
        answer = {"text": gold.context[start:end], "answer_start": start}
        articles[gold.group][gold.context].append({"id": gold.id, "question": gold.question, "answers": [answer]})
    data = [
        {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    return {"version": "1.1", "data": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="folder of the encoder that the generator starts from")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a larger model that the training script made")
    parser.add_argument("--answerer", default="bundled", help="model that proposes answers")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="SQuAD JSON files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=20)
    args = parser.parse_args()
    questions = [question for path in args.data for question in read_gold(path) if not held_out(question)]
    groups = {question.context: question.group for question in questions}
    generator = train_generator(args.start, questions, epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed)
    passages = proposed(Answerer(ModelChoice(args.answerer)), questions)
    print({"proposed": len(passages)}, flush=True)
    made = generated(generator, passages, groups)
    examples = taught(args.teacher, [gold for _, gold in made])
    kept = list(agreed([passage for passage, _ in made], examples))
    args.out.write_text(json.dumps(_squad(kept), ensure_ascii=False), encoding="utf-8")
    print({"generated": len(made), "kept": len(kept)})


if __name__ == "__main__":
    main()
