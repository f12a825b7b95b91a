"""A PEFT adapter on its base, read as a checkpoint: every tensor is the base's plus what peft itself would merge."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rotrl.checkpoint.header import TensorInfo, read_header, read_json
from rotrl.checkpoint.reader import Checkpoint, stamp
from rotrl.checkpoint.sidecar import model_name
from rotrl.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "OFT")
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
UNSUPPORTED = ("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
_COMMIT = re.compile(r"[0-9a-f]{40}$")
_PREFIX = "base_model.model."
_PART = re.compile(r"\.(?:lora|oft)_\w+(?:\.weight)?$")


def is_adapter(folder: Path) -> bool:
    return (Path(folder) / CONFIG).exists()


def names_its_base(folder: Path) -> bool:
    """Whether an adapter's configuration says what it was trained on."""
    return bool(read_json(Path(folder) / CONFIG).get("base_model_name_or_path"))


def open_adapter(folder: Path, base: Checkpoint) -> Checkpoint:
    """The fine-tuned model that a LoRA or OFT adapter makes of `base`: float32 where it differs, so that bf16 keeps
    the update. CheckpointError lists what does not fit: another base, absent or mis-shaped targets, foreign entries."""
    folder = Path(folder)
    settings = read_json(folder / CONFIG)
    faults = _config_faults(folder / CONFIG, settings, base)
    file = folder / WEIGHTS
    if not file.exists():
        raise CheckpointError("; ".join([*faults, f"{file}: does not exist; save the adapter with safetensors"]))
    entries, wrong = read_header(file)
    if faults + wrong:
        raise CheckpointError("; ".join(faults + wrong))
    tensors, derived = dict(base.tensors), dict(base.derived)
    modules: dict[str, dict[str, str]] = {}
    for entry, info in entries.items():
        name = entry.removeprefix(_PREFIX)
        if part := _PART.search(name):
            modules.setdefault(name[: part.start()], {})[name] = entry
        elif (name := name.replace(".base_layer", "")) in base.tensors and base.tensors[name].shape == info.shape:
            tensors[name] = replace(info, stored=entry)
            derived.pop(name, None)
        else:
            faults.append(f"{file}: tensor '{entry}' {_misfit(base, name, info.shape)}")
    for module, keys in modules.items():
        name = f"{module}.weight"
        if not (wrong := _part_faults(folder, module, keys, entries, base)):
            info = base.tensors[name]
            tensors[name] = replace(info, dtype=torch.float32, stored=info.stored or name)
            derived[name] = _Merged(folder, module, keys, base.derived.get(name))
        faults += wrong
    if faults:
        raise CheckpointError("; ".join(faults))
    own = folder / "tokenizer.json"
    return Checkpoint(
        folder,
        base.config,
        dict(sorted(tensors.items())),
        {**base.stamps, file: stamp(file)},
        derived,
        tokenizer=folder if own.exists() else base.tokenizer_folder,
    )


def _config_faults(file: Path, settings: dict, base: Checkpoint) -> list[str]:
    faults = []
    if (kind := settings.get("peft_type")) not in KINDS:
        faults.append(f"{file}: peft_type is {kind!r}, {' or '.join(KINDS)} can be merged; merge it by peft first")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_BASE):
        faults.append(f"{file}: init_lora_weights {start!r} changed the base's weights; save it as plain LoRA by peft")
    faults += [f"{file}: {key} is not supported; merge it by peft first" for key in UNSUPPORTED if settings.get(key)]
    commit = settings.get("revision")
    if base.path.parent.name == "snapshots" and _COMMIT.match(str(commit)) and commit != base.path.name:
        faults.append(
            f"{file}: the adapter was trained on revision {commit}, the base {base.path} is another; give that commit "
            "(ORG/NAME@COMMIT)"
        )
    trained_on = settings.get("base_model_name_or_path")
    if trained_on:
        last = model_name(Path(trained_on)).rsplit("/", 1)[-1]
        own = model_name(base.path).rsplit("/", 1)[-1]
        if last != own and Path(trained_on).resolve() != base.path.resolve():
            faults.append(
                f"{file}: the adapter was trained on {trained_on!r}, the base is {base.path}; give that base, or "
                "correct base_model_name_or_path if it is the same model"
            )
    return faults


def _misfit(base: Checkpoint, name: str, shape: tuple[int, ...]) -> str:
    if name in base.tensors:
        return f"has shape {list(shape)}, the base has {list(base.tensors[name].shape)}; give the adapter's base"
    return "has no place in the base; give the adapter's base"


def _part_faults(
    folder: Path, module: str, keys: Mapping[str, str], entries: Mapping[str, TensorInfo], base: Checkpoint
) -> list[str]:
    """Whether the parts of one module are those, in name and shape, that peft makes for the base's tensor."""
    from peft import get_peft_model_state_dict

    info, first = base.tensors.get(f"{module}.weight"), next(iter(keys.values()))
    if info is None or len(info.shape) != 2:
        return [f"{folder / WEIGHTS}: tensor '{first}' acts on '{module}.weight', no matrix of {base.path}"]
    try:
        root, _ = _wrapped(folder, module, torch.empty(info.shape, device="meta"), _kind(keys))
    except (ValueError, RuntimeError, AssertionError) as error:
        return [f"{folder / CONFIG}: does not fit '{module}.weight' of shape {list(info.shape)} ({error})"]
    expected = {
        name: tuple(part.shape) for name, part in get_peft_model_state_dict(root, save_embedding_layers=False).items()
    }
    found = {name: entries[entry].shape for name, entry in keys.items()}
    return [
        f"{folder / WEIGHTS}: tensor '{name}' has shape {found.get(name)}, {expected.get(name)} is expected for "
        f"'{module}.weight' of shape {list(info.shape)}; give the adapter's base"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


@dataclass(frozen=True)
class _Merged:
    """The stored weight of one module -> its weight with the adapter merged, by peft, in float32."""

    settings: Path
    module: str
    keys: Mapping[str, str]  # name within peft -> entry of the adapter's file
    before: Callable[[Tensor], Tensor] | None

    def __call__(self, stored: Tensor) -> Tensor:
        from peft import set_peft_model_state_dict

        weight = (self.before(stored) if self.before else stored).float()
        root, layer = _wrapped(self.settings, self.module, weight, _kind(self.keys))
        with safe_open(self.settings / WEIGHTS, framework="pt") as handle:
            state = {name: handle.get_tensor(entry) for name, entry in self.keys.items()}
        set_peft_model_state_dict(root, state)
        tuned: Any = root.get_submodule(self.module)
        tuned.merge()
        return layer.weight.detach()


def _kind(keys: Iterable[str]) -> type[nn.Module]:
    return nn.Embedding if any("lora_embedding" in key for key in keys) else nn.Linear


def _wrapped(folder: Path, module: str, weight: Tensor, kind: type[nn.Module]) -> tuple[nn.Module, Any]:
    """A model of one layer at its own path, so that peft's patterns hold, with the adapter in; and that layer."""
    from peft import PeftConfig, inject_adapter_in_model

    config: Any = PeftConfig.from_pretrained(str(folder))
    config.target_modules, config.modules_to_save, config.bias = [module], None, "none"
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    rows, columns = weight.shape
    with torch.device("meta"):
        layer: Any = kind(rows, columns) if kind is nn.Embedding else nn.Linear(columns, rows, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    root = parent = nn.Module()
    *path, leaf = module.split(".")
    for part in path:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(leaf, layer)
    return inject_adapter_in_model(config, root), layer
