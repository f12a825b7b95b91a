"""Rotation merges of all matrices of Qwen2-1.5B: python benchmarks/rotations.py [--method NAME ...] [--layers 28] ...

Random bases with two experts (updates of .08 % of the norm, stored in bfloat16), made in memory, one layer at a time;
on a GPU --batch layers of one shape at once. Seconds are CPU seconds of all threads, on a GPU those of the clock. With
--check one matrix of each shape is also merged by singular value decompositions, as the method was published, in
float64 (the truth that errors, over the update, refer to) and in float32.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from merge import method_of
from shapes import SHAPES
from torch import Tensor

from rotrl.linalg.spectrum import basis
from rotrl.linalg.tangent import tangent_projection
from rotrl.merge.rotation import how

LAYERS, UPDATE = 28, 8e-4


def orthomerge_by_svd(base: Tensor, experts: list[Tensor], hyper: dict[str, Any]) -> Tensor:
    """The anchored form on the right side, by the formulas of arXiv 2602.05943; wide: in the joint row space."""
    w0, ws = base, experts
    n = base.shape[-1]
    rows = torch.eye(n, dtype=base.dtype, device=base.device)
    if sum(len(m) for m in (base, *experts)) < n:
        rows = torch.linalg.qr(torch.cat([base, *experts]).mT)[0]
        w0, ws = base @ rows, [w @ rows for w in experts]
    mu = hyper["anchor"] * w0.square().sum() / min(base.shape)
    identity = torch.eye(w0.shape[-1], dtype=base.dtype, device=base.device)
    rotations = []
    for w in ws:
        vh, _, u = torch.linalg.svd((w0.mT @ w + mu * identity).mT)  # the transposes converge more often
        u, vh = u.mT, vh.mT
        rotations.append(u @ vh)
    generators = [torch.linalg.solve(r + identity, r - identity) for r in rotations]
    generators = [(q - q.mT) / 2 for q in generators]
    total = sum(generators[1:], generators[0])
    q = total * torch.stack([g.norm() for g in generators]).mean() / total.norm()
    merged = w0 @ torch.linalg.solve(identity - q, identity + q)
    for w, r in zip(ws, rotations, strict=True):
        merged = merged + hyper["residual_scale"] * (w - w0 @ r)
    return merged @ rows.mT


def split_by_svd(base: Tensor, experts: list[Tensor], hyper: dict[str, Any]) -> Tensor:
    d = sum(experts[1:], experts[0]) - len(experts) * base
    rotation = tangent_projection(basis(base, base.dtype), d, side=hyper["side"]).to(d)
    return base + hyper["alpha"] * rotation + hyper["beta"] * (d - rotation)


BY_SVD = {"orthomerge": orthomerge_by_svd, "split_task_arithmetic": split_by_svd}


def models(shape: tuple[int, int], seeds: list[int], device: str) -> tuple[Tensor, list[Tensor]]:
    """Base and experts (layers, out, in), without the first dimension for a single layer."""
    draws = [[torch.randn(shape, generator=torch.Generator().manual_seed(3 * s + i)) for s in seeds] for i in range(3)]
    base, *noise = (torch.stack(draw).to(device) if len(seeds) > 1 else draw[0].to(device) for draw in draws)
    base = (0.02 * base).bfloat16().float()
    return base, [(base + 0.02 * UPDATE * x).bfloat16().float() for x in noise]


def timed(call: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    if device == "cpu":
        begun = time.process_time()
        result = call()
        return time.process_time() - begun, result
    torch.cuda.synchronize()
    begun = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return time.perf_counter() - begun, result


def check(name: str, function: Callable[..., Tensor], hyper: dict[str, Any], module: str, device: str) -> str:
    """Errors over the update and ratios of times, as a line."""
    base, experts = models(SHAPES[module], [1000], device)
    seconds, merged = timed(partial(function, base, experts, **hyper), device)
    rough_seconds, rough = timed(partial(BY_SVD[name], base, experts, hyper), device)
    doubles = base.double(), [w.double() for w in experts]
    slow_seconds, truth = timed(partial(BY_SVD[name], *doubles, hyper), device)
    update = (truth - base).norm()
    wrong, rough_wrong, stored = (float((m - truth).norm() / update) for m in (merged, rough, truth.float()))
    return (
        f"error {wrong:.1e} (float32 rounds by {stored:.1e}), time over float64 SVD {seconds / slow_seconds:.2f}, "
        f"over float32 SVD {seconds / rough_seconds:.2f}, whose error is {rough_wrong:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=[*BY_SVD])
    parser.add_argument("--module", nargs="+", default=[*SHAPES], choices=[*SHAPES])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=4, help="layers merged at once on a GPU")
    parser.add_argument("--check", action="store_true", help="against singular value decompositions, on one layer")
    options = parser.parse_args()
    together = options.batch if options.device != "cpu" else 1
    print(f"{options.layers} of {LAYERS} layers, {options.device}, {torch.get_num_threads()} threads", flush=True)
    for name in options.method:
        method = method_of(name)
        function, hyper = method.function, method.hyper
        total = 0.0
        for module in options.module:
            seconds = 0.0
            for first in range(0, options.layers, together):
                seeds = [*range(first, min(first + together, options.layers))]
                base, experts = models(SHAPES[module], seeds, options.device)
                seconds += timed(partial(function, base, experts, **hyper), options.device)[0]
            total += seconds
            told = f"{name:<22} {module:<5} {SHAPES[module]!s:<13} {seconds / options.layers:7.2f} s a matrix"
            if "side" in hyper:
                told += f"  {how(SHAPES[module], hyper['side'])}"
            print(told, flush=True)
            if options.check and name in BY_SVD:
                print(f"{'':<22} {check(name, function, hyper, module, options.device)}", flush=True)
        whole = total * LAYERS / options.layers
        count = len(options.module) * LAYERS
        extrapolated = "" if options.layers == LAYERS else ", extrapolated"
        print(f"{name:<22} all {count} matrices {whole:.0f} s{extrapolated}", flush=True)


if __name__ == "__main__":
    main()
