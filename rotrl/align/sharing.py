"""Where rotations act: on which side of a matrix, and which matrices have one in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from rotrl.checkpoint.layout import role_of
from rotrl.errors import ConfigError
from rotrl.values import Sharing, Side

SIDES, SHARES = get_args(Side), get_args(Sharing)
READS = ("q", "k", "v", "qkv", "gate", "up", "gate_up", "embedding", "head")  # rows of an embedding count as read
WRITES = ("o", "down")
DENSE = 4096  # dimensions of a rotation that is taken whole without being asked for


@dataclass(frozen=True)
class Place:
    """`side` of a matrix (out, in) where the rotation `owner` acts, or its transpose if `inverse`."""

    side: str
    owner: str
    inverse: bool = False


def places(name: str, shape: Sequence[int], side: str, share: str) -> tuple[Place, ...]:
    """Where a tensor is rotated.

    share: `none`, each on its own; `layer`, matrices of a layer that are turned on one side in one dimension;
    `residual`, one rotation R of the residual stream, `W R^T` for what reads it and `R W` for what writes to it.
    """
    if share not in SHARES:
        raise ConfigError(f"align.share={share!r}; one of: {', '.join(SHARES)}")
    role = role_of(name, shape)
    if share == "residual":
        if side != "small":
            raise ConfigError(f"align.share=residual says itself where rotations act; leave out align.side={side}")
        if role.module in READS:
            return (Place("right", "residual", inverse=True),)
        if role.module in WRITES:
            return (Place("left", "residual"),)
        raise ConfigError(f"align.share=residual: whether '{name}' reads or writes is not known; use share=layer")
    owner = name if share == "none" or role.layer is None else f"layer {role.layer}"
    return tuple(Place(acts, owner) for acts in sides_of(shape, side))


def sides_of(shape: Sequence[int], side: str) -> tuple[str, ...]:
    """The sides where a matrix (out, in) is rotated; ConfigError for a side that is none of SIDES."""
    return ("left", "right") if side == "both" else (side_of(shape, side),)


def side_of(shape: Sequence[int], side: str) -> str:
    """`left` or `right` for a matrix (out, in), of which `both` gives the one of `small`; `large` is the other."""
    if side not in SIDES:
        raise ConfigError(f"align.side={side!r}; one of: {', '.join(SIDES)}")
    if side in ("left", "right"):
        return side
    return "left" if (shape[0] < shape[1]) != (side == "large") else "right"


def blocks_of(d: int, block: int | None, name: str) -> int:
    """Number of blocks of a rotation in d dimensions; one where `block` is None or not smaller."""
    if block is None and d > DENSE:
        raise ConfigError(
            f"'{name}' would be rotated by a dense matrix in {d} dimensions; use align.side=small, align=stiefel with "
            f"align.side=large, align=low_rank or a smaller align.block (align.block={d} asks for the dense one)"
        )
    if block is None or block >= d:
        return 1
    if block < 1 or d % block:
        raise ConfigError(f"align.block={block} does not divide the {d} dimensions of '{name}'")
    return d // block
