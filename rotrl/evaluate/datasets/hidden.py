"""LiveCodeBench's hidden tests: base64 of zlib of a PICKLED JSON text, read without unpickling anything."""

import base64
import binascii
import json
import pickletools
import zlib
from itertools import islice
from typing import Any

from rotrl.errors import EvaluationError

LIMIT = 2**30  # bytes of one problem's tests once decompressed

# All that a pickled `str` is made of. No opcode that imports, calls, builds or looks anything up is among them.
TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
FRAME = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def hidden_tests(text: str, place: str, limit: int = LIMIT) -> list[Any]:
    """The list of {input, output, testtype} in the field `private_test_cases`, plain JSON or packed.

    Raises EvaluationError naming `place` for anything else: a pickle of another thing than one text, more than `limit`
    bytes, a broken stream.
    """
    try:
        found = json.loads(text)
    except ValueError:
        try:
            packed = base64.b64decode(text, validate=True)
            found = json.loads(pickled_text(inflate(packed, limit)))
        except (binascii.Error, zlib.error, ValueError) as error:
            raise EvaluationError(f"{place}, field private_test_cases: {error}") from None
    if not isinstance(found, list):
        raise EvaluationError(f"{place}, field private_test_cases: found a {type(found).__name__}, expected a list")
    return found


def inflate(packed: bytes, limit: int) -> bytes:
    """zlib's inverse that stops at `limit` bytes. Raises ValueError for more, and for a stream that isn't whole."""
    stream = zlib.decompressobj()
    data = stream.decompress(packed, limit)
    if not stream.eof:
        more = bool(stream.unconsumed_tail) or bool(stream.decompress(b"", 1))
        raise ValueError(f"more than {limit} bytes when decompressed" if more else "the compressed stream is cut")
    return data


def pickled_text(data: bytes) -> str:
    """The text of `pickle.dumps(text)`, read off the opcodes: no unpickler runs, so nothing can be executed.

    Stricter than an Unpickler whose `find_class` raises, which can still be made to allocate by the memo.
    Raises ValueError for a pickle of anything but one `str`.
    """
    opcodes = list(islice(pickletools.genops(data), 16))  # a text takes six at most
    for opcode, _, _ in opcodes:
        if opcode.name not in TEXT | FRAME:
            raise ValueError(f"a pickle with the opcode {opcode.name}, expected one text; it was not loaded")
    texts = [str(argument) for opcode, argument, _ in opcodes if opcode.name in TEXT]
    if len(texts) != 1 or opcodes[-1][2] != len(data) - 1:
        raise ValueError(f"a pickle of {len(texts)} texts in {len(data)} bytes, expected one text and nothing after it")
    return texts[0]
