"""Singular bases on disk: a matrix is decomposed once, however many variants of a model ask for its basis."""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rotrl.checkpoint.files import whole_file
from rotrl.errors import ConfigError
from rotrl.linalg.spectrum import Basis, basis


class Bases:
    """Of W = U diag(s) V^T the singular vectors of the smaller side and s are kept, r (r + 1) numbers in float64.

    The other side is W V / s (0 where s is): a product in place of a decomposition, and a fifth of the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reserve(self, shapes: Iterable[Sequence[int]], models: int) -> None:
        """Makes the folder. ConfigError where the disk has no room for the bases of so many models."""
        needed = models * sum(8 * min(shape) * (min(shape) + 1) for shape in shapes)
        self.folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))  # of a run that was killed
        free = there + shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConfigError(
                f"{self.folder}: evidence=function keeps up to {needed / 1e9:.1f} GB of singular bases while it runs "
                f"and {free / 1e9:.1f} GB are free; free space or set run_dir=DIR on a larger disk"
            )

    def of(self, name: str, W: Tensor) -> Basis:
        """The basis of W (m, n), float64. `name` says which W it is, by the hash of the model that holds it."""
        if W.shape[0] < W.shape[1]:
            return self.of(name, W.mT).mT
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}.safetensors"
        if not path.is_file():
            found = basis(W)
            with whole_file(path) as temporary:
                save_file({"s": found.s.contiguous(), "V": found.V.contiguous()}, temporary)
        kept = load_file(path, device=str(W.device))
        s, V = kept["s"], kept["V"]
        return Basis((W @ V) * torch.where(s > 0, 1 / s, 0.0), s, V)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
