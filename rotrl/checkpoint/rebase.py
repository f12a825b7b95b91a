"""A descendant of another expert as that expert's sibling: what it learned since its parent, put on the base."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotrl.checkpoint.reader import Checkpoint


def rebase(child: Checkpoint, parent: Checkpoint, base: Checkpoint) -> Checkpoint:
    """`base + (child - parent)`, tensor by tensor in float32, as a checkpoint that is made while it is read.

    Its task vector is child - parent: in a merge the parent's update then counts once.
    """
    tensors = {
        name: replace(info, dtype=torch.float32, stored=info.stored or name) for name, info in child.tensors.items()
    }
    derived = {name: _Since(name, parent, base, child.derived.get(name)) for name in child.tensors}
    return replace(child, tensors=tensors, derived=derived, stamps={**base.stamps, **parent.stamps, **child.stamps})


@dataclass(frozen=True)
class _Since:
    name: str
    parent: Checkpoint
    base: Checkpoint
    stored: Callable[[Tensor], Tensor] | None  # how the child makes its tensor of the stored one, if it does

    def __call__(self, tensor: Tensor) -> Tensor:
        child = self.stored(tensor) if self.stored else tensor
        return self.base.view(self.name).float() + (child.float() - self.parent.view(self.name).float())
