"""Completions that were generated elsewhere, or by an earlier run, as rows that can be graded.

{"model": "base", "task": "aime24", "problem_id": "60", "sample_index": 0, "completion": "...", "finish_reason": "stop"}

or what lm-eval's --log_samples writes, a line for each document with `doc`, `doc_id` and `resps`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError
from rotrl.evaluate.task import Problem, Task

Row = dict[str, Any]
IDS = ("id", "problem_id", "unique_id", "question_id", "task_id")  # fields of a document that may name its problem
SHOWN = 3  # faults of a kind that an error line quotes


def read_completions(source: str | Mapping[str, str], tasks: Sequence[Task]) -> dict[str, list[Row]]:
    """{model: rows of task, problem_id, sample_index, completion, finish_reason, tokens}, in the order of the file.

    `source` is a file, or {model: file} for files without a model. Without `model` the model is "base", without `task`
    it is the only one, without `sample_index` samples of a problem are counted. EvaluationError with file and line for
    what is no completion, and with all faults at once for unknown tasks, unknown problems and samples given twice.
    """
    files: Mapping[str | None, str] = {None: source} if isinstance(source, str) else source  # pyright: ignore
    found: dict[str, list[Row]] = {}
    for model, name in files.items():
        file = Path(name)
        seen: dict[tuple[str, str, str, int], int] = {}
        faults: list[str] = []
        known = {task.name: {problem.id for problem in task.problems} for task in tasks}
        following: Counter[tuple[str, str, str]] = Counter()
        for number, row in _rows(file, tasks):
            row["model"] = str(model or row.get("model") or "base")
            place = (row["model"], row["task"], row["problem_id"])
            if row["sample_index"] is None:
                row["sample_index"] = following[place]
            following[place] += 1
            key = (*place, row["sample_index"])
            if row["task"] not in known:
                faults.append(f"line {number}: no task {row['task']!r} (one of: {', '.join(known)})")
            elif row["problem_id"] not in known[row["task"]]:
                faults.append(f"line {number}: {row['task']} has no problem {row['problem_id']!r}")
            elif seen.setdefault(key, number) != number:
                again = f"sample {key[-1]} of problem {key[2]!r} ({key[1]}, {key[0]})"
                faults.append(f"line {number}: {again} stands on line {seen[key]} already")
            else:
                found.setdefault(row.pop("model"), []).append(row)
        if faults:
            more = f"; {len(faults) - SHOWN} more of the kind" if len(faults) > SHOWN else ""
            raise EvaluationError(f"{file}: {'; '.join(faults[:SHOWN])}{more}; give the tasks that were asked")
    if not found:
        raise EvaluationError(f"{', '.join(map(str, files.values()))}: no completions in it; write one object a line")
    return found


def read_samples(run: Path, models: Sequence[str]) -> dict[str, list[Row]]:
    """The samples/*.jsonl of a finished run, by the names of its models."""
    found = {}
    for model in models:
        file = run / "samples" / f"{model.replace('/', '_')}.jsonl"
        if not file.is_file():
            raise EvaluationError(f"{file}: no samples of {model} are here; give the folder of a run that evaluated")
        found[model] = [row for _, row in _lines(file)]
    return found


def _rows(file: Path, tasks: Sequence[Task]) -> Iterator[tuple[int, Row]]:
    """(line, row) of either form, with every field that grading reads."""
    filters: dict[Any, str] = {}  # lm-eval writes a document once for each of its filters
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        if "task" not in line and len(tasks) > 1:
            names = ", ".join(task.name for task in tasks)
            raise EvaluationError(f"{where}, field task: missing, and the evaluation has {names}; name one")
        task = str(line.get("task") or tasks[0].name)
        if "resps" in line:
            chosen = filters.setdefault(line.get("doc_id"), str(line.get("filter")))
            if chosen != str(line.get("filter")):
                continue
            problem = _problem_of(line, next((t for t in tasks if t.name == task), tasks[0]), where)
            for index, text in enumerate(_texts(line["resps"], where)):
                yield number, _row(line | {"problem_id": problem, "sample_index": index}, task, text, where)
        else:
            yield number, _row(line, task, line.get("completion"), where)


def _row(line: Row, task: str, completion: Any, where: str) -> Row:
    index, tokens = line.get("sample_index"), line.get("tokens")
    if not isinstance(completion, str):
        raise EvaluationError(f"{where}, field completion: found {completion!r}, expected the text of the model")
    if not isinstance(line.get("problem_id"), str | int):
        raise EvaluationError(f"{where}, field problem_id: found {line.get('problem_id')!r}, expected a problem's id")
    for key, value in (("sample_index", index), ("tokens", tokens)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise EvaluationError(f"{where}, field {key}: found {value!r}, expected a number from 0")
    kept = {key: line.get(key) for key in ("model", "finish_reason")}
    about = {"task": task, "problem_id": str(line["problem_id"]), "sample_index": index}
    return kept | about | {"completion": completion, "tokens": tokens}


def _problem_of(line: Row, task: Task, where: str) -> str:
    """A document's problem: by its id, else by its place in the task, where the answers must then agree."""
    document = line.get("doc") if isinstance(line.get("doc"), Mapping) else {}
    known: dict[str, Problem] = {problem.id: problem for problem in task.problems}
    for key in IDS:
        if (identity := str((document or {}).get(key))) in known:
            return identity
    place, target = line.get("doc_id"), line.get("target")
    if not isinstance(place, int) or not 0 <= place < len(task.problems):
        raise EvaluationError(f"{where}, field doc_id: found {place!r}; {task.name} has {len(task.problems)} problems")
    problem = task.problems[place]
    if problem.answer is None or str(target).strip() != problem.answer:
        raise EvaluationError(
            f"{where}: its document has no id of {task.name}, and its target {target!r} is not the answer of "
            f"problem {problem.id!r} at that place; add the problem's id to the documents"
        )
    return problem.id


def _texts(responses: Any, where: str) -> list[str]:
    """lm-eval's `resps`: a list with one list of the repeated answers."""
    first = responses[0] if isinstance(responses, list) and responses else None
    texts = first if isinstance(first, list) else responses
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise EvaluationError(f"{where}, field resps: found {responses!r:.80}; only generated text can be graded")
    return texts


def _lines(file: Path) -> Iterator[tuple[int, Row]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        kind = type(row).__name__
                        raise EvaluationError(f"{file}, line {number}: found a {kind}, expected an object")
                    yield number, row
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{file}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file}: can't be read as UTF-8 text ({error}); give a JSONL file") from None
