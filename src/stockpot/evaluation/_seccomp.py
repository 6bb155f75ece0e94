"""A filter of system calls for programs that nobody has read.

Landlock and namespaces decide which files a process sees. What they leave open on some kernels is
closed here: new processes, signals to others, sockets, changes to a file's mode or owner, memory
that no limit counts, and the calls through which kernels are attacked. The filter is a program of
classic BPF that the kernel runs at each system call (Linux, ``seccomp_filter.rst``); the numbers
are those of the kernel's tables for the two architectures.
"""

from __future__ import annotations

import platform
import struct

__all__ = ["OWN_PID", "system_call_filter"]

OWN_PID = struct.pack("<I", 0x7E57A11D)
"""Stands in the filter for the process it is meant for, which puts its own number there."""

_NEWEST = 451
"""The last system call that was looked at; newer ones do not exist for the program."""

_REFUSED: dict[str, tuple[int, int] | tuple[int, None]] = {
    # new processes
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    # others' processes
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    # the network
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    # files that may be looked at but not changed
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utime": (132, None),
    "utimes": (235, None),
    "utimensat": (280, 88),
    "futimesat": (261, None),
    "truncate": (76, 45),
    "sync": (162, 81),
    "syncfs": (306, 267),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    # the view of the files
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "open_by_handle_at": (304, 265),
    # memory that no limit counts, and mailboxes shared with other processes
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # where kernels are attacked, or work is done past this filter
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "personality": (135, 92),
    "syslog": (103, 116),
}

_CONDITIONAL = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "prlimit64": (302, 261),
    "socketpair": (53, 199),
    "tgkill": (234, 131),
}

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38

_CLONE_THREAD = 0x00010000
_UNIX, _STREAM, _KIND_OF_SOCKET = 1, 1, 0xF
_HARMLESS_CONTROLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX and FIOCLEX: what opening a file asks for."""
_SIGNALS_BY_FILE = (8, 10, 15)
"""F_SETOWN, F_SETSIG and F_SETOWN_EX: a file would send signals to a process of one's choice."""


def system_call_filter(machine: str | None = None) -> bytes:
    """The filter as an array of ``struct sock_filter``; empty for a machine it is not made for.

    Args:
        machine: the architecture as ``uname -m`` says it; that of this machine by default.

    A thread may be started, a process may signal itself, and a pair of connected sockets may be
    had, as event loops need it. Everything refused fails with ``EPERM``, but ``clone3`` and what is
    too new to be known with ``ENOSYS``: C libraries then use ``clone``, whose flags can be seen.
    """
    column, architecture = _ARCHITECTURES.get(machine or platform.machine(), (None, None))
    if column is None or architecture is None:
        return b""
    refuse, allow, absent = map(_return, (_ERRNO | _EPERM, _ALLOW, _ERRNO | _ENOSYS))
    number = {name: pair[column] for name, pair in _CONDITIONAL.items()}
    own = struct.unpack("<I", OWN_PID)[0]
    code = [
        _statement(_LOAD, _ARCHITECTURE),
        _jump(_EQUAL, architecture, 1, 0),
        _return(_KILL),
        _statement(_LOAD, _NUMBER),
        _jump(_AT_LEAST, _NEWEST + 1, 0, 1),
        absent,
        *_case(number["clone3"], [absent]),
        *_case(
            number["clone"],
            [_load_argument(0), _jump(_ANY_BIT, _CLONE_THREAD, 0, 1), allow, refuse],
        ),
        *_case(
            number["socketpair"],
            [
                _load_argument(0),
                _jump(_EQUAL, _UNIX, 0, 4),
                _load_argument(1),
                _statement(_AND, _KIND_OF_SOCKET),
                _jump(_EQUAL, _STREAM, 0, 1),
                allow,
                refuse,
            ],
        ),
        *_case(number["kill"], _choose(0, (own,), allow, refuse)),
        *_case(number["tgkill"], _choose(0, (own,), allow, refuse)),
        *_case(number["prlimit64"], _choose(0, (0, own), allow, refuse)),
        *_case(number["ioctl"], _choose(1, _HARMLESS_CONTROLS, allow, refuse)),
        *_case(number["fcntl"], _choose(1, _SIGNALS_BY_FILE, refuse, allow)),
    ]
    for pair in _REFUSED.values():
        refused = pair[column]
        if refused is not None:
            code += _case(refused, [refuse])
    return b"".join([*code, allow])


def _case(number: int, code: list[bytes]) -> list[bytes]:
    """``code``, which must end in a return, for this system call; what follows for the others."""
    return [_jump(_EQUAL, number, 0, len(code)), *code]


def _choose(argument: int, values: tuple[int, ...], found: bytes, missing: bytes) -> list[bytes]:
    """One return if the argument is among the values, the other if not."""
    count = len(values)
    jumps = [_jump(_EQUAL, value, count - place, 0) for place, value in enumerate(values)]
    return [_load_argument(argument), *jumps, missing, found]


def _load_argument(place: int) -> bytes:
    return _statement(_LOAD, _ARGUMENTS + 8 * place)  # its lower half, as both are little-endian


def _statement(operation: int, operand: int) -> bytes:
    return struct.pack("<HBBI", operation, 0, 0, operand)


def _jump(operation: int, operand: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("<HBBI", operation, if_true, if_false, operand)


def _return(value: int) -> bytes:
    return _statement(_RETURN, value)
