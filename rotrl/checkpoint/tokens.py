"""Which id a tokenizer gives to which token: the meaning of the rows of embedding and head."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from rotrl.checkpoint.header import read_json
from rotrl.errors import CheckpointError

SHOWN = 3


def token_map(folder: Path) -> dict[str, int]:
    """The token -> id map of tokenizer.json, or of vocab.json and added_tokens.json; empty where there is none."""
    file = folder / "tokenizer.json"
    try:
        if file.exists():
            content = read_json(file)
            vocabulary = content.get("model", {}).get("vocab", {})
            if isinstance(vocabulary, list):  # unigram models list [token, score] pairs by id
                vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
            return vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        file = folder / "vocab.json"
        if not file.exists():
            return {}
        added = folder / "added_tokens.json"
        return read_json(file) | (read_json(added) if added.exists() else {})
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file}: holds no token -> id map ({error!r}); download it again") from error


def map_digest(tokens: Mapping[str, int]) -> str:
    """SHA-256 of a token -> id map, whatever its order."""
    return hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()


def token_faults(base: Path, expert: Path, *, chosen: bool) -> list[str]:
    """How the maps of two folders differ. Where a tokenizer was `chosen`, only tokens that moved are a fault."""
    if base == expert:
        return []
    ours, theirs = token_map(base), token_map(expert)
    if not ours and not theirs:
        return _model_faults(base, expert)
    if not ours or not theirs or map_digest(ours) == map_digest(theirs):
        return []
    moved = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    faults = []
    if moved:
        told = ", ".join(f"{token!r} {theirs[token]} (base {ours[token]})" for token in moved[:SHOWN])
        faults.append(
            f"tokenizer.json gives another id to {len(moved)} tokens, first {told}: rows of the embedding stand for "
            "other words; re-order the expert's rows to the base's ids"
        )
    if (alone := sorted(ours.keys() ^ theirs.keys(), key=repr)) and not chosen:
        told = ", ".join(f"{token!r} ({'base' if token in ours else 'expert'} only)" for token in alone[:SHOWN])
        faults.append(f"tokenizer.json differs in {len(alone)} tokens, first {told}; choose by tokenizer_from")
    return faults


def _model_faults(base: Path, expert: Path) -> list[str]:
    """SentencePiece files without a JSON beside them are compared by their bytes."""
    files = [folder / "tokenizer.model" for folder in (base, expert)]
    if all(file.exists() for file in files) and files[0].read_bytes() != files[1].read_bytes():
        return ["tokenizer.model has other bytes than the base's; save both tokenizers as tokenizer.json"]
    return []
