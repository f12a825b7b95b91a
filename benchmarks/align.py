"""Time of one step of a fit on one layer of 1.5B size, against LoRA as the fit does it (W + B A is formed).

python benchmarks/align.py [tokens]     random weights, CPU

The products of each linear map with `tokens` inputs stand for the model: teachers, attention and head are left out.
Adapting the weights, its backward pass and the optimiser do not depend on the number of tokens; products with the
adapted weights do. All 28 layers cost 28 times one layer: extrapolated, not measured.
"""

import sys
import time
from collections.abc import Callable

import geoopt
import torch

from rotrl.align.deltas import Free, LowRank
from rotrl.align.family import Family
from rotrl.align.parametrization import LowRankTurns, Rotations

SHAPES = {
    "q": (1536, 1536),
    "k": (256, 1536),
    "v": (256, 1536),
    "o": (1536, 1536),
    "gate": (8960, 1536),
    "up": (8960, 1536),
    "down": (1536, 8960),
}
FAMILIES: dict[str, Callable[[dict[str, torch.Tensor]], Family]] = {
    "lora": LowRank,
    "stiefel small": Rotations,
    "stiefel blocks of 256": lambda matrices: Rotations(matrices, block=256),
    "low_rank": LowRankTurns,
    "free": Free,
}


def step_seconds(family: Family, inputs: dict[str, torch.Tensor], repeats: int = 3) -> tuple[float, float]:
    """(whole step, optimiser's part), the fastest of `repeats`."""
    optimizer = geoopt.optim.RiemannianAdam(family.groups(1e-4), betas=(0.9, 0.95))
    best = (float("inf"), float("inf"))
    for _ in range(repeats + 1):
        optimizer.zero_grad()
        start = time.perf_counter()
        adapted = family()
        torch.stack([(inputs[name] @ weight.mT).square().mean() for name, weight in adapted.items()]).sum().backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        best = min(best, (end - start, end - middle))
    return best


def main(tokens: int) -> None:
    torch.manual_seed(0)
    matrices = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in SHAPES.items()}
    inputs = {name: torch.randn(tokens, shape[1], requires_grad=True) for name, shape in SHAPES.items()}
    print(f"one layer, {tokens} tokens, float32, {torch.get_num_threads()} threads")
    base = None
    for label, make in FAMILIES.items():
        whole, optimiser = step_seconds(make(matrices), inputs)
        base = base or whole
        told = f"{whole:6.2f} s, optimiser {optimiser:5.2f} s, {whole / base:5.2f} x lora"
        print(f"{label:<24}{told}; 28 layers about {28 * whole:.0f} s", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2048)
