"""What stands beside the weights: config, tokenizer, chat template, generation config, model card, merge config."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from rotrl.checkpoint.files import file_sha256, whole_file
from rotrl.checkpoint.header import word_of
from rotrl.checkpoint.reader import Checkpoint
from rotrl.checkpoint.writer import write_json

GENERATION = "generation_config.json"
COPIED = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
CONFIG = "rotrl_config.yaml"
CARD = "README.md"
_SNAPSHOT = re.compile(r"/models--([^/]+)(?:/snapshots/([^/]+))?")

_CARD = """---
{{ card_data }}
---

# {{ title }}

A merge of {{ experts }} over {{ base }} by `{{ method }}`, made with rotrl.

```yaml
{{ configuration }}```
{% if facts %}
| | |
|---|---|
{% for name, value in facts %}| {{ name }} | {{ value }} |
{% endfor %}{% endif %}{% if warnings %}
{% for warning in warnings %}- {{ warning }}
{% endfor %}{% endif %}"""


def copy_sidecars(source: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    """config.json with the new dtype, and tokenizer, chat template and generation config as they are."""
    key = "torch_dtype" if "torch_dtype" in source.config else "dtype"
    write_json(folder / "config.json", {**source.config, key: word_of(dtype)})
    for name, file in _sidecars(source).items():
        with whole_file(folder / name) as temporary:
            shutil.copyfile(file, temporary)


def _sidecars(source: Checkpoint) -> dict[str, Path]:
    """The files to copy: the tokenizer from one folder, the generation config from the model's or its weights'."""
    weights = sorted({info.file.parent for info in source.tensors.values()})
    generation = next((folder for folder in (source.path, *weights) if (folder / GENERATION).is_file()), source.path)
    folders = {name: generation if name == GENERATION else source.tokenizer_folder for name in COPIED}
    return {name: folder / name for name, folder in folders.items() if (folder / name).is_file()}


def sidecar_digest(source: Checkpoint) -> str:
    """One sha256 over config.json and all that copy_sidecars takes along."""
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for name, file in _sidecars(source).items():
        digest.update(f"{name} {file_sha256(file)}".encode())
    return digest.hexdigest()


def write_config(folder: Path, content: Mapping[str, Any]) -> str:
    """rotrl_config.yaml, from which the merge can be made again; gives its text."""
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    with whole_file(folder / CONFIG) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def write_card(
    folder: Path,
    *,
    title: str,
    method: str,
    models: Sequence[Checkpoint],
    configuration: str,
    facts: Mapping[str, str],
    warnings: Sequence[str] = (),
) -> None:
    """README.md as the hub reads it: base_model, relation merge, library and tags. `models` begin with the base."""
    from huggingface_hub import ModelCard, ModelCardData

    names = [model_name(model.given) for model in models]
    data = ModelCardData(
        base_model=list(dict.fromkeys(names)),
        base_model_relation="merge",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "rotrl", method],
    )
    card = ModelCard.from_template(
        data,
        template_str=_CARD,
        title=title,
        method=method,
        base=names[0],
        experts=", ".join(names[1:]),
        configuration=configuration,
        facts=list(facts.items()),
        warnings=list(warnings),
    )
    with whole_file(folder / CARD) as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def model_name(path: Path, *, commit: bool = False) -> str:
    """`owner/name`, or `owner/name@COMMIT`, for a snapshot in the hub's cache, else the folder's name: no path of this
    machine is published."""
    found = _SNAPSHOT.search(path.absolute().as_posix())
    if found is None:
        return path.absolute().name
    name = found[1].replace("--", "/", 1)
    return f"{name}@{found[2]}" if commit and found[2] else name
