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
from rotrl.checkpoint.rotations import Delta, Rotation
from rotrl.errors import ConfigError
from rotrl.linalg.cayley import inverse_cayley


def save_oft(folder: Path, rotations: Mapping[str, Rotation | Delta], source: str | None) -> None:
    """One full block per matrix, which is exact. ConfigError where something else than inputs is rotated.

    `W R` with `R = (I - A)^{-1} (I + A)` is PEFT's Cayley branch with A (its Neumann branch would need -A); stored is
    the upper triangle of A, row by row, as (1, n (n - 1) / 2).
    """
    entries = {}
    for name, rotation in rotations.items():
        if not isinstance(rotation, Rotation) or rotation.right is None or rotation.left is not None:
            raise ConfigError(f"align.adapter: '{name}' is not rotated on its inputs alone; use align.side=right")
        a = inverse_cayley(rotation.right.double())
        rows, columns = torch.triu_indices(len(a), len(a), 1)
        entries[f"{_module(name)}.oft_R.weight"] = a[rows, columns][None].float()
    exact = {"r": 1, "oft_block_size": 0, "use_cayley_neumann": False, "bias": "none"}
    _save(folder, entries, {"peft_type": "OFT", **exact}, list(rotations), source)


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
