"""What a hostile program tries, at every level that this machine proves. After each attack the sandbox still works."""

import os
import platform
import socket
import threading
from pathlib import Path

import pytest

import rotrl
from rotrl.evaluate.sandbox import Limits, Sandbox, ladder
from rotrl.evaluate.task import Test

PROVEN = [level for level, reason in ladder().items() if not reason]
SHORT = Limits(cpu_seconds=0.3, wall_seconds=20, memory_mb=512, output_mb=1)
REPOSITORY = Path(rotrl.__file__).parents[1]


@pytest.fixture(scope="module", params=PROVEN)
def sandbox(request):
    with Sandbox(request.param, workers=1) as opened:
        yield opened


@pytest.fixture(autouse=True)
def still_works(sandbox):
    before = {server._process.pid for server in sandbox._servers}
    yield
    assert sandbox.run("lambda x: x + 1", [Test([1], None)], "f")[0].value == 2
    assert {server._process.pid for server in sandbox._servers} == before


def run(sandbox, program, *arguments, limits=SHORT):
    [outcome] = sandbox.run(program, [Test(list(arguments), None)], "attack", limits)
    return outcome


# each is one expression or statement that must raise; `place` is a folder that anyone may write to
FORBIDDEN = {
    "fork": "os.fork()",
    "spawn": "subprocess.run(['/bin/true'])",
    "multiprocessing": "multiprocessing.get_context('fork').Process(target=print).start()",
    "daemon": "os.fork() or (os.setsid(), os.fork() or time.sleep(1000))",
    "many processes with memory each": "[os.fork() or bytearray(1 << 30) for _ in range(100)]",
    "100 GB file": "open(place + '/attack', 'wb').truncate(100 << 30)",
    "exec": "os.execv('/bin/true', ['true'])",
    "kill parent": "os.kill(os.getppid(), 9)",
    "kill grader": "os.kill(pid, 9)",
    "kill group": "os.killpg(0, 9)",
    "kill all": "os.kill(-1, 9)",
    "stop itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "signal by descriptor": "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "owner of a pipe": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "TCP": "socket.create_connection(('127.0.0.1', port), 1)",
    "TCP listen": "socket.create_server(('127.0.0.1', 0))",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "abstract socket": "socket.socket(socket.AF_UNIX).connect(abstract)",
    "socket pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', abstract)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "environment of the grader": "open(f'/proc/{pid}/environ', 'rb').read()",
    "environment of the parent": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "environment of init": "open('/proc/1/environ', 'rb').read()",
    "memory of the grader": "open(f'/proc/{pid}/mem', 'rb').read(1)",
    "memory of the parent": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "its own memory file": "open('/proc/self/mem', 'rb').read(1)",
    "secret file": "open(place + '/secret').read()",
    "secret through an inherited folder": "through_folders(place + '/secret')",
    "accounts": "open('/etc/passwd').read()",
    "home": "os.listdir(home)",
    "write into the memory of the parent": "open(f'/proc/{os.getppid()}/mem', 'r+b')",
    "read the repository": "open(repository + '/pyproject.toml').read()",
    "write into the repository": "open(repository + '/rotrl/attack.py', 'w')",
    "create": "open(place + '/attack', 'w')",
    "overwrite": "open(place + '/secret', 'r+')",
    "append": "open(place + '/secret', 'a')",
    "truncate": "os.truncate(place + '/secret', 0)",
    "remove": "os.remove(place + '/secret')",
    "rename": "os.rename(place + '/secret', place + '/attack')",
    "link": "os.link(place + '/secret', place + '/attack')",
    "symlink": "os.symlink(place + '/secret', place + '/attack')",
    "directory": "os.mkdir(place + '/attack')",
    "named pipe": "os.mkfifo(place + '/attack')",
    "mode": "os.chmod(place + '/secret', 0)",
    "owner": "os.chown(place + '/secret', 0, 0)",
    "times": "os.utime(place + '/secret', (0, 0))",
    "attributes": "os.setxattr(place + '/secret', 'user.attack', b'x')",
    "memory file": "os.memfd_create('attack')",
    "shared memory": "open('/dev/shm/attack', 'w')",
    "temporary file": "tempfile.TemporaryFile()",
    "become root": "os.setuid(0)",
    "more CPU": "resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "limits of the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "limits of the grader": "resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1))",
    "priority of others": "os.setpriority(os.PRIO_USER, 0, 19)",
    "processors of the grader": "os.sched_setaffinity(pid, {0})",
    "new session": "os.setsid()",
    "host name": "socket.sethostname('attack')",
    "chroot": "os.chroot('/')",
    "user namespace": "check(libc.unshare(0x10000000))",
    "mount namespace": "check(libc.unshare(0x00020000))",
    "namespace of init": "os.open('/proc/1/ns/mnt', os.O_RDONLY)",
    "mount": "check(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "pivot_root": "check(call('pivot_root', b'/', b'/'))",
    "clone in a namespace": "check(call('clone', 0x10000000 | 17, 0, 0, 0, 0))",
    "ptrace": "check(libc.ptrace(16, pid, 0, 0))",
    "memory of others by call": "check(libc.process_vm_readv(pid, None, 0, None, 0, 0))",
    "file by handle": "check(call('open_by_handle_at', -100, None, 0))",
    "io_uring": "check(call('io_uring_setup', 1, None))",
    "bpf": "check(call('bpf', 0, None, 0))",
    "keyring": "check(call('add_key', b'user', b'x', b'x', 1, -3))",
    "message queue": "check(libc.mq_open(b'/attack', 66, 0o600, None))",
    "SysV memory": "check(libc.shmget(1, 4096, 0o1600))",
    "reboot": "check(call('reboot', 0, 0, 0, 0))",
    "new seccomp filter": "check(libc.prctl(22, 2, None))",
}

PRELUDE = """
import ctypes, fcntl, multiprocessing, os, resource, signal, socket, subprocess, tempfile, time
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = {
    "pivot_root": (155, 41), "clone": (56, 220), "open_by_handle_at": (304, 265), "io_uring_setup": (425, 425),
    "bpf": (321, 280), "add_key": (248, 217), "reboot": (169, 142),
}

def call(name, *arguments):
    return libc.syscall(NUMBERS[name][os.uname().machine == "aarch64"], *arguments)

def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

def through_folders(path):
    for number in range(3, 64):
        try:
            return os.read(os.open("../" * 12 + path.lstrip("/"), os.O_RDONLY, dir_fd=number), 1)
        except OSError as error:
            last = error
    raise last

def attack(action, place, pid, port, abstract, repository, home):
    try:
        exec(action, globals() | locals())
    except Exception as error:
        return f"stopped: {error}"
    return "went through"
"""


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """What the attacks aim at: a world-writable folder with a secret, listeners, this process."""
    place = Path("/tmp") / f"rotrl-attack-{os.getpid()}"
    place.mkdir()
    place.chmod(0o777)
    secret = place / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    abstract = f"\0rotrl-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(abstract)
        unix.listen()
        port = tcp.getsockname()[1]
        yield [str(place), os.getpid(), port, abstract, str(REPOSITORY), str(Path.home())]
    assert secret.read_text() == "secret"
    assert secret.stat().st_mode & 0o777 == 0o666
    secret.unlink()
    place.rmdir()  # fails if anything else was made


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden(sandbox, targets, name):
    outcome = run(sandbox, PRELUDE, FORBIDDEN[name], *targets)
    assert outcome.status == "ok", outcome
    assert outcome.value.startswith("stopped: "), outcome


def test_the_table_of_attacks_can_be_trusted(targets):
    """Without a sandbox most of them do go through (those that end the process are left out)."""
    through = {
        "fork",
        "TCP",
        "UDP",
        "abstract socket",
        "secret file",
        "create",
        "overwrite",
        "rename",
        "memory file",
        "spawn",
    }
    with Sandbox("none", workers=1) as opened:
        for name in sorted(through):
            assert run(opened, PRELUDE, FORBIDDEN[name], *targets).value == "went through", name
            if name == "create":
                Path(targets[0], "attack").unlink()
            if name == "rename":
                Path(targets[0], "attack").rename(Path(targets[0], "secret"))


@pytest.mark.parametrize(
    ("name", "program", "status"),
    [
        ("endless loop", "while True: pass", "time limit"),
        (
            "ignoring signals",
            "from signal import *\nfor s in {*range(1, 65)} - {9, 19, 32, 33}: signal(s, SIG_IGN)\nwhile True: pass",
            "time limit",
        ),
        (
            "loops in threads",
            "import threading\ndef f():\n    while True: pass\nfor _ in range(8): threading.Thread(target=f).start()",
            "time limit",
        ),
        ("fork bomb", "import os\nwhile True: os.fork()", "runtime error"),
        ("100 GB of memory", "x = bytearray(100 << 30)", "memory limit"),
        ("100 GB by mapping", "import mmap\nx = mmap.mmap(-1, 100 << 30)", "runtime error"),
        ("endless standard output", "while True: print('x' * 1000)", "runtime error"),
        ("endless raw output", "import os\nwhile True: os.write(1, b'x' * 10000)", "runtime error"),
        ("100 GB in standard input", "import os\nos.lseek(0, 100 << 30, 0); os.write(0, b'x')", "runtime error"),
        ("deep recursion", "def f(n): return f(n + 1)\nf(0)", "runtime error"),
        (
            "deeper recursion",
            "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr(A())\nrepr(A())",
            None,
        ),
        ("jump to nowhere", "import ctypes\nctypes.CFUNCTYPE(None)(1)()", "runtime error"),
        ("abort", "import os\nos.abort()", "runtime error"),
        ("compiler", "x = " + "-" * 200_000 + "1", None),
        ("huge number", "x = 9 ** 9 ** 9 ** 9", None),
        ("interrupt", "raise KeyboardInterrupt", "runtime error"),
        ("exit code", "import sys\nsys.exit(256)", "ok"),  # the kernel keeps eight bits: an exit code of 0
        ("text as exit code", "import sys\nsys.exit('failed')", "runtime error"),
    ],
)
def test_programs_that_waste_or_break(sandbox, name, program, status):
    [outcome] = sandbox.run(program, [Test("", None)], None, SHORT)
    assert outcome.status == status or (status is None and outcome.status not in ("ok", "sandbox error")), outcome


def test_a_bomb_of_threads_ends_with_its_process(sandbox):
    program = """
import threading, time
def attack():
    threading.stack_size(32768)
    count = 0
    try:
        while True:
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
            count += 1
    except (RuntimeError, MemoryError):
        return count
"""
    outcome = run(sandbox, program, limits=Limits(cpu_seconds=2, wall_seconds=2, memory_mb=512))
    assert outcome.status == "time limit" or outcome.value < 20_000, outcome
    assert threading.active_count() < 50


def test_binary_output_is_only_wrong_text(sandbox):
    [outcome] = sandbox.run("import os\nos.write(1, bytes(range(256)))", [Test("", None)], None)
    assert outcome.status == "ok"
    assert "\ufffd" in outcome.value


def test_the_environment_is_empty_and_the_user_is_nobody(sandbox):
    program = """
import os, ctypes
def attack():
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    names = [b"HOME", b"PATH", b"WANDB_API_KEY", b"HF_TOKEN"]
    return [dict(os.environ), [n.decode() for n in names if libc.getenv(n)], os.getresuid(), os.getgroups()]
"""
    environment, names, users, groups = run(sandbox, program).value
    assert (environment, names) == ({}, [])
    if os.geteuid() == 0:
        assert (users, groups) == ((65534,) * 3, [])


def test_neither_expected_outputs_nor_earlier_programs_are_in_its_memory(sandbox):
    """Searches every object, every frame and every readable descriptor for what only the grader knows."""
    expected, earlier = "expected-output", "earlier-program"
    sandbox.run(f"lambda x: '{earlier}'", [Test([1], expected)], "f")
    program = """
import gc, os, sys
def attack(*backwards):
    needles = tuple("".join(reversed(word)) for word in backwards)
    things = [(type(thing).__name__, thing) for thing in gc.get_objects() if thing is not needles]
    frame = sys._getframe().f_back
    while frame:
        things += [(f"local {name}", thing) for name, thing in frame.f_locals.items()]
        frame = frame.f_back
    for number in range(64):
        try:
            os.lseek(number, 0, 0)
            things.append((f"descriptor {number}", os.read(number, 1000000)))
        except OSError: pass
    found = []
    for where, thing in things:
        try: text = repr(thing)
        except Exception: continue
        found.extend(where for needle in needles if needle in text)
    return found[:5]
"""
    backwards = [expected[::-1], earlier[::-1]]
    [outcome] = sandbox.run(program, [Test(backwards, expected)], "attack", Limits(cpu_seconds=20))
    assert (outcome.status, outcome.value) == ("ok", []), outcome
    [outcome] = sandbox.run(program, [Test([*backwards, "attack"[::-1]], expected)], "attack", Limits(cpu_seconds=20))
    assert outcome.value, "the search finds what is there"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit calls exist on x86 only")
def test_a_32_bit_system_call_kills(sandbox):
    program = """
import ctypes, mmap
def attack():
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""
    outcome = run(sandbox, program)
    assert (outcome.status, "signal" in outcome.detail) == ("runtime error", True)


@pytest.mark.parametrize("status", ["sandbox error", "accepted", "grader error", "nonsense"])
def test_a_program_cannot_choose_the_verdict(sandbox, status):
    """It finds its nonces in the frames and writes them, and noise, to every descriptor that it has."""
    program = """
import json, os, sys
def attack(status):
    frame = sys._getframe()
    while frame and "nonces" not in frame.f_locals:
        frame = frame.f_back
    for number in range(64):
        for nonce in frame.f_locals["nonces"]:
            for text in ("\\xff\\n", "[]\\n", f"{nonce} [\\n", f'{nonce} {{"status": "{status}"}}\\n'):
                try: os.write(number, text.encode("latin-1"))
                except OSError: pass
    os._exit(0)
"""
    outcome = run(sandbox, program, status)
    assert (outcome.status, outcome.detail) == ("runtime error", "it ended before it answered")


@pytest.mark.parametrize(
    "value",
    [
        '{"tuple": 5}',
        '{"set": [[1]]}',
        '{"int": "0x"}',
        '{"complex": [1, 2, 3]}',
        '{"bytes": "zz"}',
        '{"a": 1, "b": 2}',
        "[" * 900 + "]" * 900,
        '{"set": [' + ", ".join(str(n * (2**61 - 1)) for n in range(20_000)) + "]}",
    ],
    ids=lambda value: value[:12],
)
def test_a_forged_value_is_only_a_wrong_answer(sandbox, value):
    program = """
import os, sys
def attack(value):
    frame = sys._getframe()
    while frame and "nonces" not in frame.f_locals:
        frame = frame.f_back
    for number in range(3, 64):
        try: os.write(number, f'{frame.f_locals["nonces"][0]} {{"status": "ok", "value": {value}}}\\n'.encode())
        except OSError: pass
    os._exit(0)
"""
    assert run(sandbox, program, value).status == "wrong answer"


def test_a_program_cannot_break_its_report(sandbox):
    program = """
import os
def attack():
    for number in range(64):
        try:
            os.lseek(number, 0, 0)
            os.write(number, b"\\0" * 1000)
            os.close(number)
        except OSError: pass
    return 1
"""
    assert run(sandbox, program).status == "runtime error"
