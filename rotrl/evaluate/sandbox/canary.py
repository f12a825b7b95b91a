"""Attacks that a level must stop on this machine before it may be used: the proof, not the promise."""

import os
import socket
import tempfile
from pathlib import Path

from rotrl.evaluate.sandbox.pool import Limits, Sandbox
from rotrl.evaluate.task import Test

# returns the names of the attacks that went through
_ATTACK = """
import os, socket

def attack(folder, port, pid):
    def fork():
        os.fork() or os._exit(0)

    def environment():
        if not os.environ:
            raise KeyError

    def execute():
        try:
            os.execv(folder + "/absent", ["absent"])
        except FileNotFoundError:  # the kernel went as far as to look for it
            return

    attacks = {
        "read a file": lambda: open(folder + "/secret").read(),
        "write a file": lambda: open(folder + "/written", "w"),
        "change a file": lambda: os.chmod(folder + "/secret", 0),
        "connect to the network": lambda: socket.create_connection(("127.0.0.1", port), 1),
        "signal a process": lambda: os.kill(pid, 0),
        "read another environment": lambda: open(f"/proc/{pid}/environ", "rb").read(),
        "see the environment": environment,
        "start a process": fork,
        "execute a file": execute,
    }
    through = []
    for name, action in attacks.items():
        try:
            action()
        except (OSError, KeyError):
            continue
        through.append(name)
    return through
"""


def breaches(sandbox: Sandbox) -> str:
    """Run the attacks; "" when every one was stopped, else a line that names those that went through."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        os.chmod(folder, 0o777)
        secret = Path(folder, "secret")
        secret.write_text("canary")
        secret.chmod(0o666)
        test = Test([folder, listener.getsockname()[1], os.getpid()], None)
        [outcome] = sandbox.run(_ATTACK, [test], "attack", Limits(cpu_seconds=5, wall_seconds=20))
        if outcome.status != "ok":
            return f"the canary did not run: {outcome.status}, {outcome.detail}"
        through = list(outcome.value)
        if Path(folder, "written").exists() and "write a file" not in through:
            through.append("write a file")
    return f"a canary program could {', '.join(through)}" if through else ""
