"""Geometry of one 1.5B layer on random weights: python benchmarks/evidence.py [full|fast] [MODULE ...]
or lineage of checkpoints, beside a plain read of their files: python benchmarks/evidence.py lineage BASE EXPERT EXPERT

Prints CPU seconds of each matrix in one thread, the largest memory of the process, and minutes of 28 layers (196
matrices), extrapolated from this one layer: on one core, and on two of which the second halves the time.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra.utils import instantiate
from shapes import SHAPES

from rotrl.checkpoint.reader import open_checkpoint
from rotrl.config import compose
from rotrl.evidence.lineage import lineage
from rotrl.evidence.measure import Settings, measure

LAYERS = 28


def speed_of_lineage(base: str, *experts: str) -> None:
    folders = [Path(folder) for folder in (base, *experts)]
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    size, start = sum(file.stat().st_size for file in files) / 1e9, time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    read = time.perf_counter() - start
    root, *tuned = (open_checkpoint(folder) for folder in folders)
    start, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as out:
        found = lineage(root, {folder.name: model for folder, model in zip(folders[1:], tuned, strict=True)}, Path(out))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{size:.1f} GB: read {read:.1f} s, lineage {seconds:.1f} s ({cpu:.1f} CPU s): {found['verdict']}")


def main(preset: str = "full", *modules: str) -> None:
    if preset == "lineage":
        return speed_of_lineage(*modules)
    torch.set_num_threads(1)
    name = {"full": "geometry", "fast": "fast"}[preset]
    chosen = instantiate(compose([f"evidence={name}"]).evidence.geometry).keywords
    settings = Settings(0, **{key: chosen[key] for key in Settings._fields[1:] if key in chosen})
    generator, seconds = torch.Generator().manual_seed(0), {}
    for module in modules or SHAPES:
        W0 = (0.02 * torch.randn(SHAPES[module], generator=generator)).to(torch.bfloat16)
        W1 = (W0 + 2e-5 * torch.randn(SHAPES[module], generator=generator)).to(torch.bfloat16)
        start = time.process_time()
        tables = measure(W0, {"expert": W1}, f"model.layers.0.{module}", settings)
        rows = [row for table in tables.values() for row in table]
        seconds[module] = time.process_time() - start
        print(f"{module:<5} {SHAPES[module]!s:<13} {seconds[module]:6.1f} s  {len(rows)} rows", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    total = sum(seconds.values())
    print(f"layer {total:.1f} s of one core, {peak:.2f} GB at most")
    if not modules:
        minutes = total * LAYERS / 60
        print(f"{LAYERS} layers, extrapolated: {minutes:.1f} minutes on one core, {minutes / 2:.1f} on two")


if __name__ == "__main__":
    main(*sys.argv[1:])
