"""Geometry of one 1.5B layer on random weights: python benchmarks/evidence.py [full|fast] [MODULE ...]

Prints CPU seconds of each matrix in one thread, the largest memory of the process, and minutes of 28 layers (196
matrices), extrapolated from this one layer: on one core, and on two of which the second halves the time.
"""

import resource
import sys
import time

import torch
from hydra.utils import instantiate

from rotrl.config import compose
from rotrl.evidence.measure import Settings, measure

LAYERS = 28
SHAPES = {
    "q": (1536, 1536),
    "k": (256, 1536),
    "v": (256, 1536),
    "o": (1536, 1536),
    "gate": (8960, 1536),
    "up": (8960, 1536),
    "down": (1536, 8960),
}


def main(preset: str = "full", *modules: str) -> None:
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
