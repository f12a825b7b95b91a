"""What a child gives up before it runs a program: files, network, other processes, privileges, resources.

Landlock needs Linux 5.13, seccomp is in every kernel of the last ten years; neither needs root or a namespace.
https://docs.kernel.org/userspace-api/landlock.html
"""

import contextlib
import ctypes
import errno
import math
import os
import platform
import resource
import signal
import struct
import sys

import syscalls

NOBODY = 65534
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
# file rights (13 bits at first), network rights and scopes that a Landlock ABI knows
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_TCP_BIND_AND_CONNECT, _ABSTRACT_SOCKETS_AND_SIGNALS = 3, 3
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 1, 4, 22, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _call(function, *arguments) -> int:
    # the C functions are variadic: an int would arrive with 32 bits
    result = function(*(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Lockdown:
    """Prepared once in the server, entered in every child: `enter` is a dozen system calls.

    `landlock` and `seccomp` say what the level demands; raises OSError where the kernel lacks it.
    """

    def __init__(self, landlock: str, seccomp: bool) -> None:
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory runs out, a program goes first (the largest of these processes)
        _call(_libc.prctl, _SET_DUMPABLE, 0, 0, 0, 0)  # closes /proc/<server>/mem to programs of the same user
        self.root = os.geteuid() == 0
        self.ruleset = None if landlock == "no" else self._ruleset(required=landlock == "required")
        self.filter = self._filter() if seccomp else None
        # RLIMIT_NPROC counts every thread of the user: leave room for those that are not ours
        self.threads = self._threads_of(NOBODY if self.root else os.getuid()) + 4096

    def enter(self, cpu_seconds: float, memory: int, output: int) -> None:
        """Limits: CPU seconds, bytes of address space, bytes of any one file written. There is no way back."""
        server = os.getppid()
        os.setpgid(0, 0)  # not setsid: a new session would not give way
        _limit(resource.RLIMIT_CPU, math.ceil(2 * cpu_seconds) + 1)  # a second guard; the server's clock is exact
        _limit(resource.RLIMIT_AS, memory)
        _limit(resource.RLIMIT_FSIZE, output)
        _limit(resource.RLIMIT_NPROC, self.threads)
        _limit(resource.RLIMIT_NOFILE, 64)
        _limit(resource.RLIMIT_CORE, 0)
        # recursion through C needs it; 128 MB are free below the stack in every memory layout
        _limit(resource.RLIMIT_STACK, 100 << 20)
        if self.root:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        _call(_libc.prctl, _SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            os._exit(1)
        _call(_libc.prctl, _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if self.ruleset is not None:
            _call(_libc.syscall, _RESTRICT_SELF, self.ruleset, 0)
            os.close(self.ruleset)
        if self.filter is not None:
            _call(_libc.prctl, _SET_SECCOMP, 2, ctypes.byref(self.filter), 0, 0)

    def _ruleset(self, required: bool) -> int | None:
        try:
            abi = _call(_libc.syscall, _CREATE_RULESET, None, 0, 1)
        except OSError as error:
            if not required and error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                return None
            raise OSError(
                error.errno, f"Landlock is not available in this kernel or container ({error.strerror})"
            ) from None
        rights = (1 << _FILE_RIGHTS.get(abi, 16)) - 1
        attributes = struct.pack("<QQQ", rights, _TCP_BIND_AND_CONNECT, _ABSTRACT_SOCKETS_AND_SIGNALS)
        size = 8 if abi < 4 else 16 if abi < 6 else 24
        ruleset = _call(_libc.syscall, _CREATE_RULESET, attributes, size, 0)
        os.set_inheritable(ruleset, False)
        read = _READ_FILE | _READ_DIR
        prefix = [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]
        for path in [*prefix, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]:
            _allow(ruleset, path, read)
        for path, right in {
            "/dev/null": _READ_FILE | _WRITE_FILE,
            "/dev/urandom": _READ_FILE,
            "/etc/ld.so.cache": _READ_FILE,
        }.items():
            _allow(ruleset, path, right)
        return ruleset

    @staticmethod
    def _filter():
        if platform.machine() not in syscalls.MACHINES:
            raise OSError(
                errno.ENOSYS, f"no seccomp filter for {platform.machine()}, only for {', '.join(syscalls.MACHINES)}"
            )
        code = syscalls.bpf(platform.machine())

        class Program(ctypes.Structure):  # struct sock_fprog
            _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

        return Program(len(code) // 8, code)

    @staticmethod
    def _threads_of(uid: int) -> int:
        count = 0
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{process}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{process}/task"))
            except OSError:  # it ended meanwhile
                continue
        return count


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _allow(ruleset: int, path: str, right: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not every system has every library folder
        return
    _call(_libc.syscall, _ADD_RULE, ruleset, 1, struct.pack("<Qi", right, descriptor), 0)
    os.close(descriptor)
