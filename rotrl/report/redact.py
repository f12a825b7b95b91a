"""Keeps secrets out of what is saved, shown or uploaded.

A value is hidden when its key names a secret (`api_key`, `hf_token`, `password`), when it looks like one (a hub or
cloud token, a URL with credentials), or when it is the value of a secret environment variable.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_KEY = re.compile(
    r"(?:^|[_.-])(?:(?:api|access|private|secret|ssh|license)[_-]?key|secret|password|passwd|passphrase|credentials?"
    r"|authorization|cookie|token)$",
    re.IGNORECASE,
)
# Tokens of a tokenizer are vocabulary.
_VOCABULARY = re.compile(r"(?:^|[_.-])(?:pad|eos|bos|unk|mask|sep|cls|stop|end|start|next|image)[_-]token$", re.I)
_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|wandb_v1_\w{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
    r"|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)|(?<=Bearer )\S+"
)
_ASSIGNMENT = re.compile(r"(?<![\w.-])([\w.-]++)(=|\s*:\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&{}\[\]()'\"]+)")


def is_secret(key: str) -> bool:
    """Whether a key names a secret: `api_key`, `apiKey`, `WANDB_API_KEY`, `token`; not `max_tokens` or `eos_token`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)
    return bool(_KEY.search(words)) and not _VOCABULARY.search(words)


def redact(value: Any) -> Any:
    """A copy of `value` that JSON can hold and anybody may read: secrets hidden, NaN and infinities as null."""
    return _redact(value, [v for k, v in os.environ.items() if is_secret(k) and len(v) >= 8])


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(k): HIDDEN if is_secret(str(k)) and _filled(v) else _redact(v, known) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact(item, known) for item in (value if isinstance(value, list | tuple) else sorted(value, key=str))]
    if isinstance(value, str):
        return _redact_text(value, known)
    if value is None or isinstance(value, bool | int):
        return value
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # a numpy scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int) else _redact_text(str(value), known)


def _filled(value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and value != ""


def _redact_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, HIDDEN)
    text = _VALUE.sub(HIDDEN, text)
    return _ASSIGNMENT.sub(_redact_assignment, text)


def _redact_assignment(match: re.Match[str]) -> str:
    key, sign, _ = match.groups()
    # "token: x" is prose; "token=x" and "{api_key: x}" are configuration.
    prose = sign != "=" and key.lower() in ("token", "secret", "cookie")
    return f"{key}{sign}{HIDDEN}" if is_secret(key) and not prose else match[0]
