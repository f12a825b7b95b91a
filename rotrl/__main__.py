"""python -m rotrl: compose the configuration, run it, and turn every outcome into one exit code.

0 done; 2 the input is at fault, or disk or memory is full (one line); 1 a bug (a traceback); 130 interrupted; 75
stopped by a scheduler (SIGTERM, SIGUSR1). After the last two the same command continues.
"""

import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

from rotrl import config
from rotrl.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


STOPPED: list[int] = []  # signals by which a scheduler took the machine back
FAILURE: list[Exception] = []  # of a single run; Hydra puts a line of its own before what it raises again


def task(cfg: "DictConfig") -> None:
    """One job. It raises and never exits, so that a failed job of a multirun leaves the others running."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from rotrl.app.main import main as run_job

    try:
        run_job(cfg)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        FAILURE.append(error)


def stop(number: int, _: Any) -> None:
    """A scheduler's stop is an interruption like Ctrl-C, with an exit code that asks to be queued again."""
    STOPPED.append(number)
    raise KeyboardInterrupt


def main() -> None:
    sys.exit(_main())


def _main() -> int:
    import hydra

    from rotrl.app import sweep

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and the mapping below is the only one
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    config.register()
    try:
        sys.argv[1:] = config.flags_first(sys.argv[1:])
    except ConfigError as error:
        return explain(error)
    run = hydra.main(version_base="1.3", config_path=config.config_dir(), config_name="config")(task)
    try:
        run()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues where it stopped", file=sys.stderr)
        exec("")  # else CPython ends by SIGINT, whatever the code, where the interruption fell into an exec of text
        return os.EX_TEMPFAIL if STOPPED else 130
    except Exception as error:
        sweep.show_table()
        return explain(error)
    sweep.show_table()
    return explain(FAILURE[0]) if FAILURE else 0


def explain(error: Exception) -> int:
    """Prints the one line of an error that the user can mend, the traceback of any other; gives the exit code."""
    known = config.user_error(error, sys.argv[1:])
    if known is None or "debug=true" in sys.argv:
        traceback.print_exception(error)
    if known is not None:
        print(f"error: {known}", file=sys.stderr)
    return 1 if known is None else 2


if __name__ == "__main__":
    main()
