"""Time of one step of a fit on one layer of 1.5B size, against LoRA as the fit does it (W + B A is formed).

python benchmarks/align.py [tokens [layers]]     random weights, CPU

The products of each linear map with `tokens` inputs stand for the model: teachers, attention and head, which are the
same for every family, are left out. Adapting the weights, its backward pass and the optimiser do not depend on the
number of tokens; the products do, in proportion: the ratio at 8 x 2048 tokens, the batch of the 1.5B experiment, is
extrapolated from the time of the products at `tokens`, and marked so.

The optimiser's part of stiefel is measured against geoopt's RiemannianAdam on geoopt's own EuclideanStiefel (QR), with
one parameter a matrix, on the same gradients, for the 1.5B layer and for many small matrices. Beside each stand the
products of (d, d) matrices that a step counts, and the ratio that products and QR alone allow: passes over the entries
are the optimiser's own and the same for both.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import geoopt
import torch
from shapes import SHAPES
from torch.utils.flop_counter import FlopCounterMode

from rotrl.align.deltas import Free, LowRank
from rotrl.align.family import Family
from rotrl.align.frames import Frames
from rotrl.align.low_rank import LowRankTurns
from rotrl.align.manifold import Stiefel
from rotrl.align.parametrization import Rotations

BATCH = 8 * 2048  # tokens
FAMILIES: dict[str, Callable[[dict[str, torch.Tensor]], Family]] = {
    "lora": LowRank,
    "stiefel small": Rotations,
    "stiefel blocks of 256": lambda matrices: Rotations(matrices, block=256),
    "stiefel thin frame": Frames,
    "low_rank": LowRankTurns,
    "free": Free,
}


def step_seconds(family: Family, inputs: dict[str, torch.Tensor], repeats: int = 2) -> tuple[float, float, float]:
    """(whole step, products with the adapted weights, optimiser's part), the fastest of `repeats`, in CPU seconds."""
    optimizer = geoopt.optim.RiemannianAdam(family.groups(1e-4), betas=(0.9, 0.95))
    best = (float("inf"),) * 3
    for _ in range(repeats + 1):
        optimizer.zero_grad()
        marks = [time.process_time()]
        adapted = family()
        leaves = {name: weight.detach().requires_grad_() for name, weight in adapted.items()}
        marks.append(time.process_time())
        torch.stack([(inputs[name] @ weight.mT).square().mean() for name, weight in leaves.items()]).sum().backward()
        marks.append(time.process_time())
        torch.autograd.backward(list(adapted.values()), [leaf.grad for leaf in leaves.values()])
        marks.append(time.process_time())
        optimizer.step()
        marks.append(time.process_time())
        best = min(best, (marks[-1] - marks[0], marks[2] - marks[1], marks[4] - marks[3]))
    return best


def optimiser_cost(parameters: list[geoopt.ManifoldParameter], repeats: int = 2) -> tuple[float, float]:
    """(CPU seconds, products) of a step on random gradients of the length that the others have."""
    d, k = parameters[0].shape[-1], sum(len(part.view(-1, *part.shape[-2:])) for part in parameters)
    optimizer = geoopt.optim.RiemannianAdam(parameters, lr=5e-3 * d**0.5, betas=(0.9, 0.95))
    best = products = float("inf")
    for attempt in range(repeats + 1):
        for part in parameters:
            part.grad = torch.randn_like(part)
        with FlopCounterMode(display=False) if attempt == 0 else nullcontext() as counter:
            start = time.process_time()
            optimizer.step()
            best = min(best, time.process_time() - start)
        products = counter.get_total_flops() / (2 * k * d**3) if counter else products
    return best, products


def seconds_of(work: Callable[[], object]) -> float:
    work()
    start = time.process_time()
    work()
    return time.process_time() - start


def against_geoopt(k: int, d: int) -> str:
    """k rotations in d dimensions: a stack on our manifold, one parameter a matrix on geoopt's."""
    eye = torch.eye(d)
    stack = geoopt.ManifoldParameter(eye.expand(k, d, d).clone(), manifold=Stiefel())  # type: ignore[call-arg]
    own = geoopt.EuclideanStiefel()
    alone = [geoopt.ManifoldParameter(eye.clone(), manifold=own) for _ in range(k)]  # type: ignore[call-arg]
    (ours, few), (theirs, many) = optimiser_cost([stack]), optimiser_cost(alone)
    x = torch.randn(k, d, d)
    product, qr = seconds_of(lambda: x @ x), seconds_of(lambda: [torch.linalg.qr(part) for part in x])
    return (
        f"{ours:.3f} s ({few:.0f} products of {product:.3f} s), geoopt {theirs:.3f} s ({many:.0f} products and a QR of "
        f"{qr:.3f} s): {theirs / ours:.1f} x; products and QR allow {(many * product + qr) / (few * product):.1f} x"
    )


def main(tokens: int, layers: int) -> None:
    torch.manual_seed(0)
    print(f"float32, {torch.get_num_threads()} threads, CPU seconds")
    for k, d in ((layers, 1536), (196, 96), (196, 48)):
        print(f"optimiser, {k} x {d}: {against_geoopt(k, d)}", flush=True)
    matrices = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in SHAPES.items()}
    inputs = {name: torch.randn(tokens, shape[1], requires_grad=True) for name, shape in SHAPES.items()}
    print(f"one layer of 1.5B size, {tokens} tokens")
    base, whole_base = None, None
    for label, make in FAMILIES.items():
        whole, products, optimiser = step_seconds(make(matrices), inputs)
        batch = whole + (BATCH / tokens - 1) * products
        base, whole_base = base or whole, whole_base or batch
        told = f"{whole:6.2f} s, optimiser {optimiser:5.2f} s, {whole / base:5.2f} x lora"
        print(f"{label:<24}{told}; extrapolated to 8 x 2048 tokens {batch / whole_base:5.2f} x lora", flush=True)


if __name__ == "__main__":
    main(*(int(given) for given in (sys.argv[1:] + ["2048", "2"][len(sys.argv) - 1 :])))
