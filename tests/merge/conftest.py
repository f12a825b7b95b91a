"""A base with two experts on disk, and methods bound from the shipped yaml files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from rotrl.checkpoint.reader import Checkpoint, open_checkpoint
from rotrl.merge.bind import bind
from rotrl.merge.method import Method

CONF = Path(__file__).parents[2] / "conf" / "merge"


@pytest.fixture
def trio(tensors, save) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    base = tensors(0)
    experts = {name: tensors(seed, base=base) for name, seed in (("math", 1), ("code", 2))}
    return (
        open_checkpoint(save("base", base)),
        {name: open_checkpoint(save(name, weights)) for name, weights in experts.items()},
    )


@pytest.fixture
def shipped() -> Callable[..., dict]:
    """shipped("ties", density=.3) is the configuration of conf/merge/ties.yaml with merge_scale 1 and seed 0."""

    def load(name: str, **changes: object) -> dict:
        root = OmegaConf.create({"merge_scale": 1.0, "seed": 0, "merge": OmegaConf.load(CONF / f"{name}.yaml")})
        content = OmegaConf.to_container(root, resolve=True)
        assert isinstance(content, dict)
        under = {}
        for entry in content["merge"].pop("defaults", []):
            under |= {} if entry == "_self_" else {"of": load(entry["/merge@of"])}
        return {**content["merge"], **under, **changes}

    return load


@pytest.fixture
def method(shipped) -> Callable[..., Method]:
    """method("ties", density=.3) is the bound method for the experts math and code."""
    return lambda name, **changes: bind(shipped(name, **changes), ["math", "code"])


@pytest.fixture(scope="session")
def models() -> Callable[..., tuple[np.ndarray, list[np.ndarray]]]:
    """models(seed, shape, count, size) are a base and experts, float64 numpy of numbers that float32 holds."""

    def make(seed: int = 0, shape: tuple[int, ...] = (4, 6), count: int = 3, size: float = 0.3):
        rng = np.random.default_rng(seed)
        base = rng.standard_normal(shape).astype(np.float32).astype(float)
        experts = [base + size * rng.standard_normal(shape) for _ in range(count)]
        return base, [expert.astype(np.float32).astype(float) for expert in experts]

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., np.ndarray]:
    """run(function, base, experts, **hyper) in float32, given back as float64 numpy; dtype=torch.float64 on request."""

    def call(function, base, experts, *, dtype=torch.float32, **hyper):
        merged = function(torch.tensor(base, dtype=dtype), [torch.tensor(e, dtype=dtype) for e in experts], **hyper)
        assert merged.dtype == dtype
        assert merged.shape == base.shape
        return merged.double().numpy()

    return call


@pytest.fixture(scope="session")
def close() -> Callable[[np.ndarray, np.ndarray], None]:
    """close(actual, expected) to float32's precision."""
    return lambda actual, expected: np.testing.assert_allclose(
        actual, expected, atol=3e-6 * max(1, np.abs(expected).max())
    )
