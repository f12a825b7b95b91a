"""What a tensor is for, told by its name (Qwen2, Qwen3, Llama, Mistral and their kin)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_MATRIX = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte)\.weight$")
_HEAD = re.compile(r"(?:^|\.)lm_head\.weight$")
_NORM = re.compile(r"norm\w*\.weight$")


@dataclass(frozen=True)
class Role:
    """The decoder layer (None outside the layers) and the kind of module a tensor belongs to."""

    layer: int | None
    module: str

    @property
    def is_matrix(self) -> bool:
        """Whether it is one of the seven linear maps of attention and MLP, stored (out, in)."""
        return self.module in MATRICES


def role_of(name: str, shape: Sequence[int]) -> Role:
    """Role of the tensor `name`: q, k, v, o, gate, up, down, embedding, head, norm, bias or other."""
    layer = _LAYER.search(name)
    return Role(int(layer[1]) if layer else None, _module_of(name, len(shape)))


def _module_of(name: str, dims: int) -> str:
    if dims == 2:
        if matrix := _MATRIX.search(name):
            return matrix[1]
        if _EMBEDDING.search(name):
            return "embedding"
        if _HEAD.search(name):
            return "head"
        return "other"
    if name.endswith(".bias"):
        return "bias"
    if dims == 1 and _NORM.search(name):
        return "norm"
    return "other"
