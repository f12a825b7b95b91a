"""Runs model-written programs: `open_sandbox` for those who grade, `probe` and `ladder` for those who ask."""

from rotrl.evaluate.sandbox.inside.values import decode, encode
from rotrl.evaluate.sandbox.ladder import ladder, open_sandbox, probe
from rotrl.evaluate.sandbox.pool import Outcome, Sandbox
from rotrl.evaluate.sandbox.server import LEVELS, Limits

__all__ = ["LEVELS", "Limits", "Outcome", "Sandbox", "decode", "encode", "ladder", "open_sandbox", "probe"]
