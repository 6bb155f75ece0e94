"""The inside of the sandbox: confine this process, then run a program that nobody has read.

Started by :mod:`stockpot.evaluation.sandbox` as a script, with the numbers of its pipes, in a bare
interpreter: only the standard library is at hand, and nothing of stockpot is imported.

With namespaces there are two processes. The first stays outside, runs nothing of the program and
waits for the end of a pipe that the caller holds; then it kills the second, which is the first of
its own process namespace and takes everything below with it. Without namespaces there is one.

What goes back, line by line: ``started``, or why the process could not be confined; then a digest
if the program ran to its end, or why it did not.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import resource
import signal
import struct
import sys
import types
from typing import Any

_NEW_USER, _NEW_REST = 0x10000000, 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXECUTION = 1, 2, 4, 8
_REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 32, 4096, 16384, 1 << 18
_KEPT = _NO_SUID | _NO_DEVICES | _NO_EXECUTION | 1024 | 2048  # a remount may not take these off
_DETACH = 2

_DEATH_SIGNAL, _SET_SECCOMP, _NO_NEW_PRIVILEGES = 1, 22, 38
_CAPABILITIES_VERSION_3 = 0x20080522
_PIVOT_ROOT = {"x86_64": 155}.get(os.uname().machine, 41)

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_MAY_EXECUTE, _MAY_WRITE, _MAY_READ, _MAY_LIST = 1, 2, 4, 8
_MAY_MAKE_DEVICES, _MAY_CONTROL_DEVICES = 1 << 6 | 1 << 11, 1 << 15

_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_SYSTEM = (
    *("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib"),
    *("/nix/store", "/gnu/store", "/etc/ld.so.cache", "/usr/share/zoneinfo"),
)
_OWN_FOLDER = "/tmp"  # of the new root: no folder of the machine

_libc: Any = ctypes.CDLL(None, use_errno=True)


def main(setting: int, key: int, result: int, lifeline: int) -> None:
    """Confine this process as the setting says, and run its program.

    Args:
        setting: where to read, as JSON, the program and how to confine it.
        key: where to read the key when the program has ended well.
        result: where to write what became of it.
        lifeline: ends when the caller has what it wants, or is gone.
    """
    with open(setting, encoding="utf-8") as file:
        asked = json.load(file)
    try:
        if "namespaces" in asked["layers"]:
            _enter_namespaces()
            inside = os.fork()
            if inside:
                os.close(key)
                os.close(result)
                _guard(inside, lifeline)
            os.setsid()  # or it could signal the guard, which is in the group of processes
        os.close(lifeline)
        _confine(asked)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        os.write(result, f"{error.strerror or error}{place}\n".encode())
        os._exit(1)
    _judge(asked["program"], key, result)


def _guard(inside: int, lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os.kill(inside, signal.SIGKILL)
    os.waitpid(inside, 0)
    os._exit(0)


def _confine(asked: dict[str, Any]) -> None:
    """Give up everything the program does not need, the means to give up last."""
    namespaces = "namespaces" in asked["layers"]
    readable = _readable()
    if namespaces:
        _change_root(asked["folder"], readable, asked["file_bytes"])
    os.chdir(_OWN_FOLDER if namespaces else asked["folder"])
    landlock = "landlock" in asked["layers"]
    ruleset = _landlock_rules(readable, _OWN_FOLDER if namespaces else None) if landlock else -1
    _limit(asked, namespaces)
    if sys.platform == "linux":
        _drop_privileges(asked["uid"])
        _prctl(_DEATH_SIGNAL, signal.SIGKILL)
        _prctl(_NO_NEW_PRIVILEGES, 1)
    if not namespaces and os.getppid() != asked["parent"]:
        os._exit(1)  # the caller is gone, and would not have been missed by the death signal
    if landlock:
        _system_call(_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)
    if "seccomp" in asked["layers"]:
        _filter_system_calls(bytes.fromhex(asked["filter"]), bytes.fromhex(asked["own_pid"]))


def _readable() -> list[str]:
    """The folders of Python and of the shared libraries, none inside another; some are links."""
    base = sys.base_prefix
    wanted = [*sys.path, f"{base}/lib", f"{base}/{sys.platlibdir}", *_SYSTEM]
    kept: list[str] = []
    for path in sorted({path for path in wanted if os.path.exists(path)}):
        if not any(path.startswith(f"{above}/") for above in kept if not os.path.islink(above)):
            kept.append(path)
    return kept


def _enter_namespaces() -> None:
    """New namespaces of mounts, names, mailboxes, processes and network; of users unless root."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        try:
            _call("unshare", _NEW_REST)
            return
        except PermissionError:
            pass
    _call("unshare", _NEW_REST | _NEW_USER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _change_root(root: str, readable: list[str], file_bytes: int) -> None:
    """Make ``root`` the root folder: what may be read, read-only, and one small folder to write."""
    os.umask(0o022)
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NO_SUID | _NO_DEVICES, "mode=755,size=1m")
    for path in (*readable, *_DEVICES):
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        _mount(path, target, None, _BIND | _RECURSIVE)
        kept = os.statvfs(path).f_flag & _KEPT
        _mount(None, target, None, _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | kept)
    own = root + _OWN_FOLDER
    os.makedirs(own)
    flags = _NO_SUID | _NO_DEVICES | _NO_EXECUTION
    _mount("tmpfs", own, "tmpfs", flags, f"mode=1777,size={file_bytes},nr_inodes=1024")
    _mount(None, root, None, _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEVICES)
    os.chdir(root)
    _system_call(_PIVOT_ROOT, b".", b".")
    _call("umount2", b".", _DETACH)


def _landlock_rules(readable: list[str], writable: str | None) -> int:
    """A Landlock ruleset, as a file descriptor: read here, write there, no port, no signal.

    What each version of the interface knows is in Linux, ``landlock.rst``.
    """
    version = _system_call(_CREATE_RULESET, None, 0, 1)
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    files = (1 << rights) - 1
    words = 3 if version >= 6 else 2 if version >= 4 else 1
    handled = struct.pack(f"={words}Q", *(files, 3, 3)[:words])
    ruleset = _system_call(_CREATE_RULESET, handled, len(handled), 0)
    for path in readable:
        folder = os.path.isdir(path)
        _allow(ruleset, path, _MAY_READ | _MAY_LIST if folder else _MAY_READ)
    for path in _DEVICES:
        _allow(ruleset, path, _MAY_READ | _MAY_WRITE)
    if writable is not None:
        _allow(
            ruleset, writable, files & ~(_MAY_EXECUTE | _MAY_MAKE_DEVICES | _MAY_CONTROL_DEVICES)
        )
    return ruleset


def _allow(ruleset: int, path: str, access: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    _system_call(_ADD_RULE, ruleset, 1, struct.pack("=Qi", access, place), 0)
    os.close(place)


def _limit(asked: dict[str, Any], namespaces: bool) -> None:
    """Resource limits, hard ones. The number of processes is counted for each user.

    So where the program shares its user with others there can be no bound but none at all.
    """
    alone = namespaces or asked["uid"] is not None
    bounds = {
        "RLIMIT_CPU": math.ceil(asked["seconds"]) + 1,
        "RLIMIT_AS": asked["memory_bytes"],
        "RLIMIT_FSIZE": asked["file_bytes"] if namespaces else 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": asked["processes"] if alone else 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, bound in bounds.items():
        if not hasattr(resource, name):
            continue
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        value = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        try:
            resource.setrlimit(which, (value, value))
        except (OSError, ValueError):
            if sys.platform == "linux":
                raise


def _drop_privileges(uid: int | None) -> None:
    """Become a user without files or processes, if there is one to become; drop capabilities."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _call("capset", struct.pack("=Ii", _CAPABILITIES_VERSION_3, 0), bytes(24))


def _filter_system_calls(code: bytes, own_pid: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    code = code.replace(own_pid, struct.pack("<I", os.getpid()))
    _prctl(_SET_SECCOMP, 2, ctypes.byref(Program(len(code) // 8, code)))


def _judge(program: str, key: int, result: int) -> None:
    """Run the program, and say what became of it; what is needed then is bound before."""
    read, write, leave, sha256 = os.read, os.write, os._exit, hashlib.sha256
    os.environ.clear()
    sys.argv = ["program"]
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.modules["__main__"] = types.ModuleType("__main__")
    write(result, b"started\n")
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        write(result, b"out of memory\n")
    except SystemExit:
        write(result, b"ended without finishing the tests\n")
    except BaseException as error:
        try:
            text = f"failed: {type(error).__name__}: {error}"[:400].replace("\n", " ")
            write(result, f"{text}\n".encode("utf-8", "replace"))
        except BaseException:
            write(result, b"failed: an error that cannot be put in words\n")
    else:
        write(result, sha256(read(key, 32)).hexdigest().encode() + b"\n")
    leave(0)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _call("mount", *encoded, ctypes.c_ulong(flags), None if options is None else options.encode())


def _prctl(operation: int, *arguments: Any) -> None:
    padded = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    padded += [ctypes.c_ulong(0)] * (4 - len(arguments))
    _call("prctl", operation, *padded)


def _system_call(number: int, *arguments: Any) -> int:
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _call("syscall", ctypes.c_long(number), *wide)


def _call(name: str, *arguments: Any) -> int:
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
    return result


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
