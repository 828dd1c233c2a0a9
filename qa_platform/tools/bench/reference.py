"""The reference: the question-answering pipeline of transformers 4.57, in a separate process.

Transformers 5 has no such pipeline, and one process cannot import two versions. `make setup` installs the reference's packages
(reference.txt) in a separate folder of the virtual environment; torch comes from the environment. The process reads one JSON document from
standard input, and writes one to standard output.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ORACLE_FOLDER = Path(sys.prefix) / "oracle"


@dataclass(frozen=True)
class ReferenceAnswer:
    """An answer of the pipeline. Its ``score`` can exceed 1."""

    answer: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class ReferenceRun:
    """The ranked answers to each pair (or the name of the exception that the pipeline raised), and the seconds that answering took."""

    answers: tuple[tuple[ReferenceAnswer, ...] | str, ...]
    seconds: float

    @property
    def best(self) -> tuple[ReferenceAnswer, ...]:
        """The best answer to each pair, without the pairs for which the pipeline raised an exception."""
        return tuple(row[0] for row in self.answers if not isinstance(row, str))


@dataclass(frozen=True)
class ReferenceRequest:
    """A request to the reference.

    Attributes:
        model: the folder of the model.
        pairs: questions and contexts.
        batch_size: the batch size of one call with all pairs; 0 makes one call per pair.
        threads: the threads of torch; 0 for its default.
        device, dtype: the model's device and number type, as torch names them.
        options: arguments of the pipeline's call.
    """

    model: str
    pairs: tuple[tuple[str, str], ...]
    batch_size: int = 0
    threads: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)


def run_reference(requests: Sequence[ReferenceRequest], *, oracle: Path = ORACLE_FOLDER) -> list[ReferenceRun]:
    """Answer requests one after the other, with the pipeline that is installed in the folder ``oracle``."""
    # -P keeps this script's folder off sys.path: its modules have the names of installed packages.
    command = [sys.executable, "-P", str(Path(__file__)), str(oracle)]
    document = json.dumps([asdict(request) for request in requests])
    done = subprocess.run(command, input=document, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the reference failed: {done.stderr[-2000:]}")
    return [_run_of(reply) for reply in json.loads(done.stdout.splitlines()[-1])]


def _run_of(reply: dict[str, Any]) -> ReferenceRun:
    answers = (row if isinstance(row, str) else tuple(ReferenceAnswer(**entry) for entry in row) for row in reply["answers"])
    return ReferenceRun(tuple(answers), reply["seconds"])


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers as installed

    # A type checker sees the types of transformers 5.
    transformers: Any = installed

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    # "auto" would use the half precision of the stored weights.
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
    ask = transformers.pipeline("question-answering", model=model, tokenizer=tokenizer, device=request["device"])
    inputs = [{"question": question, "context": context} for question, context in request["pairs"]]
    ask(question="Who waits?", context="The first call waits for code to load.")
    begun = time.perf_counter()
    if request["batch_size"]:
        answers: list[Any] = [_rows(row) for row in ask(inputs, batch_size=request["batch_size"], **request["options"])]
    else:
        answers = [_one(ask, pair, request["options"]) for pair in inputs]
    return {"answers": answers, "seconds": time.perf_counter() - begun}


def _one(ask: Any, pair: dict[str, str], options: dict[str, Any]) -> Any:
    try:
        return _rows(ask(pair, **options))
    except BaseException as error:  # panics of the tokenizer are not Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return type(error).__name__


def _rows(value: Any) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("answer", "score", "start", "end")} for row in (value if isinstance(value, list) else [value])]


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    json.dump([_answer(request) for request in json.load(sys.stdin)], sys.stdout)
