"""Verdicts beside generation: each distinct answer is graded once, and its verdict is kept with the samples."""

import hashlib
import json
from concurrent.futures import Future
from dataclasses import asdict
from functools import cache
from pathlib import Path

from rotrl.evaluate.grade import Grader
from rotrl.evaluate.store import Store
from rotrl.evaluate.task import Problem, Task
from rotrl.evaluate.verdict import Verdict

GRADERS = (
    "verdict.py",
    "grade.py",
    "math.py",
    "math_pool.py",
    "published.py",
    "code.py",
    "compare.py",
    "sandbox",
)


class Verdicts:
    """Grades for all models: the same answer to the same problem has one verdict, whoever gave it. `settings` are those
    of the grader; with its source, the sandbox level, problem and answer they make the key of a verdict. What could not
    be graded is not kept."""

    def __init__(self, grader: Grader, folder: Path, settings: dict) -> None:
        self._grader = grader
        self._store = Store(folder)
        self._common = json.dumps([source_sha256(), grader.sandbox_level, settings], sort_keys=True).encode()
        self._problems: dict[tuple[str, str], bytes] = {}
        self._asked: dict[str, Future[Verdict]] = {}
        self._unsaved: dict[str, Future[Verdict]] = {}

    def submit(self, task: Task, problem: Problem, completion: str) -> "Future[Verdict]":
        """The verdict, which may already be known or under way for the same answer."""
        key = self._key(task, problem, completion)
        if key not in self._asked:
            known = self._store.get(key)
            if known is None:
                self._asked[key] = self._unsaved[key] = self._grader.submit(task, problem, completion)
            else:
                self._asked[key] = Future()
                self._asked[key].set_result(Verdict(**known))
        return self._asked[key]

    def save(self) -> None:
        """Keep the verdicts that have been reached since the last call; another thread may submit meanwhile."""
        reached = {key: future.result() for key, future in list(self._unsaved.items()) if future.done()}
        for key in reached:
            del self._unsaved[key]
        if new := [(key, asdict(verdict)) for key, verdict in reached.items() if verdict.correct is not None]:
            self._store.append(new)

    def close(self) -> None:
        self._store.close()

    def _key(self, task: Task, problem: Problem, completion: str) -> str:
        place = (task.name, problem.id)
        if place not in self._problems:
            content = json.dumps([task.grader, vars(problem)], sort_keys=True, default=vars).encode()
            self._problems[place] = hashlib.sha256(self._common + content).digest()
        return hashlib.sha256(self._problems[place] + completion.encode(errors="surrogatepass")).hexdigest()[:32]


@cache
def source_sha256() -> str:
    """Digest of the graders' source: an edited grader never answers with an old verdict."""
    here, state = Path(__file__).parent, hashlib.sha256()
    for name in GRADERS:
        for file in sorted((here / name).rglob("*.py")) if (here / name).is_dir() else [here / name]:
            state.update(file.read_bytes())
    return state.hexdigest()
