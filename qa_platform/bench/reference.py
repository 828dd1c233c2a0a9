"""The reference: transformers 4.57's question-answering pipeline, in a process of its own.

Transformers 5 has no such pipeline, and two versions cannot live in one process. The packages of `ORACLE` lie in a folder of
their own (`pip install --no-deps --target .qa/oracle …`, which `make setup` does), beside the torch of this environment. Reads one JSON document on standard input, writes one on standard output.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ORACLE = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")


@dataclass(frozen=True)
class ReferenceAnswer:
    """As the pipeline gives it; ``score`` may pass 1."""

    answer: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class ReferenceRun:
    """Per pair the ranked answers (an exception's name where the pipeline raised), and the seconds that answering took."""

    answers: tuple[tuple[ReferenceAnswer, ...] | str, ...]
    seconds: float


def run_reference(
    oracle: Path,
    model: Path,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 1,
    threads: int = 0,
    one_call: bool = False,
    **options: Any,
) -> ReferenceRun:
    """Answer with the pipeline installed in the folder ``oracle``; ``options`` go to the call.

    Args:
        batch_size: the pipeline's own batching; above 1 it implies ``one_call``.
        one_call: hand all pairs over at once, rather than one per call.
    """
    request = {
        "model": str(model),
        "pairs": list(pairs),
        "batch_size": batch_size,
        "threads": threads,
        "one_call": one_call,
        "options": options,
    }
    # -P keeps the folder of this script, and with it our packages' names, off the path.
    command = [sys.executable, "-P", str(Path(__file__)), str(oracle)]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the reference failed: {done.stderr[-2000:]}")
    reply = json.loads(done.stdout.splitlines()[-1])
    answers = tuple(row if isinstance(row, str) else tuple(ReferenceAnswer(**entry) for entry in row) for row in reply["answers"])
    return ReferenceRun(answers, reply["seconds"])


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer, pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    # The dtype matters: version 5 and "auto" would take the file's half precision.
    model = AutoModelForQuestionAnswering.from_pretrained(request["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    ask = pipeline("question-answering", model=model, tokenizer=tokenizer, device="cpu")
    inputs = [{"question": question, "context": context} for question, context in request["pairs"]]
    ask(inputs[0], **request["options"])
    begun = time.perf_counter()
    if request["one_call"] or request["batch_size"] > 1:
        answers = [_rows(row) for row in ask(inputs, batch_size=request["batch_size"], **request["options"])]
    else:
        answers = [_one(ask, pair, request["options"]) for pair in inputs]
    return {"answers": answers, "seconds": time.perf_counter() - begun}


def _one(ask: Any, pair: dict[str, str], options: dict[str, Any]) -> Any:
    try:
        return _rows(ask(pair, **options))
    except BaseException as error:  # the tokenizer's panics are not Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return type(error).__name__


def _rows(value: Any) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("answer", "score", "start", "end")} for row in (value if isinstance(value, list) else [value])]


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)
