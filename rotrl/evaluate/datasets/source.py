"""Rows of a published data set, from the hub at a revision or from a local copy in the same schema."""

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotrl.errors import EvaluationError, NoData
from rotrl.evaluate.task import Problem, Task

SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Benchmark(Task):
    """A task read from a published data set; `source` is `repository@commit` or the local file."""

    source: str = ""


@dataclass(frozen=True)
class Source:
    """Where a data set lives on the hub, what its rows must hold, and the configuration's node to change that."""

    name: str
    repo: str
    fields: tuple[str, ...]
    node: str = "evaluation.tasks"

    @property
    def key(self) -> str:
        return f"{self.node}.{self.name}" if self.node == "evaluation.tasks" else self.node


def fetch(source: Source, file: str, revision: str | None) -> tuple[Path, str]:
    """Local path of one file of the hub's data set, and the commit that it is of; `revision=None` is the newest.

    A commit in the hub's cache is used without the network, and without a network whatever the cache has.
    Raises NoData where the file is neither there nor reachable.
    """
    from huggingface_hub import HfApi, hf_hub_download

    def cached() -> str:
        return hf_hub_download(source.repo, file, repo_type="dataset", revision=revision, local_files_only=True)

    def download() -> str:
        # Asked first because it fails at once without a network, where a download retries for half a minute.
        commit = HfApi().dataset_info(source.repo, revision=revision, timeout=10).sha
        return hf_hub_download(source.repo, file, repo_type="dataset", revision=commit)

    pinned = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision)
    reasons = []
    for attempt in (cached, download) if pinned else (download, cached):
        try:
            path = Path(attempt())
            return path, _commit(path, file)
        except Exception as error:  # "no network", "no such revision" and "gated" share no base class in this client
            reasons.append(type(error).__name__)
    raise NoData(
        f"{source.name}: {source.repo} ({file}) is neither in the hub's cache nor reachable "
        f"({', '.join(reasons)}); give a local copy: {source.key}.path=DIR"
    )


def _commit(path: Path, file: str) -> str:
    """The cache keeps a file under snapshots/<commit>/<path in the repository>."""
    return path.parents[len(Path(file).parts) - 1].name


def local_file(source: Source, folder: Path, file: str, alone: bool) -> Path:
    """The copy of `file` in `folder`: by its path or name on the hub or, if `alone`, <task>.jsonl, .json, .parquet."""
    names = [file, Path(file).name, *(source.name + suffix for suffix in SUFFIXES if alone)]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES) if folder.is_dir() else []
    what = (
        f"found {', '.join(p.name for p in found) or 'no data file'}" if folder.is_dir() else "no such file or folder"
    )
    raise EvaluationError(f"{source.key}.path={folder}: {what}; it needs {' or '.join(dict.fromkeys(names))}")


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON array, JSON lines or parquet file, one at a time (LiveCodeBench has lines of 50 MB)."""
    if file.suffix == ".parquet":
        yield from _parquet(file)
        return
    try:
        with file.open(encoding="utf-8") as stream:
            first = stream.read(1)
            stream.seek(0)
            found = _array(file, stream.read()) if first == "[" else _lines(file, stream)
            for number, row in enumerate(found, start=1):
                if not isinstance(row, dict):
                    raise EvaluationError(f"{file}, row {number}: found a {type(row).__name__}, expected an object")
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file}: can't be read as UTF-8 text ({error})") from None


def _array(file: Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from None


def _lines(file: Path, lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise EvaluationError(f"{file}, line {number}: not JSON ({error.msg}): {line[:40]!r}") from None


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow.lib import ArrowException  # pyright: ignore[reportMissingImports]
        from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise EvaluationError(
            f"{file}: reading parquet needs pyarrow; `pip install pyarrow`, or give the same rows as JSON lines"
        ) from None
    try:
        for batch in ParquetFile(file).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise EvaluationError(f"{file}: not a parquet file ({str(error).splitlines()[0]})") from None


def locate(
    source: Source, path: str | Path | None, revision: str | None, files: Mapping[str, int | None]
) -> tuple[str, dict[Path, int | None]]:
    """Origin of the set and its local files with the rows each must hold: {path: rows, or None if any number will do}.

    `files` names them as on the hub. A `path` that is one file stands for all of them.
    """
    if path is None:
        fetched = [(fetch(source, file, revision), count) for file, count in files.items()]
        return f"{source.repo}@{fetched[0][0][1]}", {local: count for (local, _), count in fetched}
    given = Path(path).expanduser()
    alone = len(files) == 1
    if given.is_file():
        return str(path), {given: next(iter(files.values())) if alone else None}
    return str(path), {local_file(source, given, file, alone): count for file, count in files.items()}


def read(source: Source, files: Mapping[Path, int | None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row. Fields are checked at each row, the count at each file's end: to stop early skips it.

    Raises EvaluationError naming the file, what it holds and what was expected.
    """
    for file, expected in files.items():
        count = 0
        for count, row in enumerate(rows(file), start=1):
            if missing := [field for field in source.fields if row.get(field) is None]:
                raise EvaluationError(
                    f"{file}, row {count}: {', '.join(missing)} missing; the row has {', '.join(sorted(row))}"
                )
            yield f"{file}, row {count}", row
        if expected is not None and count != expected:
            raise EvaluationError(f"{file}: found {count} rows, expected {expected}: not a whole copy of {source.repo}")


def fill(template: str, key: str, **values: str) -> str:
    r"""The template with each {name} replaced by its value, once (`str.format` trips over \boxed{})."""
    for name in values:
        if f"{{{name}}}" not in template:
            raise EvaluationError(f"{key}.prompt: {{{name}}} is missing in {template!r}")
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda found: values[found[1]], template)


def draw(problems: Sequence[Problem], limit: int | None, seed: int) -> tuple[Problem, ...]:
    """`limit` of the problems at random, in their order: a set sorted by origin is not cut at its first origin."""
    if limit is None or limit >= len(problems):
        return tuple(problems)
    return tuple(problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), limit)))
