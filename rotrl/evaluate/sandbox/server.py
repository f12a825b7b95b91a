"""This side of one fork server: starts it at a level, hands it jobs, kills it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rotrl.values import Count, Positive

INSIDE = Path(__file__).parent / "inside"
LEVELS = ("none", "landlock", "bubblewrap")  # weakest first
# what each level asks of Landlock and seccomp inside
_INSIDE_ARGUMENTS = {"none": ("no", "no"), "landlock": ("required", "yes"), "bubblewrap": ("wanted", "yes")}
_START_SECONDS = 30.0


class SandboxFault(Exception):
    """The sandbox failed, not the program in it."""


@dataclass(frozen=True)
class Limits:
    """CPU seconds of a test decide; wall seconds only end what sleeps. Memory is address space; output per stream."""

    cpu_seconds: Positive = 6.0
    wall_seconds: Positive = 30.0
    memory_mb: Count = 1024
    output_mb: Count = 16


@dataclass(frozen=True)
class Ending:
    """How the child ended. `late` is "cpu" or "wall" where it was killed by that clock, else empty."""

    late: str
    exit: int | None
    signal: int | None
    cpu_seconds: float


class Server:
    """One fork server process. Not thread-safe: whoever holds it runs one job at a time."""

    def __init__(self, level: str) -> None:
        self.level = level
        self._closed = False
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        library = os.open(sys.base_prefix, os.O_PATH)
        environment = _environment(level, library)
        try:
            self._process = subprocess.Popen(
                _command(level),
                stdin=other.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd="/",
                pass_fds=(library,) if str(library) in environment.get("PYTHONHOME", "") else (),
                start_new_session=True,
            )
        except OSError as error:
            self._control.close()
            raise SandboxFault(f"the sandbox server can't be started ({error})") from None
        finally:
            other.close()
            os.close(library)

    def handshake(self) -> None:
        """Wait until the server is up; raises SandboxFault with the reason when it can't work at this level."""
        answer = self._receive(_START_SECONDS)
        if answer.get("error") is not None:
            raise SandboxFault(answer["error"])

    def run(self, files: tuple[int, int, int, int], limits: Limits) -> Ending:
        """Run one job; `files` are the descriptors of request, report, standard input and output."""
        message = {
            "cpu_seconds": limits.cpu_seconds,
            "wall_seconds": limits.wall_seconds,
            "memory": limits.memory_mb << 20,
            "output": limits.output_mb << 20,
        }
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], list(files))
        except OSError as error:
            raise SandboxFault(f"the sandbox server is gone ({error})") from None
        answer = self._receive(limits.wall_seconds + _START_SECONDS)
        if not answer["ready"]:
            raise SandboxFault(f"the child could not lock itself down ({answer['said'] or 'it died'})")
        return Ending(answer["late"], answer["exit"], answer["signal"], answer["cpu_seconds"])

    def kill(self) -> None:
        """End the server and the program it runs. Callable from any thread, more than once."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in `run`
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _receive(self, seconds: float) -> dict:
        self._control.settimeout(seconds)
        try:
            message = self._control.recv(4096)
        except TimeoutError:
            raise SandboxFault(f"the sandbox server gave no answer in {seconds:.0f} s") from None
        except OSError as error:
            raise SandboxFault(f"the sandbox server is gone ({error})") from None
        if not message:
            raise SandboxFault("the sandbox server ended" + _exit_words(self._process))
        return json.loads(message)


def _exit_words(process: subprocess.Popen) -> str:
    try:
        return f" with exit code {process.wait(timeout=1)}"
    except subprocess.TimeoutExpired:
        return ""


def _environment(level: str, library: int) -> dict[str, str]:
    """Empty but for what the interpreter itself needs; no key of the caller's passes."""
    # sets iterate in the same order in every server, so a program's output can be had again
    environment = {"PYTHONHASHSEED": "0"}
    if "LD_LIBRARY_PATH" in os.environ:  # where a cluster's module system keeps libpython
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    # children of root become nobody, who may have no way to the library (/root is closed)
    if level == "bubblewrap":
        environment["PYTHONHOME"] = "/python"
    elif os.geteuid() == 0:  # an open folder is a way; Landlock sees where it really leads
        environment["PYTHONHOME"] = f"/proc/self/fd/{library}"
    return environment


def _command(level: str) -> list[str]:
    python = [os.path.realpath(sys.executable), "-s", "-S", "-P", "-B"]
    inside = str(INSIDE) if level != "bubblewrap" else "/inside"
    command = [*python, inside, *_INSIDE_ARGUMENTS[level]]
    return command if level != "bubblewrap" else [*_bubblewrap(), *command]


def _bubblewrap() -> list[str]:
    """A root of libraries only, no network, its own processes. Root needs no user namespace, others do."""
    command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:  # to become nobody and to end what is nobody's
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    else:
        command += ["--unshare-user"]
    command += ["--ro-bind", sys.base_prefix, "/python", "--ro-bind", str(INSIDE), "/inside"]
    executable = os.path.dirname(os.path.realpath(sys.executable))
    libraries = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
    for path in (sys.base_prefix, executable, *libraries):
        command += ["--ro-bind-try", path, path]
    return [
        *command,
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--remount-ro",
        "/dev",
        "--remount-ro",
        "/",
        "--chdir",
        "/",
        "--",
    ]
