"""Runs one Python program that a model wrote, apart from all else; `python_sandbox` starts this file as a script.

Standard library only: it starts in some 30 ms, and nothing of the user's is in its memory. Three processes, each less
trusted: the first makes new namespaces, the second (their process 1) builds a root of its own and keeps the time, the
third drops its rights and runs the program. When the second ends, the kernel ends whatever runs in its namespaces.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import time
from pathlib import Path

SETUP_FAILED = 3  # exit status: no such isolation here, the program was not run
MAX_PROCESSES = 8  # and threads
MAX_FILE_MB = 16
MAX_DISK_MB = 64
HOST_NAME = b"sandbox"
_MESSAGE = 200  # characters of an error that are kept

# From <sched.h>, <sys/mount.h>, <linux/mount.h>, <sys/prctl.h>, <linux/capability.h>.
_NEW_USER, _NEW_OTHERS = (
    0x10000000,
    0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000,
)  # ns pid net ipc uts
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE, _DETACH = 2, 4, 4096, 16384, 1 << 18, 2
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_READ_ONLY, _ATTR_NOSUID, _ATTR_NODEV = 442, -100, 0x8000, 1, 2, 4
_SET_DUMPABLE, _SET_SUBREAPER, _NO_NEW_PRIVS, _SET_SECCOMP = 4, 36, 38, 22
_CAPABILITY_VERSION = 0x20080522
_JOIN_SESSION_KEYRING = 1
# By machine: its number in <linux/audit.h>, and those of its system calls.
_CALLS = {
    "x86_64": (
        0xC000003E,
        {
            "socket": 41, "clone": 56, "shmget": 29, "semget": 64, "msgget": 68, "add_key": 248, "request_key": 249,
            "keyctl": 250, "unshare": 272, "setns": 308, "memfd_create": 319, "mq_open": 240,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "socket": 198, "clone": 220, "shmget": 194, "semget": 190, "msgget": 186, "add_key": 217,
            "request_key": 218, "keyctl": 219, "unshare": 97, "setns": 268, "memfd_create": 279, "mq_open": 180,
        },
    ),
}  # fmt: skip
_CALLS_OF_ALL = {"io_uring_setup": 425, "clone3": 435, "memfd_secret": 447}
_MAY_HAVE_FILTER = sys.platform == "linux" and os.uname().machine in _CALLS and sys.maxsize > 2**32
_FAMILIES = (1, 2, 10)  # of sockets: Unix, IPv4, IPv6. Others, such as vsock, are in no namespace
_EPERM, _ENOSYS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


def libraries() -> list[str]:
    """The folders that this interpreter imports from, with the system's shared libraries; none inside another."""
    roots = [*(f"{p}/{lib}" for p in (sys.base_prefix, sys.prefix) for lib in ("lib", "lib64"))]
    roots += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/etc/ld.so.cache"]
    found: list[str] = []
    for path in sorted({os.path.normpath(root) for root in roots if os.path.exists(root)}, key=len):
        if not any(path.startswith(f"{parent}/") for parent in found):
            found.append(path)
    return found


def main(level: str, timeout_s: float, memory_mb: int, folder: str) -> None:
    """Reads the program from stdin; writes `{"passed": bool, "error": str or null}` to stdout."""
    program = sys.stdin.buffer.read()
    os.umask(0o022)
    try:
        uid = _spare_uid() if os.geteuid() == 0 else None
        if level == "namespaces":
            _unshare(with_user=uid is None)
    except OSError as error:
        _fail(error)
    keeper = os.fork()
    if keeper:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(keeper, 0)[1]) & 0xFF)
    try:
        null = os.open(os.devnull, os.O_RDWR)
        if level == "namespaces":
            _new_root(folder)
            folder = "/tmp"
        elif uid is not None:
            os.chown(folder, uid, uid)
        os.chdir(folder)
        _prctl(_SET_DUMPABLE, 0)  # so that the program, of the same user, cannot trace this process
        _prctl(_SET_SUBREAPER, 1)
    except OSError as error:
        _fail(error)
    _keep(program, timeout_s, memory_mb, uid, null)


def _keep(program: bytes, timeout_s: float, memory_mb: int, uid: int | None, null: int) -> None:
    """Runs the program in a child, tells how it ended, and leaves no process behind."""
    answer, answer_end = os.pipe()
    secret_end, secret = os.pipe()
    ready, ready_end = os.pipe()
    runner = os.fork()
    if not runner:
        for end in (answer, secret, ready):
            os.close(end)
        _run(program, timeout_s, memory_mb, uid, (null, answer_end, secret_end, ready_end))
    for end in (answer_end, ready_end):  # secret_end stays: a runner that ends at once must not break the pipe
        os.close(end)
    if problem := os.read(ready, 1000):
        print(problem.decode(errors="replace"), file=sys.stderr)
        sys.stderr.flush()
        os._exit(SETUP_FAILED)
    # Made only now: the runner's memory, a copy of this one, must not hold it.
    token = os.urandom(16)
    os.write(secret, token)
    status = _wait(runner, timeout_s)
    if status is None:
        os.kill(runner, signal.SIGKILL)
        os.waitpid(runner, 0)
    os.set_blocking(answer, False)
    try:
        said = os.read(answer, 4096)
    except BlockingIOError:
        said = b""
    _end_descendants()
    passed = status == 0 and said == token
    if passed:
        error = None
    elif status is None:
        error = f"timed out after {timeout_s:g} s"
    elif os.WIFSIGNALED(status):
        error = f"ended by signal {os.WTERMSIG(status)}"
    elif os.WEXITSTATUS(status) == 1 and said:
        error = said.decode(errors="replace")[:_MESSAGE]
    else:
        error = f"left with status {os.WEXITSTATUS(status)} before its end"
    print(json.dumps({"passed": passed, "error": error}), flush=True)
    os._exit(0)


def _wait(runner: int, timeout_s: float) -> int | None:
    """Its exit status; None past its time, or when whoever asked is gone."""
    asker = select.poll()
    asker.register(1, 0)  # an error on stdout: its reader is gone
    deadline = time.monotonic() + timeout_s
    pause = 1.0  # milliseconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(runner, os.WNOHANG)
        if pid:
            return status
        if asker.poll(pause):
            return None
        pause = min(10.0, pause * 1.5)
    return None


def _run(program: bytes, timeout_s: float, memory_mb: int, uid: int | None, ends: tuple[int, int, int, int]) -> None:
    """In the runner: gives up every right, then runs the program. It passes by coming to its end."""
    null, answer, secret, ready = ends
    read, write, leave, own_id = os.read, os.write, os._exit, os.getpid  # the program may put others in their place
    process = own_id()
    try:
        os.setsid()
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.close(null)
        _limit(timeout_s, memory_mb)
        _drop_rights(uid)
    except (OSError, ValueError) as error:
        write(ready, f"{type(error).__name__}: {error}".encode())
        leave(SETUP_FAILED)
    os.close(ready)
    try:
        # As the published harness does: globals without a __name__, so `if __name__ == "__main__"` is not taken.
        exec(program.decode("utf-8", "surrogatepass"), {})
    except BaseException as error:
        if own_id() != process:  # a child that the program has made: its end is not the program's
            leave(1)
        try:
            text = f"{type(error).__name__}: {error}"
        except BaseException:
            text = type(error).__name__
        write(answer, text[:_MESSAGE].encode(errors="replace"))
        leave(1)
    if own_id() != process:
        leave(1)
    # In no memory of this process until here: no print, exit status or search through frames gives it away.
    write(answer, read(secret, 16))
    leave(0)


def _limit(timeout_s: float, memory_mb: int) -> None:
    limits = {
        "RLIMIT_AS": memory_mb * 2**20,
        "RLIMIT_CPU": math.ceil(timeout_s) + 1,
        "RLIMIT_FSIZE": MAX_FILE_MB * 2**20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": MAX_PROCESSES,
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (OSError, ValueError):
            if sys.platform == "linux":  # macOS refuses RLIMIT_AS
                raise


def _drop_rights(uid: int | None) -> None:
    _prctl(_NO_NEW_PRIVS, 1)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if sys.platform == "linux":
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
        _check(_libc.capset(header, (ctypes.c_uint32 * 6)()))
    if _MAY_HAVE_FILTER:
        _new_session_keyring()
        _filter_calls()


def _new_session_keyring() -> None:
    """Leaves the caller's keys. Where the kernel has no keyrings, or a container refuses them, none is to be left."""
    _libc.syscall(_CALLS[os.uname().machine][1]["keyctl"], _JOIN_SESSION_KEYRING, None)


def _filter_calls() -> None:
    """Refuses what no limit counts and no namespace parts, with EPERM, for this process and all that it makes.

    Memory outside of an address space (System V's, memfd, queues), keyrings, further namespaces, io_uring, which would
    get past this, and sockets of other families. A filter reads `struct seccomp_data`: the call's number, the
    machine's, an address, the arguments.
    """
    machine, calls = _CALLS[os.uname().machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # <linux/bpf_common.h>
    number_at, machine_at, argument_at = 0, 4, 16
    allow, refuse = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
    # (operation, steps to leave out if so, if not, value). Calls by another machine's numbers are refused.
    steps = [(load, 0, 0, machine_at), (equal, 1, 0, machine), (give, 0, 0, refuse | _EPERM)]
    steps += [(load, 0, 0, number_at), (at_least, 0, 1, 0x40000000), (give, 0, 0, refuse | _EPERM)]  # x32's
    for name, number in {**calls, **_CALLS_OF_ALL}.items():
        if name not in ("socket", "clone"):
            # glibc takes clone where there is no clone3, whose flags are out of a filter's reach.
            steps += [(equal, 0, 1, number), (give, 0, 0, refuse | (_ENOSYS if name == "clone3" else _EPERM))]
    steps += [(equal, 0, 4, calls["clone"]), (load, 0, 0, argument_at), (any_bit, 0, 1, _NEW_USER | _NEW_OTHERS)]
    steps += [(give, 0, 0, refuse | _EPERM), (give, 0, 0, allow)]
    steps += [(equal, 1, 0, calls["socket"]), (give, 0, 0, allow), (load, 0, 0, argument_at)]
    for family in _FAMILIES:
        steps += [(equal, 0, 1, family), (give, 0, 0, allow)]
    steps += [(give, 0, 0, refuse | _EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    _check(_libc.prctl(_SET_SECCOMP, ctypes.c_ulong(2), program, ctypes.c_ulong(0), ctypes.c_ulong(0)))


def _spare_uid() -> int | None:
    """For root: a user that nobody is, as the limit of processes does not hold for root.

    None where root is only a name, and an ordinary user outside. OSError where it is really root, without a spare user.
    """
    first, outside, count = map(int, Path("/proc/self/uid_map").read_text().splitlines()[-1].split())
    if count > 20_000:
        return first + count - 3 - os.getpid() % 10_000
    if not outside:
        raise OSError("this is root, and there is no other user to run it as")
    return None


def _unshare(with_user: bool) -> None:
    """New namespaces: of mounts, network, IPC and names for this process, of processes for its children."""
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEW_OTHERS | (_NEW_USER if with_user else 0)))
    for name_it in (_libc.sethostname, _libc.setdomainname):
        _check(name_it(HOST_NAME, len(HOST_NAME)))
    if with_user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        with contextlib.suppress(OSError):  # a container may forbid it; the program itself may make none then
            Path("/proc/sys/user/max_user_namespaces").write_text("0")


def _new_root(folder: str) -> None:
    """Changes into a read-only root with the interpreter's libraries and an empty /tmp in memory; no /proc."""
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for name in ("tmp", "old"):
        os.mkdir(f"{folder}/{name}")
    # First: an interpreter may itself lie under /tmp.
    _mount("tmpfs", f"{folder}/tmp", "tmpfs", _NOSUID | _NODEV, f"size={MAX_DISK_MB}m,nr_inodes=8192,mode=1777")
    for source in libraries():
        _bind(source, folder + source)
        _seal(folder + source, _ATTR_READ_ONLY | _ATTR_NOSUID | _ATTR_NODEV)
    for device in ("/dev/null", "/dev/urandom"):
        _bind(device, folder + device)
    _check(_libc.pivot_root(os.fsencode(folder), os.fsencode(f"{folder}/old")))
    os.chdir("/")
    _check(_libc.umount2(b"/old", _DETACH))
    os.rmdir("/old")
    _seal("/", _ATTR_READ_ONLY, flags=0)


def _seal(path: str, attributes: int, flags: int = _AT_RECURSIVE) -> None:
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd.
    words = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(words))
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, ctypes.byref(words), size), path)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    _mount(source, target, None, _BIND | _REC)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, options)]
    _check(_libc.mount(*words[:3], ctypes.c_ulong(flags), words[3]), target)


def _end_descendants() -> None:
    """Kills what the program has left; in namespaces the kernel would, here it may be told to."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        except OSError:  # no /proc: in a namespace of processes, whose end ends them
            return
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _check(_libc.prctl(option, *(ctypes.c_ulong(word) for word in (value, 0, 0, 0))))


def _check(result: int, what: str | None = None) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)


def _fail(error: OSError) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(SETUP_FAILED)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
