"""A base with two experts on disk, and methods bound from the shipped yaml files."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rotrl.checkpoint.reader import Checkpoint, open_checkpoint
from rotrl.merge.method import Method, bind

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
        return {**content["merge"], **changes}

    return load


@pytest.fixture
def method(shipped) -> Callable[..., Method]:
    """method("ties", density=.3) is the bound method for the experts math and code."""
    return lambda name, **changes: bind(shipped(name, **changes), ["math", "code"])
