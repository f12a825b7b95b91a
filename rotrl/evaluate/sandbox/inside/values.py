"""Python values as JSON, for the way into a sandbox and out of it. Exact types only: a subclass has its own equality.

None, truth values, numbers, texts and lists stand for themselves; the others are an object with one key:
{"tuple": [...]}, {"set": [...]}, {"frozenset": [...]}, {"dict": [[key, value], ...]}, {"int": "0x..."} beyond 64 bits,
{"complex": [real, imaginary]}, {"bytes": "hex"}, and {"object": "its type"} for whatever else there is.
"""

import collections
import json
from typing import Any

_AS_DICT = (dict, collections.Counter, collections.OrderedDict, collections.defaultdict)
HASHED = 10_000  # entries of sets and dicts that are read: keys can be made to collide, which costs the square


class Opaque:
    """A value of another type: it is something, and equal to nothing."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def encode(value):
    """The JSON for a value. A Counter, OrderedDict or defaultdict counts as the dict that it equals."""
    kind = type(value)
    if kind is int and value.bit_length() > 64:
        return {"int": hex(value)}
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [encode(item) for item in value]
    if kind is tuple:
        return {"tuple": [encode(item) for item in value]}
    if kind in (set, frozenset):
        return {kind.__name__: sorted((encode(item) for item in value), key=json.dumps)}
    if kind in _AS_DICT:
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind in (bytes, bytearray):
        return {"bytes": bytes(value).hex()}
    return {"object": f"{kind.__module__}.{kind.__name__}"}


def decode(found: Any) -> Any:
    """The value of its JSON. Raises ValueError for JSON that `encode` does not make, and for more than HASHED keys."""
    try:
        return _decode(found, [HASHED])
    except (TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"no value: {type(error).__name__}") from None


def _decode(found: Any, left: list[int]) -> Any:
    if isinstance(found, list):
        return [_decode(item, left) for item in found]
    if not isinstance(found, dict):
        return found
    [(kind, content)] = found.items()
    if kind in ("set", "frozenset", "dict"):
        left[0] -= len(content)
        if left[0] < 0:
            raise ValueError(f"more than {HASHED} keys")
    if kind == "tuple":
        return tuple(_decode(item, left) for item in content)
    if kind == "set":
        return {_decode(item, left) for item in content}
    if kind == "frozenset":
        return frozenset(_decode(item, left) for item in content)
    if kind == "dict":
        return {_decode(key, left): _decode(item, left) for key, item in content}
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    return Opaque(str(content))
