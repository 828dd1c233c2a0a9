"""A model of BERT-large's size on this machine's CPU, in bf16 and int8: questions per second, per second and core, share of the ceiling.

Its weights are random, and compute as long as trained ones. For comparison, MLCommons' results of MLPerf Inference 4.1, BERT-large on SQuAD
in int8, offline: 13 questions per second and core on Xeon 8592+, 12 on Xeon 6 with performance cores, both with AMX.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from qa_platform.answering import Answerer
from qa_platform.answering.runtimes.select import available_cores
from qa_platform.contract import ModelChoice, Precision
from qa_platform.tools.bench.ceiling import matrix_products, work_of
from qa_platform.tools.bench.gpu import questions, write_large

_PRECISIONS: tuple[Precision, ...] = ("bf16", "int8")
_ROUNDS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    pairs, cores = questions(parser.parse_args().questions), available_cores()
    with tempfile.TemporaryDirectory(prefix="qa-bench-") as scratch:
        folder = write_large(Path(scratch))
        work = work_of(folder, pairs)
        print(
            f"BERT-large's size, {len(pairs)} questions of {work / len(pairs) / 1e9:.0f} GFLOP, {cores} cores, the best of {_ROUNDS} rounds"
        )
        for precision in _PRECISIONS:
            answerer = Answerer(ModelChoice(str(folder), precision=precision), threads=cores)
            list(answerer.answer(pairs[:cores]))
            rates, ceilings = [], []
            for _ in range(_ROUNDS):
                begun = time.perf_counter()
                list(answerer.answer(pairs))
                rates.append(len(pairs) / (time.perf_counter() - begun))
                ceilings += [product.rate() for product in matrix_products(precision, cores)]
            best = max(rates)
            share = best * work / len(pairs) / max(ceilings)
            print(f"{precision}: {best:.1f} questions/s, {best / cores:.1f} a core, {share:.0%} of the ceiling", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
