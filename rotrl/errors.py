"""What the user can mend: each error is one line that names what was found, where, and what to do.

`app` prints `error: <message>` and exits with 2; any other exception is a bug and exits with 1.
"""


class RotrlError(Exception):
    """The input is at fault. The message names the file, tensor or key, what was found and the remedy."""


class ConfigError(RotrlError):
    """A key, a value or a combination of the configuration is wrong."""


class CheckpointError(RotrlError):
    """A checkpoint is absent, broken, or does not fit the others."""


class Absent(RotrlError):
    """What is on the hub is neither in its cache nor reachable; nothing that was asked is wrong."""


class NumericsError(RotrlError):
    """A computation has no valid result on this input (det -1, NaN, lost orthogonality)."""


class EvaluationError(RotrlError):
    """An evaluation can't give an honest score (sandbox too weak, prompt too long, engine dead)."""


class NoData(EvaluationError, Absent):
    """Problems of a data set of the hub."""


class NoModel(CheckpointError, Absent):
    """A model of the hub."""
