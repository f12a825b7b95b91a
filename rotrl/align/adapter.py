"""What was learned as a PEFT adapter of the weights that the alignment began from: `PeftModel.from_pretrained`.

Right rotations of whole matrices are OFT adapters (arXiv 2306.07280), low-rank deltas LoRA adapters.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rotrl.checkpoint.files import whole_file
from rotrl.checkpoint.rotations import Delta, Rotation, is_frame
from rotrl.errors import ConfigError
from rotrl.linalg.cayley import inverse_cayley
from rotrl.linalg.procrustes import nearest


def save_oft(
    folder: Path,
    rotations: Mapping[str, Rotation | Delta],
    source: str | None,
    *,
    block: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """One full block per matrix, which is exact, or blocks of `block` inputs and what they leave out.

    `W R` with `R = (I - A)^{-1} (I + A)` is PEFT's Cayley branch with A (its Neumann branch would need -A); stored is
    the upper triangle of A, row by row, as (blocks, b (b - 1) / 2). The blocks B are the polar factors of those of R;
    what `weights` lack for `W R`, `W R B^T - W`, goes to residual.safetensors, to be added to the source's weights. Its
    length stands in README.md. ConfigError where something else than inputs is rotated.
    """
    entries, rest = {}, {}
    for name, rotation in rotations.items():
        if not isinstance(rotation, Rotation) or rotation.right is None or rotation.left is not None:
            raise ConfigError(f"align.adapter: '{name}' is not rotated on its inputs alone; use align.side=right")
        if is_frame(rotation.right):
            raise ConfigError(
                f"align.adapter: '{name}' has a thin frame, and PEFT no adapter for it; use align.side=right"
            )
        r = rotation.right.double()
        if block and len(r) % block:
            raise ConfigError(f"align.adapter_block={block} does not divide the {len(r)} inputs of '{name}'")
        parts = _diagonal(r, block or len(r))
        blocks = nearest(parts) if block else parts
        a = inverse_cayley(blocks)
        rows, columns = torch.triu_indices(a.shape[-1], a.shape[-1], 1)
        entries[f"{_module(name)}.oft_R.weight"] = a[:, rows, columns].float()
        if block and weights:
            w = weights[name].double()
            rest[name] = (w @ (r @ torch.block_diag(*blocks).mT) - w, rotation.apply(w) - w)
    sizes = {"r": 0, "oft_block_size": block} if block else {"r": 1, "oft_block_size": 0}
    exact = {"use_cayley_neumann": False, "bias": "none"}
    _save(folder, entries, {"peft_type": "OFT", **sizes, **exact}, list(rotations), source)
    if rest:
        _save_residual(folder, rest)


def _diagonal(r: Tensor, block: int) -> Tensor:
    """(blocks, block, block) of the diagonal."""
    return torch.stack([r[at : at + block, at : at + block] for at in range(0, len(r), block)])


def _save_residual(folder: Path, rest: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    left, whole = (torch.stack([pair[i].square().sum() for pair in rest.values()]).sum().sqrt() for i in (0, 1))
    with whole_file(folder / "residual.safetensors") as temporary:
        save_file({name: pair[0].float().contiguous() for name, pair in rest.items()}, temporary)
    with whole_file(folder / "README.md") as temporary:
        temporary.write_text(
            "OFT adapter in blocks of rotations that were learned whole. What the blocks leave out is in "
            f"residual.safetensors: length {float(left):.4g}, {float(left / whole) if whole else 0:.1%} of the whole "
            "change. Add it to the weights of the same names before the adapter is loaded; without it the adapter is "
            "another model.\n"
        )


def save_lora(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], source: str | None) -> None:
    """A (rank, in) and B (out, rank) of every matrix, at alpha = rank."""
    rank = next(iter(factors.values()))[0].shape[0]
    entries = {f"{_module(name)}.lora_A.weight": a for name, (a, _) in factors.items()}
    entries |= {f"{_module(name)}.lora_B.weight": b for name, (_, b) in factors.items()}
    _save(folder, entries, {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}, list(factors), source)


def _save(folder: Path, entries: dict[str, Tensor], config: dict[str, Any], names: list[str], source: str | None):
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": source}
    targets = sorted(name.removesuffix(".weight") for name in names)
    with whole_file(folder / "adapter_model.safetensors") as temporary:
        save_file({key: entry.float().contiguous() for key, entry in entries.items()}, temporary)
    with whole_file(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps({**config, **shared, "target_modules": targets}, indent=1))


def _module(name: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}"
