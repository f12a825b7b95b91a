"""A base and what was trained from it: opened together, every fault of every model told at once, made alike on request.

A choice never changes a file: it changes how the stored tensors are read.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rotrl.checkpoint.adapter import is_adapter, names_its_base, open_adapter
from rotrl.checkpoint.header import TensorInfo, word_of
from rotrl.checkpoint.layout import by_structure, role_of
from rotrl.checkpoint.model_config import with_text
from rotrl.checkpoint.reader import Checkpoint, check_family, named, open_checkpoint
from rotrl.checkpoint.tokens import token_faults, token_map
from rotrl.errors import CheckpointError, ConfigError
from rotrl.values import LmHead, Nonfinite, Vocab, value_faults

CHOICES = {"vocab": Vocab, "lm_head": LmHead, "nonfinite": Nonfinite}


def open_family(
    base: Path,
    tuned: Mapping[str, Path],
    *,
    tokenizer_from: str | None = None,
    vocab: str = "error",
    lm_head: str = "error",
    nonfinite: str = "error",
) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    """The base and the models tuned from it (checkpoints or PEFT adapters), checked against each other.

    `vocab` pad copies rows that a model lacks from the one with most rows, so that they don't count as its update;
    truncate cuts to the fewest rows, if no token uses the rest. `lm_head` untie gives tied models a head of their own,
    tie drops heads that equal the embedding. `tokenizer_from` names the model whose tokenizer counts where some have
    more tokens than others; a token that has another id is always an error. CheckpointError lists all faults.
    """
    given = {"vocab": vocab, "lm_head": lm_head, "nonfinite": nonfinite}
    if faults := [fault for key, value in given.items() for fault in value_faults(key, value, CHOICES[key])]:
        raise ConfigError("; ".join(faults))
    if tokenizer_from not in (None, "base", *tuned):
        raise ConfigError(f"tokenizer_from is {tokenizer_from!r}, one of base, {', '.join(tuned)} is expected")
    models = _open_all({"base": base, **tuned})
    # Heads first: an added head needs the embedding's padding as well.
    models = _alike(models, (_heads, lm_head), (_rows, vocab), (_tokenizer, tokenizer_from))
    if nonfinite == "allow":
        models = {name: replace(model, finite=False) for name, model in models.items()}
    root = models.pop("base")
    check_family(root, models)
    return root, models


def notes(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> list[str]:
    """What headers show that is no fault and may surprise: mixed dtypes, roles found by structure, unknown roles."""
    told = []
    guessed = [name for name, info in base.tensors.items() if by_structure(name, info.shape)]
    if guessed:
        told.append(f"{len(guessed)} tensors have roles by structure, not by a known name, first '{guessed[0]}'")
    if unknown := [name for name, info in base.tensors.items() if role_of(name, info.shape).module == "other"]:
        told.append(f"{len(unknown)} tensors have no known role, first '{unknown[0]}'")
    told += [
        f"{name} is an adapter that names no base: that it is {base.path.name} shows only in names and shapes"
        for name, model in experts.items()
        if is_adapter(model.path) and not names_its_base(model.path)
    ]
    kinds = {name: Counter(info.dtype for info in model.tensors.values()) for name, model in experts.items()}
    for name, count in {"base": Counter(info.dtype for info in base.tensors.values()), **kinds}.items():
        if len(count) > 1:
            mixture = ", ".join(f"{number} in {word_of(dtype)}" for dtype, number in count.most_common())
            told.append(f"{name} mixes dtypes: {mixture}")
    return told


def _open_all(folders: Mapping[str, Path]) -> dict[str, Checkpoint]:
    models, faults = {}, []

    def attempt(name: str, opened: Callable[[], Checkpoint]) -> None:
        try:
            models[name] = opened()
        except CheckpointError as error:
            faults.append(f"{name}: {error}")

    for name, path in folders.items():
        if not is_adapter(path):
            attempt(name, lambda path=path: open_checkpoint(path))
        elif name == "base":
            faults.append(f"base: {path}: is a PEFT adapter; give the model that it was trained on")
        elif "base" in models:
            attempt(name, lambda path=path: open_adapter(path, models["base"]))
    if faults:
        raise CheckpointError("; ".join(faults))
    return models


Step = tuple[Callable[[dict[str, Checkpoint], str], dict[str, Checkpoint]], str | None]


def _alike(models: dict[str, Checkpoint], *steps: Step) -> dict[str, Checkpoint]:
    for step, choice in steps:
        if choice not in (None, "error"):
            models = step(models, choice)
    return models


def _heads(models: dict[str, Checkpoint], choice: str) -> dict[str, Checkpoint]:
    name = next((head for model in models.values() if (head := named(model, "head"))), None)
    if name is None or all(named(model, "head") for model in models.values()):
        return models
    change = _untied if choice == "untie" else _tied
    return _each(models, lambda model: change(model, name))


def _untied(model: Checkpoint, head: str) -> Checkpoint:
    embedding = named(model, "embedding")
    if head in model.tensors or embedding is None:
        return model
    info = model.tensors[embedding]
    copy = TensorInfo(info.shape, info.dtype, info.file, info.stored or embedding)
    derived = {head: model.derived[embedding]} if embedding in model.derived else {}
    return replace(
        model,
        config=_with_tie(model, False),
        tensors=dict(sorted({**model.tensors, head: copy}.items())),
        derived={**model.derived, **derived},
    )


def _tied(model: Checkpoint, head: str) -> Checkpoint:
    embedding = named(model, "embedding")
    if head in model.tensors and embedding and not torch.equal(model.view(head), model.view(embedding)):
        raise CheckpointError(
            f"{model.tensors[head].file}: tensor '{head}' differs from '{embedding}', tying would lose it; "
            "use lm_head=untie"
        )
    kept = {name: info for name, info in model.tensors.items() if name != head}
    return replace(model, config=_with_tie(model, True), tensors=kept)


def _with_tie(model: Checkpoint, tied: bool) -> dict:
    """Of nested configurations transformers 4 reads the inner value, 5 the outer."""
    return with_text({**model.config, "tie_word_embeddings": tied}, "tie_word_embeddings", tied)


def _rows(models: dict[str, Checkpoint], choice: str) -> dict[str, Checkpoint]:
    rows = {name: model.tensors[key].shape[0] for name, model in models.items() if (key := named(model, "embedding"))}
    if len(set(rows.values())) < 2:
        return models
    if choice == "truncate":
        fewest = min(rows.values())
        return _each(models, lambda model: _cut(model, fewest))
    donor = models[max(rows, key=lambda name: rows[name])]
    return _each(models, lambda model: _padded(model, donor))


def _cut(model: Checkpoint, rows: int) -> Checkpoint:
    tokens, embedding = token_map(model.tokenizer_folder), named(model, "embedding")
    if not tokens and embedding and model.tensors[embedding].shape[0] > rows:
        raise CheckpointError(
            f"{model.tokenizer_folder}: vocab=truncate keeps {rows} rows and no tokenizer.json or vocab.json says "
            "which of the rest tokens use; save the tokenizer as tokenizer.json, or use vocab=pad"
        )
    if beyond := sorted(token for token, index in tokens.items() if index >= rows):
        raise CheckpointError(
            f"{model.tokenizer_folder}: vocab=truncate keeps {rows} rows and {len(beyond)} tokens have ids beyond, "
            f"first {beyond[0]!r}; use vocab=pad"
        )
    return _resized(model, rows, lambda name: lambda tensor: tensor[:rows])


def _padded(model: Checkpoint, donor: Checkpoint) -> Checkpoint:
    embedding = named(donor, "embedding")
    assert embedding is not None
    rows = donor.tensors[embedding].shape[0]

    def more(name: str) -> Callable[[Tensor], Tensor]:
        lender = name if name in donor.tensors else embedding
        return lambda tensor: torch.cat([tensor, donor.view(lender)[len(tensor) :].to(tensor)])

    return _resized(model, rows, more)


def _resized(model: Checkpoint, rows: int, change_of: Callable[[str], Callable[[Tensor], Tensor]]) -> Checkpoint:
    tensors, derived = dict(model.tensors), dict(model.derived)
    for name, info in model.tensors.items():
        if role_of(name, info.shape).module not in ("embedding", "head") or info.shape[0] == rows:
            continue
        before, change = model.derived.get(name), change_of(name)
        derived[name] = change if before is None else lambda stored, b=before, c=change: c(b(stored))
        tensors[name] = replace(info, shape=(rows, *info.shape[1:]))
    return replace(model, config=with_text(model.config, "vocab_size", rows), tensors=tensors, derived=derived)


def _tokenizer(models: dict[str, Checkpoint], choice: str) -> dict[str, Checkpoint]:
    base, chosen = models["base"].tokenizer_folder, models[choice].tokenizer_folder
    faults = [
        f"{name} ({model.path}): {fault}"
        for name, model in models.items()
        for fault in token_faults(base, model.tokenizer_folder, chosen=True)
    ]
    if faults:
        raise CheckpointError("; ".join(faults))
    return _each(models, lambda model: replace(model, tokenizer=chosen))


def _each(models: Mapping[str, Checkpoint], change: Callable[[Checkpoint], Checkpoint]) -> dict[str, Checkpoint]:
    """`change` of every model, with the faults of all of them in one error."""
    changed, faults = {}, []
    for name, model in models.items():
        try:
            changed[name] = change(model)
        except CheckpointError as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise CheckpointError("; ".join(faults))
    return changed
