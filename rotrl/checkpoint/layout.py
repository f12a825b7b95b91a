"""What a tensor is for: by its name in Qwen2, Qwen3, Llama, Mistral, Gemma and Phi-3, else by its place and shape."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
# Fused projections (Phi-3), and matrices of layers whose names say nothing.
OTHER_MATRICES = ("qkv", "gate_up", "linear")

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_MATRIX = re.compile(r"\.(q|k|v|o|gate|up|down|qkv|gate_up)_proj\.weight$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte)\.weight$")
_HEAD = re.compile(r"(?:^|\.)lm_head\.weight$")
_NORM = re.compile(r"norm\w*\.weight$")
# For decoders of other families.
_EMBEDDING_LIKE = re.compile(r"(?:^|\.)(?!\w*pos)\w*embed\w*\.weight$")  # rows of positions are no tokens
_HEAD_LIKE = re.compile(r"(?:^|\.)(?:\w*head|output|embed_out)\.weight$")
_NORM_LIKE = re.compile(r"(?:^|[._])(?:ln|norm)\w*\.weight$")
_NOT_DECODER = re.compile(r"vision|visual|audio|multi_modal")


@dataclass(frozen=True)
class Role:
    """The decoder layer (None outside the layers) and the kind of module a tensor belongs to."""

    layer: int | None
    module: str

    @property
    def is_matrix(self) -> bool:
        """Whether it is a linear map of attention or MLP, stored (out, in)."""
        return self.module in MATRICES or self.module in OTHER_MATRICES


def role_of(name: str, shape: Sequence[int]) -> Role:
    """Role of a tensor: q, k, v, o, gate, up, down, qkv, gate_up, linear, embedding, head, norm, bias or other."""
    layer = _LAYER.search(name)
    if _NOT_DECODER.search(name):
        return Role(None, "other")
    module = _by_name(name, len(shape)) or _by_structure(name, len(shape), layer is not None)
    return Role(int(layer[1]) if layer else None, module or "other")


def by_structure(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor has no known name and its role rests on its place and shape."""
    return _by_name(name, len(shape)) is None and role_of(name, shape).module != "other"


def _by_name(name: str, dims: int) -> str | None:
    if dims == 2:
        if matrix := _MATRIX.search(name):
            return matrix[1]
        if _EMBEDDING.search(name):
            return "embedding"
        return "head" if _HEAD.search(name) else None
    if name.endswith(".bias"):
        return "bias"
    return "norm" if dims == 1 and _NORM.search(name) else None


def _by_structure(name: str, dims: int, in_layer: bool) -> str | None:
    if dims == 1 and _NORM_LIKE.search(name):
        return "norm"
    if dims != 2 or not name.endswith(".weight"):
        return None
    if in_layer:
        return "linear"
    if _HEAD_LIKE.search(name):
        return "head"
    return "embedding" if _EMBEDDING_LIKE.search(name) else None
