"""The tensors of one merge, each made when asked for; streaming and in-memory merges are loops over it."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rotrl.checkpoint.grams import Grams, open_grams
from rotrl.checkpoint.layout import role_of
from rotrl.checkpoint.reader import Checkpoint, check_family
from rotrl.checkpoint.rotations import RotationsFile
from rotrl.errors import CheckpointError, ConfigError, NumericsError
from rotrl.merge.bind import bind
from rotrl.merge.check import pattern_faults
from rotrl.merge.chunks import Chunks, finite
from rotrl.merge.given import open_fitting, open_given
from rotrl.merge.method import Method
from rotrl.merge.scale import GLOBAL, Merged, Sums
from rotrl.merge.statistics import Statistics

Source = Callable[[str, Chunks], Iterable[Tensor]]


class Again:
    """Tensors of pieces, made anew whenever they are gone through."""

    def __init__(self, make: Callable[[], Iterable[Tensor]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.make())


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
        self._start: Merger | None = None
        self._device = "cpu"
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

    def rows(self, name: str) -> int | None:
        """How many rows of a tensor are merged at a time; None where it is merged whole."""
        if any(name in file.names for file in (self.rotations, *self.given.values()) if file):
            return None
        rows = self.method.rows(name, self.roles[name], self.base.tensors[name].shape)
        below = self._under or self._start
        return below.rows(name) if rows is not None and below else rows

    def in_span(self, name: str) -> bool:
        """Whether rows are merged that take as much work as whole matrices do."""
        acts = self.method.acts_on(self.roles[name], len(self.base.tensors[name].shape))
        return acts and self.method.kind == "equivariant" and self.rows(name) is not None

    def place(self, name: str, device: str) -> str:
        """Where a tensor is merged: vectors and rows not in a span take less time than their way to a GPU."""
        vector = len(self.base.tensors[name].shape) < 2
        return "cpu" if vector or (self.rows(name) is not None and not self.in_span(name)) else device

    def prepare(self, device: str = "cpu") -> None:
        """Makes the first passes that the method and those below it need, on this device."""
        self._device = device
        for below in (self._under, self._start):
            if below:
                below.prepare(device)
        _ = self.statistics, self.factor

    def parts(self, name: str, device: str = "cpu") -> Iterator[Merged]:
        """Base, experts and merge of a tensor as computed, in consecutive pieces of rows. NumericsError names it."""
        return self._parts(name, device, self.factor)

    def _parts(self, name: str, device: str, factor: float | None) -> Iterator[Merged]:
        try:
            for base, experts, merged in self._merge(name, self._pieces(name, device), factor):
                if self.base.finite and not finite(merged):
                    raise NumericsError("the merge has NaN or Inf values; check the method's parameters")
                yield base, experts, merged
        except (NumericsError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
            for model in (self.base, *self.experts.values()):
                model.read(name)  # names the file if its values are to blame
            raise NumericsError(f"merge={self.method.name}: tensor '{name}': {error}") from error

    def _merge(self, name: str, pieces: Chunks, factor: float | None) -> Iterator[Merged]:
        role, dims = self.roles[name], len(self.base.tensors[name].shape)
        under, source = self._under, self._source
        if under is not None and not self.method.acts_on(role, dims):
            return under._merge(name, pieces, under.factor)
        return self.method.merge(
            name,
            role,
            pieces,
            depth=None if role.layer is None else role.layer / max(1, self._last_layer),
            factor=factor,
            rotation=self.rotations.get(name) if self.rotations else None,
            rotations=[self.given[expert].rotation(name) for expert in self.experts] if self.given else None,
            source=Again(lambda: source(name, pieces)) if source else None,
            merged=Again(lambda: (part for _, _, part in under._merge(name, pieces, under.factor))) if under else None,
            statistics=self.statistics,
            grams=self._grams_of(name, pieces.device),
        )

    def _pieces(self, name: str, device: str = "cpu") -> Chunks:
        base, experts = self.base.view(name), [expert.view(name) for expert in self.experts.values()]
        dtype = self.method.precision
        return Chunks(base, experts, rows=self.rows(name), checked=self.base.finite, device=device, dtype=dtype)

    @cached_property
    def statistics(self) -> Statistics | None:
        """The first pass over all tensors that the method merges, made when the first merge is asked for."""
        statistics = self.method.statistics()
        if statistics is not None:
            for name in self.acted:
                statistics.add(self._pieces(name))
        return statistics

    @cached_property
    def factor(self) -> float | None:
        """The factor of a scale for the whole model, by a first merge of all tensors; None for any other scale."""
        rule = self.method.hyper.get("scale")
        if rule not in GLOBAL:
            return None
        sums = Sums(len(self.experts))
        for name in self.base.tensors:
            for part in self._parts(name, self.place(name, self._device), 1.0):
                sums.add(*part)
        return sums.factor(rule)

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

    def _grams_of(self, name: str, device: str) -> list[Tensor] | None:
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
            return lambda name, pieces: (base for base, _ in pieces)
        if source.get("expert") in experts:
            position = experts.index(source["expert"])
            return lambda name, pieces: (weights[position] for _, weights in pieces)
        if "merge" in source:
            start = bind(source["merge"], experts)
            if not start.needs_rotations:
                self._start = Merger(self.base, self.experts, start)
                return self._started
        raise CheckpointError(
            f"{rotations.path}: its source {json.dumps(source)} is neither the base, nor one of the experts "
            f"{', '.join(experts)}, nor a merge without rotations; run the alignment again"
        )

    def _started(self, name: str, pieces: Chunks) -> Iterable[Tensor]:
        """The start's merge, in its own pieces, by which random ones draw, or whole if they are."""
        assert self._start is not None
        parts = (part.to(pieces.dtype) for _, _, part in self._start.parts(name, pieces.device))
        return parts if len(pieces) > 1 or not pieces.models[0].ndim else [torch.cat(list(parts))]
