"""Evidence at the shapes of Qwen2-1.5B, on random weights:

    python benchmarks/evidence.py [full|fast] [MODULE ...]                       geometry of one layer on one core
    python benchmarks/evidence.py full --layers 28 --device cuda [--batch N]     geometry of a whole pair on a GPU
    python benchmarks/evidence.py bases [MODULE ...]                             a basis made and taken from the disk
    python benchmarks/evidence.py lineage BASE EXPERT EXPERT                     beside a plain read of the files

Geometry prints CPU seconds in one thread (on a GPU seconds) of every batch, the memory that it took beside the memory
that it was planned with (on the CPU malloc keeps more), and minutes of 28 layers (196 matrices): measured, or
extrapolated from fewer.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra.utils import instantiate
from shapes import SHAPES
from torch import Tensor

from rotrl.checkpoint.reader import open_checkpoint
from rotrl.config import compose
from rotrl.evidence.bases import Bases
from rotrl.evidence.batches import batches, matrix_bytes
from rotrl.evidence.lineage import lineage
from rotrl.evidence.measure import Settings, measure
from rotrl.linalg.spectrum import basis

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


def speed_of_bases(*modules: str) -> None:
    """What a variant of a model pays for the basis of a matrix, the first time and later."""
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(Path(folder))
        for module in modules or SHAPES:
            W0 = weights(module).double()
            made, _ = seconds_of(lambda W0=W0: basis(W0), "cpu")
            bases.of(module, W0)
            taken, _ = seconds_of(lambda W0=W0, module=module: bases.of(module, W0), "cpu")
            print(f"{module:<5} made {made:6.2f} s, taken from the disk {taken:5.2f} s: {taken / made:.2f}", flush=True)


def speed_of_geometry(preset: str, modules: list[str], device: str, batch: int | str, layers: int) -> None:
    name = {"full": "geometry", "fast": "fast"}[preset]
    chosen = instantiate(compose([f"evidence={name}"]).evidence.geometry).keywords
    settings = Settings(0, **{key: chosen[key] for key in Settings._fields[1:] if key in chosen})
    dtype = getattr(torch, settings.dtype)
    shapes = {f"{layer}.{module}": SHAPES[module] for layer in range(layers) for module in modules}
    total = 0.0
    for names in batches(shapes, updates=1, dtype=dtype, device=device, batch=batch):
        W0 = torch.stack([weights(name.partition(".")[2]) for name in names])
        W1 = (W0 + 2e-5 * torch.randn(W0.shape)).to(torch.bfloat16)
        seconds, memory = seconds_of(lambda W0=W0, W1=W1, n=names: measure(W0, {"": W1}, n, settings, device), device)
        planned = len(names) * matrix_bytes(W0.shape[-2:], 1, dtype) / 1e9
        total += seconds
        print(
            f"{len(names):3} x {tuple(W0.shape[-2:])!s:<13} {names[0].partition('.')[2]:<5} {seconds:6.1f} s, "
            f"{seconds / len(names):6.2f} s each, {memory:.2f} GB (planned {planned:.2f})",
            flush=True,
        )
    print(f"{layers} layer{'s' * (layers > 1)}: {total:.1f} s" + ("" if device != "cpu" else " of one core"))
    if set(modules) == set(SHAPES):
        minutes = total * LAYERS / layers / 60
        told = f"{LAYERS} layers{', extrapolated' * (layers < LAYERS)}: {minutes:.1f} minutes"
        print(told + (f" on one core, {minutes / 2:.1f} on two" if device == "cpu" else f" on {device}"))


def weights(module: str) -> Tensor:
    return (0.02 * torch.randn(SHAPES[module])).to(torch.bfloat16)


def seconds_of(run: Callable[[], object], device: str) -> tuple[float, float]:
    """CPU seconds and GB that the run took at most; on a GPU seconds and GB that the run allocated there."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = resident("VmRSS"), time.process_time()
        run()
        return time.process_time() - start, resident("VmHWM") - before
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / 1e9


def resident(what: str) -> float:
    """GB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith(what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="full", choices=("full", "fast", "bases", "lineage"))
    parser.add_argument("names", nargs="*", help="modules, or folders of checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", default="auto", type=lambda text: text if text == "auto" else int(text))
    parser.add_argument("--layers", default=1, type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if given.what == "lineage":
        return speed_of_lineage(*given.names)
    if given.what == "bases":
        return speed_of_bases(*given.names)
    modules = given.names or list(SHAPES)
    return speed_of_geometry(given.what, modules, given.device, given.batch, given.layers)


if __name__ == "__main__":
    main()
