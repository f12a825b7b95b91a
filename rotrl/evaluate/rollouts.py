"""Samples of the experts with their token ids: what alignment learns from."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError
from rotrl.evaluate.output import write_jsonl
from rotrl.evaluate.prompts import check_models, engine_length, needed_length, render
from rotrl.evaluate.samples import Sampler, Wanted
from rotrl.evaluate.sampling import Sampling
from rotrl.evaluate.task import Task


def rollouts(
    models: Mapping[str, Path],
    tasks: Mapping[str, Task],
    *,
    weights: Mapping[str, str],
    n: int,
    sampling: Mapping[str, Any],
    engine: Mapping[str, Any],
    cache: Path,
    seed: int,
    base: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """n samples of each expert on each problem of its task, as {expert: file}.

    Lines are {prompt_ids, completion_ids, problem_id, sample_index} in the order of problems and indices, the end token
    included where the expert gave one. A file is named by the digest of all that it follows from and made only once.
    `sampling` has the keys of a protocol. Prompts get the chat template of `base`, by default the first model.
    """
    models, base = {name: Path(path) for name, path in models.items()}, Path(base or next(iter(models.values())))
    wanted, length = prepare(models, tasks, n=n, sampling=sampling, engine=engine, base=base)
    settings = {**engine, "log": engine.get("log") or str(Path(cache) / "engine.log"), "max_model_len": length}
    sampler = Sampler(Sampling.of(sampling), settings, base, Path(cache), seed, with_ids=True)
    done, total, files = 0, sum(map(len, wanted.values())), {}
    for name, asked in wanted.items():
        files[name] = Path(cache) / "rollouts" / f"{name}-{_digest(sampler, weights[name], asked)[:16]}.jsonl"
        if not files[name].is_file():
            rows = {}
            for number, (each, row) in enumerate(sampler.sample(models[name], weights[name], asked), start=1):
                rows[each] = row
                if progress:
                    progress(done + number, total)
            _write(files[name], name, asked, rows)
        done += len(asked)
        if progress:
            progress(done, total)
    return files


def prepare(
    models: Mapping[str, Path],
    tasks: Mapping[str, Task],
    *,
    n: int,
    sampling: Mapping[str, Any],
    engine: Mapping[str, Any],
    base: Path,
) -> tuple[dict[str, list[Wanted]], int]:
    """The samples wanted of each expert, and the context that they need. Refuses what needs no engine to be refused."""
    wanted, needed, tokens = {}, 0, Sampling.of(sampling).max_tokens
    for name, task in tasks.items():
        prompts = render(base, [task], protocol=sampling)
        check_models(base, {name: models[name]}, [task], prompts, protocol=sampling)
        needed = max(needed, needed_length(prompts, tokens, {name: models[name]}))
        wanted[name] = [Wanted(task.name, p.id, i, prompts[task.name, p.id]) for p in task.problems for i in range(n)]
    return wanted, engine_length(needed, base, engine.get("max_model_len"))


def _digest(sampler: Sampler, weights: str, asked: list[Wanted]) -> str:
    parts = [weights, sampler.digest, [(each.problem, each.index, each.prompt.sha256) for each in asked]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(file: Path, name: str, asked: list[Wanted], rows: dict[Wanted, dict[str, Any]]) -> None:
    kept = [each for each in asked if rows[each]["finish_reason"] != "failed"]
    if not kept:
        raise EvaluationError(f"{name}: the engine gave no sample of it; see engine.log")
    write_jsonl(
        file,
        [
            {
                "prompt_ids": list(each.prompt.ids),
                "completion_ids": rows[each]["completion_ids"],
                "problem_id": each.problem,
                "sample_index": each.index,
            }
            for each in kept
        ],
    )
