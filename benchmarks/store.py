"""python benchmarks/store.py [rows]: seconds and peak memory to open, resume and score a store of samples.

One model, problems with 250 samples each, completions of about 200 bytes; each step is a process of its own, and the
budget of a million rows is 30 s and 2 GB for all of it. CPU seconds do not depend on what else the machine does.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rotrl.evaluate.graded import Tally, graded_row
from rotrl.evaluate.output import write_jsonl
from rotrl.evaluate.prompts import Prompt
from rotrl.evaluate.samples import Sampler, Wanted
from rotrl.evaluate.sampling import Sampling
from rotrl.evaluate.scores import score
from rotrl.evaluate.store import Store, encode
from rotrl.evaluate.task import Problem, Task
from rotrl.evaluate.verdict import Verdict

N = 250
RIGHT, WRONG = Verdict.of("accepted", "math:integer"), Verdict.of("wrong answer", "math:integer")


def task(rows: int) -> Task:
    return Task("sums", tuple(Problem(f"problem-{i:05d}", f"{i}+1=", answer="7") for i in range(rows // N)), "math")


def sampler(folder: Path) -> Sampler:
    return Sampler(Sampling(1.0, 1.0, -1, 64), {"dtype": "float32"}, folder, folder, seed=0)


def wanted(rows: int) -> list[Wanted]:
    prompt = Prompt((1, 2, 3), "ab" * 32, False)
    return [Wanted("sums", problem.id, index, prompt) for problem in task(rows).problems for index in range(N)]


def write(folder: Path, rows: int) -> None:
    """Lines as a run appends them."""
    own, rng = sampler(folder), np.random.default_rng(0)
    target = own.folder("w" * 64) / "text"
    target.mkdir(parents=True)
    digest, answers = own.digest[:32], rng.integers(0, 10, size=rows)
    with (target / "1-00000000.jsonl").open("wb") as file:
        for each, answer in zip(wanted(rows), answers, strict=True):
            key = f"{each.prompt.sha256[:32]}/{digest}/{each.problem}/{each.index}"
            text = "3+4=7; " * 26 + f"\\boxed{{{answer}}}"
            file.write(encode(key, {"completion": text, "finish_reason": "stop", "tokens": 40}))


def open_only(folder: Path, rows: int) -> None:
    assert len(Store(sampler(folder).folder("w" * 64) / "text")) == rows


def open_resume_score(folder: Path, rows: int) -> None:
    """What a run does that has every sample and verdict: read, write samples/<model>.jsonl, count, score."""
    own, asked = sampler(folder), task(rows)
    tally, places = Tally.of(asked, N), {problem.id: i for i, problem in enumerate(asked.problems)}

    def graded() -> Iterator[dict]:
        for each, row in own.sample(folder, "w" * 64, wanted(rows)):
            verdict = RIGHT if row["completion"].endswith("{7}") else WRONG
            found = graded_row(each, row, verdict, run_seed=0, weights="w" * 64)
            tally.add(places[each.problem], found, thinks=False)
            yield found

    write_jsonl(folder / "run" / "samples.jsonl", graded())
    assert (own.reused, own.generated) == (rows, 0)
    found = score({"base": {"sums": tally}}, {"base": "base"}, folder, protocol="p", ks=[1, 8], seed=0)
    print(f"    avg@{N} {found['scores'][0]['value']:.3f}")


def measured(step: Callable[[Path, int], None], folder: Path, rows: int) -> None:
    start, cpu = time.monotonic(), time.process_time()
    step(folder, rows)
    wall, cpu = time.monotonic() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{step.__name__:<18} {rows:>9,} rows {wall:6.1f} s wall {cpu:6.1f} s CPU {peak:6.2f} GB peak", flush=True)


if __name__ == "__main__":
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        for step in (write, open_only, open_resume_score):
            process = spawn.Process(target=measured, args=(step, Path(name), rows))
            process.start()
            process.join()
