"""What stages need from the models at work: samples of the experts, and Gram matrices of their inputs."""

import time
from dataclasses import replace
from pathlib import Path

from rotrl.app.job import Run
from rotrl.app.stage import digest, source_digest
from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.folder import on_disk


def rollouts(job: Run) -> dict[str, Path] | None:
    """Samples of every expert that a stage needs, on its own prompts, made once by vLLM and kept by weight hash."""
    models = job.prepared
    if not models.prompts or job.files:
        return job.files
    from rotrl.evaluate.rollouts import rollouts as sample

    settings = models.samples or {}
    start, began = time.monotonic(), time.time()
    with job.bar("rollouts") as progress:
        files = sample(
            {name: models.experts[name].path for name in models.prompts},
            models.prompts,
            weights=models.weights,
            n=settings["n"],
            sampling=settings["sampling"],
            engine=job.cfg["engine"],
            cache=job.cache,
            seed=job.cfg["seed"],
            base=models.base.path,
            progress=progress,
        )
    free_gpu()
    key = digest({name: file_sha256(file) for name, file in files.items()})
    reused = all(file.stat().st_mtime < began for file in files.values())
    job.stages.record("rollouts", key, time.monotonic() - start, reused=reused)
    job.files = files
    return files


def free_gpu() -> None:
    """The engine holds most of the GPU's memory, and what comes next needs it."""
    import torch

    from rotrl.evaluate.engine import close_shared_engine

    if torch.cuda.is_available():
        close_shared_engine()


def grams(job: Run) -> dict[str, Path] | None:
    """Gram matrices of every expert's samples, if a merge needs them; made once, kept by weights and samples."""
    models = job.prepared
    if models.gram is None:
        return None
    from rotrl.align.gram import gather

    # The weights that are merged are those whose inputs count, re-based and in their own gauge.
    vectors = {name: on_disk(vector, job.cache) for name, vector in models.vectors.items()}
    job.prepared = replace(models, vectors=vectors)
    began, files, folders, reused = time.monotonic(), rollouts(job) or {}, {}, True
    settings = {key: value for key, value in models.gram.items() if key != "samples"}
    followed = [settings.get("max_tokens"), job.cfg["trainer"].get("precision"), source_digest(("checkpoint", "align"))]
    for name, expert in vectors.items():
        key = digest([expert.sha256, file_sha256(files[name]), *followed])
        folders[name] = job.cache / "grams" / f"{name}-{key[:16]}"
        if not folders[name].is_dir():  # appears whole or not at all
            reused = False
            with job.bar(f"gram {name}") as progress:
                gather(expert, files[name], folders[name], trainer=job.cfg["trainer"], progress=progress, **settings)
    key = digest({name: folder.name for name, folder in folders.items()})
    job.stages.record("grams", key, time.monotonic() - began, reused=reused)
    return folders
