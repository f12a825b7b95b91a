r"""Mathematics sets: a problem in words, a short answer in \boxed{}.

    _target_: rotrl.evaluate.datasets.math.aime24
    path: null      # a file or folder with the same rows (JSON lines, JSON or parquet); null: the hub
    revision: ...   # a commit of the hub's repository; null: the newest, recorded as `Benchmark.source`
    prompt: null    # a text with {problem} in it; null: PROMPT
    problems: 30    # rows of a whole copy, asserted; null: any number
    limit: null     # the first so many problems, for a quick look

Zero-padded answers ("025") stay as they are: the grader compares integers.
"""

import re
from itertools import islice
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError
from rotrl.evaluate.datasets.source import Benchmark, Source, draw, fill, locate, read
from rotrl.evaluate.task import Problem
from rotrl.values import Count

PROMPT = "{problem}\n\nReason step by step, and give the final answer in \\boxed{}."


def aime24(
    *,
    path: str | Path | None = None,
    revision: str | None = "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    prompt: str | None = None,
    problems: Count | None = 30,
    limit: Count | None = None,
) -> Benchmark:
    """American Invitational Mathematics Examination 2024, I and II (HuggingFaceH4/aime_2024)."""
    source = Source("aime24", "HuggingFaceH4/aime_2024", ("id", "problem", "answer"))
    return _load(source, "data/train-00000-of-00001.parquet", path, revision, prompt, problems, limit)


def aime25(
    *,
    path: str | Path | None = None,
    revision: str | None = "563bb8404243c5f09de6ec262f2db674fe5bce9b",
    prompt: str | None = None,
    problems: Count | None = 30,
    limit: Count | None = None,
) -> Benchmark:
    """American Invitational Mathematics Examination 2025, I and II (math-ai/aime25)."""
    source = Source("aime25", "math-ai/aime25", ("id", "problem", "answer"))
    return _load(source, "test.jsonl", path, revision, prompt, problems, limit)


def math500(
    *,
    path: str | Path | None = None,
    revision: str | None = "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    prompt: str | None = None,
    problems: Count | None = 500,
    limit: Count | None = None,
) -> Benchmark:
    """500 test problems of MATH (Hendrycks, arXiv 2103.03874) chosen by arXiv 2305.20050 (HuggingFaceH4/MATH-500)."""
    source = Source("math500", "HuggingFaceH4/MATH-500", ("unique_id", "problem", "answer"))
    return _load(source, "test.jsonl", path, revision, prompt, problems, limit)


def amc23(
    *,
    path: str | Path | None = None,
    revision: str | None = "80815d37005feb82cd7f8fbc6901d5d3eff43057",
    prompt: str | None = None,
    problems: Count | None = 40,
    limit: Count | None = None,
) -> Benchmark:
    """American Mathematics Competitions 12 of 2023 (math-ai/amc23); DeepScaleR's AMC has 83 problems: another set."""
    source = Source("amc23", "math-ai/amc23", ("id", "question", "answer"))
    return _load(source, "test-00000-of-00001.parquet", path, revision, prompt, problems, limit)


def minerva(
    *,
    path: str | Path | None = None,
    revision: str | None = "ee46ddc498933b1977577953250ca5c66be64f96",
    prompt: str | None = None,
    problems: Count | None = 272,
    limit: Count | None = None,
) -> Benchmark:
    """Undergraduate science of MIT's OpenCourseWare (arXiv 2206.14858; math-ai/minervamath), answers with units."""
    source = Source("minerva", "math-ai/minervamath", ("question", "answer"))
    return _load(source, "test.jsonl", path, revision, prompt, problems, limit)


def olympiad(
    *,
    path: str | Path | None = None,
    revision: str | None = "91184b52131e7fc9455fef848035173aea8cc01a",
    prompt: str | None = None,
    problems: Count | None = 674,
    limit: Count | None = None,
) -> Benchmark:
    r"""OlympiadBench (arXiv 2402.14008; Hothan/OlympiadBench): English competition problems in words with an answer.

    `final_answer` is a list of $..$: several answers are asked for in one box, and are right in any order. The field
    `error` (a tolerance, rare in mathematics) is not used: answers are exact.
    """
    source = Source("olympiad", "Hothan/OlympiadBench", ("id", "question", "final_answer"))
    name = "OE_TO_maths_en_COMP"
    return _load(source, f"OlympiadBench/{name}/{name}.parquet", path, revision, prompt, problems, limit)


def deepscaler(
    *,
    path: str | Path | None = None,
    revision: str | None = "b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29",
    prompt: str | None = None,
    problems: Count | None = 40315,
    limit: Count | None = None,
    seed: int = 0,
) -> Benchmark:
    """DeepScaleR's training problems (agentica-org/DeepScaleR-Preview-Dataset): prompts to sample an expert on.

    `limit` draws that many problems at random by `seed`: the file is sorted by origin.
    """
    source = Source(
        "deepscaler", "agentica-org/DeepScaleR-Preview-Dataset", ("problem", "answer"), "models.prompts.EXPERT"
    )
    task = _load(source, "deepscaler.json", path, revision, prompt, problems, None)
    return Benchmark(task.name, draw(task.problems, limit, seed), "math", task.source)


def _load(
    source: Source,
    file: str,
    path: str | Path | None,
    revision: str | None,
    prompt: str | None,
    problems: int | None,
    limit: int | None,
) -> Benchmark:
    origin, files = locate(source, path, revision, {file: problems})
    found: list[Problem] = []
    for place, row in islice(read(source, files), limit):
        identity = str(row[source.fields[0]]) if len(source.fields) == 3 else str(len(found))
        question = row[source.fields[-2]]
        if not isinstance(question, str) or not question.strip():
            raise EvaluationError(f"{place}, field {source.fields[-2]}: found {question!r}, expected a text")
        if "final_answer" in source.fields:
            question, answer = _olympiad(row, question, place)
        else:
            answer = _answer(row["answer"], place)
        text = fill(prompt or PROMPT, source.key, problem=question)
        found.append(Problem(identity, text, answer=answer))
    return Benchmark(source.name, tuple(found), "math", origin)


def _olympiad(row: dict[str, Any], question: str, place: str) -> tuple[str, str]:
    """The question after its context, and the answers without their dollars, comma by comma."""
    given = row["final_answer"]
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise EvaluationError(f"{place}, field final_answer: found {given!r}, expected a list of texts")
    answers = [re.sub(r"(?<!\\)\$", "", text).strip().rstrip(".").strip() for text in given]
    question = f"{row['context'].strip()}\n\n{question}" if row.get("context") else question
    if row.get("is_multiple_answer") or len(answers) > 1:
        question += "\n\nThere are several answers: give all of them in one box, separated by commas."
    return question, _answer(", ".join(answers), f"{place}, final_answer")


def _answer(value: Any, place: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise EvaluationError(f"{place}, field answer: found {value!r}, expected a text or an integer")
    return str(value)
