"""The tensors of one merge, each made when asked for; streaming and in-memory merges are loops over it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rotrl.checkpoint.grams import Grams, open_grams
from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint, check_family
from rotrl.checkpoint.rotations import RotationsFile
from rotrl.errors import CheckpointError, ConfigError, NumericsError
from rotrl.merge.check import pattern_faults
from rotrl.merge.chunks import Chunks, finite
from rotrl.merge.given import open_fitting, open_given
from rotrl.merge.method import Method, bind
from rotrl.merge.scale import Merged
from rotrl.merge.statistics import Statistics

Source = Callable[[str, Tensor, Sequence[Tensor]], Tensor]


class Merger:
    """Checks all that headers can tell, then gives base, experts and merge of a tensor by its name, piece by piece."""

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        method: Method,
        rotations: Path | None = None,
        grams: Mapping[str, Path] | None = None,
    ) -> None:
        check_family(base, experts)
        self.base, self.experts, self.method = base, dict(experts), method
        self.roles = {name: role_of(name, info.shape) for name, info in base.tensors.items()}
        self._last_layer = max((role.layer or 0 for role in self.roles.values()), default=0)
        self.acted = [name for name, info in base.tensors.items() if method.acts_on(self.roles[name], len(info.shape))]
        if not self.acted:
            raise ConfigError(
                f"merge={method.name} acts on the matrices of attention and MLP, and no tensor of {base.path} has such "
                "a name; use merge.scope=all"
            )
        if faults := pattern_faults(method.per_layer, list(base.tensors)):
            raise ConfigError("; ".join(faults))
        self._under = Merger(base, experts, method.of, rotations, grams) if method.of else None
        self.rotations: RotationsFile | None = self._under.rotations if self._under else None
        self._source: Source | None = None
        if method.needs_rotations and self.rotations is None:
            if rotations is None:
                raise ConfigError(f"merge={method.name} applies rotations and there are none; choose an align stage")
            self.rotations = open_fitting(rotations, base, self.experts)
            if self.rotations.deltas and not method.takes_deltas:
                raise ConfigError(
                    f"merge={method.name} turns weights and {rotations} holds no rotations; choose align=stiefel"
                )
            self._source = self._source_of(self.rotations)
        self.given = open_given(method.rotation_files, base, self.experts)
        self.grams = self._open_grams(grams) if method.gram is not None else {}

    def by_rows(self, name: str) -> bool:
        """Whether the tensor is merged in pieces of rows."""
        return self.method.by_rows(self.roles[name], len(self.base.tensors[name].shape))

    def parts(self, name: str, device: str = "cpu") -> Iterator[Merged]:
        """Base, experts and merge of a tensor in float32, in consecutive pieces of rows. NumericsError names it."""
        pieces = self._pieces(name, device)
        try:
            for base, experts, merged in self._merge(name, pieces):
                if self.base.finite and not finite(merged):
                    raise NumericsError("the merge has NaN or Inf values; check the method's parameters")
                yield base, experts, merged
        except NumericsError as error:
            for model in (self.base, *self.experts.values()):
                model.read(name)  # names the file if its values are to blame
            raise NumericsError(f"merge={self.method.name}: tensor '{name}': {error}") from error

    def merged(self, name: str, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """The merge of whole tensors that were read already."""
        return next(self._merge(name, [(base, experts)]))[2]

    def _merge(self, name: str, pieces: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> Iterator[Merged]:
        role, dims = self.roles[name], len(self.base.tensors[name].shape)
        if self._under is not None and not self.method.acts_on(role, dims):
            return self._under._merge(name, pieces)
        base, experts = pieces[0]
        return self.method.merge(
            name,
            role,
            pieces,
            depth=None if role.layer is None else role.layer / max(1, self._last_layer),
            rotation=self.rotations.get(name) if self.rotations else None,
            rotations=[self.given[expert].rotation(name) for expert in self.experts] if self.given else None,
            source=self._source(name, base, experts) if self._source else None,
            merged=self._under.merged(name, base, experts) if self._under else None,
            statistics=self.statistics,
            grams=self._grams_of(name, base.device),
        )

    def _pieces(self, name: str, device: str = "cpu") -> Chunks:
        base, experts = self.base.view(name), [expert.view(name) for expert in self.experts.values()]
        return Chunks(base, experts, whole=not self.by_rows(name), checked=self.base.finite, device=device)

    @cached_property
    def statistics(self) -> Statistics | None:
        """The first pass over all tensors that the method merges, made when the first merge is asked for."""
        statistics = self.method.statistics()
        if statistics is not None:
            for name in self.acted:
                statistics.add(self._pieces(name))
        return statistics

    def _open_grams(self, folders: Mapping[str, Path] | None) -> dict[str, Grams]:
        """The Gram matrices of each expert, after a check that they are of these weights and of their shapes."""
        if folders is None:
            raise ConfigError(
                f"merge={self.method.name} needs Gram matrices of each expert's samples, which only a run's own merges "
                "have (no align.start); choose another merge there"
            )
        grams, problems = {name: open_grams(folders[name]) for name in self.experts}, []
        for name, found in grams.items():
            if found.weights != self.experts[name].sha256:
                problems.append(f"{found.files.path} was gathered from other weights than those of expert '{name}'")
            for tensor, entry in found.entries.items():
                info, shape = self.base.tensors.get(tensor), found.files.tensors[entry].shape
                if info is None or shape != (info.shape[-1],) * 2:
                    problems.append(f"{found.files.path}: '{entry}' of shape {list(shape)} is not of '{tensor}'")
        if problems:
            raise CheckpointError(f"{'; '.join(problems)}; delete the folder, and the run gathers them again")
        return grams

    def _grams_of(self, name: str, device: torch.device) -> list[Tensor] | None:
        found = [gram.to(device) for grams in self.grams.values() if (gram := grams.get(name)) is not None]
        return found if found and len(found) == len(self.experts) else None

    @property
    def notes(self) -> list[str]:
        """What is no fault and may surprise: matrices that no Gram matrix was gathered for."""
        without = [name for name in self.acted if any(name not in grams.entries for grams in self.grams.values())]
        told = f"{len(without)} tensors have no Gram matrix and are averaged, first '{without[0]}'" if without else ""
        return [told] if told else []

    def _source_of(self, rotations: RotationsFile) -> Source:
        source, experts = rotations.source, list(self.experts)
        if source == {"model": "base"}:
            return lambda name, base, weights: base
        if source.get("expert") in experts:
            position = experts.index(source["expert"])
            return lambda name, base, weights: weights[position]
        if "merge" in source:
            start = bind(source["merge"], experts)
            if not start.needs_rotations:
                return Merger(self.base, self.experts, start).merged
        raise CheckpointError(
            f"{rotations.path}: its source {json.dumps(source)} is neither the base, nor one of the experts "
            f"{', '.join(experts)}, nor a merge without rotations; run the alignment again"
        )
