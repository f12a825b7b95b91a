"""`doctor=true`: what this machine can do, tried for real."""

import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rotrl.app import provenance


def doctor(cfg: dict[str, Any]) -> None:
    """Prints versions, devices, the sandbox level found by canary attacks, disk and W&B mode."""
    from rotrl.evaluate.sandbox import ladder

    device = provenance.device()
    table = Table("what", "found", title="doctor", title_justify="left")
    table.add_row("python, packages", ", ".join(f"{k} {v}" for k, v in provenance.versions().items()))
    table.add_row("device", f"{device['cores']} cores, {', '.join(device['gpus']) or 'no GPU'}")
    table.add_row("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    table.add_row("disk", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free here")
    for level, lacking in ladder().items():
        table.add_row(f"sandbox {level}", lacking or "holds against the canary attacks")
    table.add_row("logger", str((cfg["logger"] or {"mode": "none"}).get("mode", "offline")))
    Console().print(table)
