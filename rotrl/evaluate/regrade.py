"""Grading without generating: completions from elsewhere, or those of an earlier run, into the same statistics."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from rotrl.errors import ConfigError, EvaluationError
from rotrl.evaluate.completions import Row
from rotrl.evaluate.grade import Grader
from rotrl.evaluate.graded import ENGINE_ERROR, Tally, alarms
from rotrl.evaluate.output import write_jsonl
from rotrl.evaluate.scores import MARGIN, score
from rotrl.evaluate.task import Task
from rotrl.evaluate.verdicts import Verdicts

UNCHANGED = ("seed", "prompt_sha256")  # of a row that this program sampled


def regrade(
    samples: Mapping[str, Sequence[Row]],
    tasks: Sequence[Task],
    *,
    protocol: Mapping[str, Any],
    sandbox: Mapping[str, Any],
    roles: Mapping[str, str],
    cache: Path,
    out: Path,
    seed: int,
    margin: float = MARGIN,
    select: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Grade and compare the rows of each model, which `check` has passed; write what `evaluate` writes below `out`.

    n is what the rows have, whatever the protocol says; tasks without any rows are left out. A model or problem with
    fewer samples than others is told in the alarms.
    """
    start, total = time.monotonic(), sum(map(len, samples.values()))
    named = {row["task"] for rows in samples.values() for row in rows}
    tasks, ks = [task for task in tasks if task.name in named], list(protocol.get("ks") or [])
    columns = {model: _columns(rows) for model, rows in samples.items()}
    counted: dict[str, dict[str, Tally]] = {}
    said: list[str] = []
    tick = _ticker(progress, total)
    published = protocol.get("grader")
    with Grader(tasks, sandbox=dict(sandbox), published=published) as grader:
        verdicts = Verdicts(grader, Path(cache) / "verdicts", {**sandbox, "published": published})
        for model, rows in samples.items():
            tallies = {task.name: Tally.of(task, len(columns[model].get(task.name, ()))) for task in tasks}
            file = Path(out) / "samples" / f"{model.replace('/', '_')}.jsonl"
            write_jsonl(file, _graded(rows, tasks, columns[model], verdicts, tallies, tick))
            verdicts.save()
            counted[model] = {task: tally for task, tally in tallies.items() if tally.samples}
            said += alarms(model, counted[model]) + _missing(model, rows, counted[model], tasks)
        verdicts.close()
        level = grader.sandbox_level
    settings = {"protocol": str(protocol.get("name", "")), "ks": ks, "seed": seed, "margin": margin, "select": select}
    found = score(counted, roles, Path(out), **settings)
    return {**found, "sandbox_level": level, "alarms": said, "graded": total, "seconds": time.monotonic() - start}


def check(samples: Mapping[str, Sequence[Row]], tasks: Sequence[Task], ks: Sequence[int]) -> None:
    """EvaluationError for samples of problems that no task has, ConfigError for a k that no task has samples for."""
    places = {(task.name, problem.id) for task in tasks for problem in task.problems}
    asked = Counter((row["task"], row["problem_id"]) for rows in samples.values() for row in rows)
    if unknown := [place for place in asked if place not in places]:
        task, problem = unknown[0]
        raise EvaluationError(
            f"{sum(asked[place] for place in unknown)} samples are of problems that the tasks have not, the first of "
            f"problem {problem!r} of {task}; give the tasks that were asked"
        )
    n = max(len(each) for rows in samples.values() for each in _columns(rows).values())
    if impossible := [k for k in ks if not 1 <= k <= n]:
        raise ConfigError(f"protocol.ks: pass@{impossible[0]} can't be estimated from n={n} samples; lower protocol.ks")


def roles_of(models: Collection[str], experts: Collection[str]) -> dict[str, str]:
    """`base` is the base. Where some models have the names of experts the others are merges; else all are experts."""
    named = [model for model in models if model in experts]
    others = "merge" if named else "expert"
    return {m: "base" if m == "base" else "expert" if m in named else others for m in models}


def _columns(rows: Sequence[Row]) -> dict[str, dict[int, int]]:
    """By task, the column of each sample index in the matrix: indices need not begin at 0."""
    indices: dict[str, set[int]] = {}
    for row in rows:
        indices.setdefault(row["task"], set()).add(row["sample_index"])
    return {task: {index: i for i, index in enumerate(sorted(found))} for task, found in indices.items()}


def _graded(
    rows: Sequence[Row],
    tasks: Sequence[Task],
    columns: Mapping[str, Mapping[int, int]],
    verdicts: Verdicts,
    tallies: Mapping[str, Tally],
    tick: Callable[[], None],
) -> Iterator[Row]:
    """Hands all rows to the grader, then gives each with its verdict, counted."""
    by_name = {task.name: task for task in tasks}
    places = {(task.name, problem.id): i for task in tasks for i, problem in enumerate(task.problems)}
    # What a prompt opened is not known here: a model that closes its thoughts anywhere has always opened them.
    thinks = {row["task"] for row in rows if "</think>" in row["completion"]}
    futures = []
    for row in rows:
        task = by_name[row["task"]]
        problem = task.problems[places[row["task"], row["problem_id"]]]
        failed = row.get("finish_reason") == "failed"
        futures.append(None if failed else verdicts.submit(task, problem, row["completion"]))
    for row, future in zip(rows, futures, strict=True):
        verdict = future.result() if future else ENGINE_ERROR
        tick()
        kept = {key: row.get(key) for key in UNCHANGED}
        graded = {
            **{key: row[key] for key in ("task", "problem_id", "sample_index")},
            **kept,
            **{key: row.get(key) for key in ("completion", "finish_reason", "tokens")},
            "verdict": verdict.verdict,
            "grader": verdict.grader,
            "published": verdict.published,
            "model_sha256": row.get("model_sha256"),
        }
        place = places[row["task"], row["problem_id"]]
        column = columns[row["task"]][row["sample_index"]]
        tallies[row["task"]].add(place, graded | {"sample_index": column}, thinks=row["task"] in thinks)
        yield graded


def _missing(model: str, rows: Sequence[Row], tallies: Mapping[str, Tally], tasks: Sequence[Task]) -> list[str]:
    """Sentences on samples that are not there, and on what is not known of them."""
    said = [f"{model} has no samples of {task.name}" for task in tasks if task.name not in tallies]
    given = Counter((row["task"], row["problem_id"]) for row in rows)
    for task in (task for task in tasks if task.name in tallies):
        numbers = [number for problem in task.problems if (number := given[task.name, problem.id])]
        where, problems, most = f"{model}, {task.name}", len(task.problems), max(numbers)
        if absent := problems - len(numbers):
            said.append(f"{where}: {absent} of {problems} problems have no sample and are left out")
        if fewer := sum(number < most for number in numbers):
            least = min(numbers)
            said.append(f"{where}: {fewer} of {problems} problems have fewer than {most} samples (the least {least})")
        if most > 1 and len(numbers) >= 10 and _one_text(rows, task.name):
            said.append(
                f"{where}: all samples of each problem are one text, as from one seed: they say no more than one"
            )
        if unknown := tallies[task.name].samples - tallies[task.name].ended:
            said.append(f"{where}: how {unknown} samples ended is not known, so none counts as cut off")
    return said


def _one_text(rows: Sequence[Row], task: str) -> bool:
    first: dict[str, str] = {}
    return all(first.setdefault(r["problem_id"], r["completion"]) == r["completion"] for r in rows if r["task"] == task)


def _ticker(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    done = count(1)
    return lambda: progress(next(done), total) if progress else None
