"""The system calls that a computing Python program needs; every other one answers ENOSYS.

A list of what is allowed, not of what is forbidden, so that calls of later kernels stay closed too. There is no
fork or exec, no socket, no signal to anyone, no way to make, change or remove a file, a namespace or a mount.
"""

import errno
import struct

# name: (x86_64, aarch64); None where the architecture lacks the call
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # files that are open, or that Landlock lets be opened
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66),
    "pread64": (17, 67), "pwrite64": (18, 68), "lseek": (8, 62), "fsync": (74, 82), "fdatasync": (75, 83),
    "open": (2, None), "openat": (257, 56), "close": (3, 57), "close_range": (436, 436),
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getdents64": (217, 61),
    "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "ioctl": (16, 29), "fcntl": (72, 25), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "pipe": (22, None), "pipe2": (293, 59), "umask": (95, 166),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # memory and threads
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "clone": (56, 220), "futex": (202, 98), "futex_waitv": (449, 449), "membarrier": (324, 283),
    "set_tid_address": (218, 96), "set_robust_list": (273, 99), "rseq": (334, 293), "arch_prctl": (158, None),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    # one's own signals and timers
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "pause": (34, None),
    "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102), "restart_syscall": (219, 128),
    # clocks, identity, limits, the end
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getpgrp": (111, None), "getpgid": (121, 155),
    "getsid": (124, 156), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150), "uname": (63, 160),
    "sysinfo": (99, 179), "getrandom": (318, 278), "getrlimit": (97, 163), "setrlimit": (160, 164),
    "prlimit64": (302, 261), "wait4": (61, 260), "waitid": (247, 95), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip

# name: (argument, mask, values): allowed only where (argument & mask) is one of the values
GUARDED: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "clone": (0, 0x7E03_0000, (0x0001_0000,)),  # a thread of this process, in no new namespace; never a process
    "prlimit64": (0, 0xFFFF_FFFF, (0,)),  # its own limits, not those of another process of the same user
    "ioctl": (1, 0xFFFF_FFFF, (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)),  # TCGETS FIONREAD FIONBIO FIO[N]CLEX
    "fcntl": (1, 0xFFFF_FFFF, (0, 1, 2, 3, 4, 1030, 1032, 1034)),  # duplicate and flags; F_SETOWN sends signals
}

# machine: (AUDIT_ARCH, column of ALLOWED)
MACHINES = {"x86_64": (0xC000_003E, 0), "aarch64": (0xC000_00B7, 1)}

_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_ALLOW, _KILL, _NOT_THERE = 0x7FFF_0000, 0x8000_0000, 0x0005_0000 | errno.ENOSYS


def bpf(machine: str) -> bytes:
    """The seccomp filter for a machine ("x86_64" or "aarch64") as an array of struct sock_filter.

    struct seccomp_data is {int nr; u32 arch; u64 instruction_pointer; u64 args[6]}, little endian on both.
    """
    arch, column = MACHINES[machine]
    # another architecture's calls have other numbers: a 32-bit call kills
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for name, numbers in ALLOWED.items():
        number = numbers[column]
        if number is None:
            continue
        if name not in GUARDED:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
            continue
        argument, mask, values = GUARDED[name]
        body = [(_LOAD, 0, 0, 16 + 8 * argument), (_AND, 0, 0, mask)]
        for value in values:
            body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        body.append((_RETURN, 0, 0, _NOT_THERE))
        code += [(_EQUAL, 0, len(body), number), *body]
    code.append((_RETURN, 0, 0, _NOT_THERE))
    return b"".join(struct.pack("<HBBI", *line) for line in code)
