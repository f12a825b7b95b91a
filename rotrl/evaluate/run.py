"""Base, experts and merges on equal terms: the same prompts, seeds and engine, graded alike, compared by problem."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rotrl.errors import ConfigError
from rotrl.evaluate.grade import Grader
from rotrl.evaluate.graded import ENGINE_ERROR, Tally, alarms, graded_row
from rotrl.evaluate.output import write_jsonl
from rotrl.evaluate.prompts import Prompts, check_models, combined_sha256, engine_length, needed_length, render
from rotrl.evaluate.published import rule
from rotrl.evaluate.samples import Sampler, Wanted
from rotrl.evaluate.sampling import Sampling, samples_per_problem
from rotrl.evaluate.scores import MARGIN, score
from rotrl.evaluate.store import Row
from rotrl.evaluate.task import Task
from rotrl.evaluate.verdict import Verdict
from rotrl.evaluate.verdicts import Verdicts

Progress = Callable[[int, int], None]


@dataclass
class Evaluation:
    """What all models are asked, and what has come of it."""

    tasks: Sequence[Task]
    n: dict[str, int]
    ks: list[int]
    protocol: str
    prompts: Prompts
    sampler: Sampler
    out: Path
    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)

    @property
    def wanted(self) -> list[Wanted]:
        return [
            Wanted(task.name, problem.id, index, self.prompts[task.name, problem.id])
            for task in self.tasks
            for problem in task.problems
            for index in range(self.n[task.name])
        ]


@dataclass
class Asked:
    """The samples of one model, with verdicts that may still be under way."""

    name: str
    weights: str
    answers: dict[Wanted, tuple[Row, "Future[Verdict] | None"]] = field(default_factory=dict)


def evaluate(
    models: Mapping[str, Path],
    tasks: Sequence[Task],
    *,
    protocol: Mapping[str, Any],
    engine: Mapping[str, Any],
    sandbox: Mapping[str, Any],
    roles: Mapping[str, str],
    weights: Mapping[str, str],
    cache: Path,
    out: Path,
    seed: int,
    margin: float = MARGIN,
    select: Collection[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sample, grade and compare; write samples/<model>.jsonl, scores.csv and comparisons.csv below `out`.

    `roles` says base, expert or merge for each model; `weights` is the sha256 of its weights, by which samples and
    verdicts are kept below `cache`; `margin` and `select` are those of `comparison_rows`. All prompts get the base's
    chat template. Raises EvaluationError before the engine starts where a prompt can't be asked of every model alike,
    ConfigError where the protocol can't be followed.
    """
    start, models = time.monotonic(), {name: Path(path) for name, path in models.items()}
    job = _prepare(models, tasks, protocol, engine, roles, Path(cache), Path(out), seed)
    behind: deque[Future[None]] = deque()
    published = protocol.get("grader")
    grading = Grader(tasks, sandbox=dict(sandbox), published=published)
    with ThreadPoolExecutor(1) as finishing, grading as grader:
        verdicts = Verdicts(grader, Path(cache) / "verdicts", {**sandbox, "published": published})
        for number, (name, folder) in enumerate(models.items()):
            asked = Asked(name, weights[name])
            _ask(job, folder, asked, verdicts, _part(progress, number, len(models)))
            behind.append(finishing.submit(_finish, job, asked, verdicts))  # while the next model is sampled
            if len(behind) > 1:  # the answers of two models are held, not of all
                behind.popleft().result()
        while behind:
            behind.popleft().result()
        verdicts.close()
        level = grader.sandbox_level
    found = score(
        job.tallies, roles, job.out, protocol=job.protocol, ks=job.ks, seed=seed, margin=margin, select=select
    )
    sampler = job.sampler
    if sampler.damaged:
        job.alarms.append(f"{sampler.damaged} stored samples were damaged: set aside and made again")
    return {
        **found,
        "sandbox_level": level,
        "prompt_sha256": combined_sha256(job.prompts),
        "alarms": job.alarms,
        "generated": sampler.generated,
        "reused": sampler.reused,
        "seconds": time.monotonic() - start,
        "tokens_per_second": sampler.tokens / sampler.seconds if sampler.seconds else 0.0,
    }


def check(
    models: Mapping[str, Path],
    tasks: Sequence[Task],
    *,
    protocol: Mapping[str, Any],
    engine: Mapping[str, Any],
    roles: Mapping[str, str],
) -> None:
    """Raises what `evaluate` would before it starts an engine: so that no stage before it runs in vain."""
    _prepare({name: Path(path) for name, path in models.items()}, tasks, protocol, engine, roles, Path(), Path(), 0)


def _prepare(
    models: dict[str, Path],
    tasks: Sequence[Task],
    protocol: Mapping[str, Any],
    engine: Mapping[str, Any],
    roles: Mapping[str, str],
    cache: Path,
    out: Path,
    seed: int,
) -> Evaluation:
    """Everything that can be refused without an engine."""
    sampling = Sampling.of(protocol)
    if protocol.get("grader") is not None:
        rule(protocol["grader"])
    n, ks = {task.name: samples_per_problem(protocol, task.name) for task in tasks}, list(protocol.get("ks") or [])
    if impossible := [k for k in ks if not 1 <= k <= max(n.values())]:
        told = f"pass@{impossible[0]} can't be estimated from n={max(n.values())} samples"
        raise ConfigError(f"protocol.ks: {told}; set protocol.ks=[1] or a larger protocol.n")
    base = models[next((name for name in models if roles[name] == "base"), next(iter(models)))]
    prompts = render(base, tasks, protocol=protocol)
    found = check_models(base, models, tasks, prompts, protocol=protocol)
    needed = needed_length(prompts, sampling.max_tokens, models)
    length = engine_length(needed, base, engine.get("max_model_len"))
    settings = {**engine, "log": engine.get("log") or str(cache / "engine.log"), "max_model_len": length}
    sampler = Sampler(sampling, settings, base, cache, seed)
    return Evaluation(tasks, n, ks, str(protocol.get("name", "")), prompts, sampler, out, alarms=found)


def _ask(job: Evaluation, folder: Path, asked: Asked, verdicts: Verdicts, progress: Progress) -> None:
    """Sample one model, and hand each sample to the grader as it comes."""
    tasks = {task.name: task for task in job.tasks}
    problems = {(task.name, problem.id): problem for task in job.tasks for problem in task.problems}
    wanted = job.wanted
    for number, (each, row) in enumerate(job.sampler.sample(folder, asked.weights, wanted), start=1):
        future = None
        if row["finish_reason"] != "failed":
            problem = problems[each.task, each.problem]
            future = verdicts.submit(tasks[each.task], problem, row["completion"])
        asked.answers[each] = (row, future)
        progress(number, len(wanted))


def _finish(job: Evaluation, asked: Asked, verdicts: Verdicts) -> None:
    """Wait for the verdicts of one model; write its samples and count them."""
    tallies = job.tallies[asked.name] = {task.name: Tally.of(task, job.n[task.name]) for task in job.tasks}
    places = {(task.name, problem.id): i for task in job.tasks for i, problem in enumerate(task.problems)}

    def rows() -> Iterator[dict[str, Any]]:
        for each in job.wanted:
            row, future = asked.answers[each]
            verdict = future.result() if future else ENGINE_ERROR
            graded = graded_row(each, row, verdict, run_seed=job.sampler.seed, weights=asked.weights)
            tallies[each.task].add(places[each.task, each.problem], graded, thinks=each.prompt.thinks)
            yield graded

    write_jsonl(job.out / "samples" / f"{asked.name.replace('/', '_')}.jsonl", rows())
    verdicts.save()
    job.alarms += alarms(asked.name, tallies)


def _part(progress: Progress | None, number: int, models: int) -> Progress:
    """Progress of one of several models, in samples of all of them."""
    return lambda done, total: progress(number * total + done, models * total) if progress else None
