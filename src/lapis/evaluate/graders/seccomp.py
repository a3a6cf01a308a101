"""The kernel's own lock: after `lock()` a process may compute, and read and write what it has open. Nothing else.

A seccomp filter (Linux, x86-64 and ARM64) that names the system calls which are allowed; any other one fails with
"Operation not permitted": opening files, sockets, starting programs or processes, signals to others.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

# Name: number on x86-64, number on ARM64 (None where it has no such call).
ALLOWED: dict[str, tuple[int, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sigaltstack": (131, 132),
    "time": (201, None),
    "futex": (202, 98),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "getrandom": (318, 278),
}
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_…, column of ALLOWED
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
KILL, REFUSE, ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # SECCOMP_RET_KILL_PROCESS, _ERRNO | EPERM, _ALLOW
NUMBER, MACHINE = 0, 4  # offsets in struct seccomp_data
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, FILTER_MODE = 1, 22, 38, 2


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def can_lock() -> bool:
    """Whether this system has the lock."""
    return sys.platform == "linux" and platform.machine() in MACHINES


def lock() -> None:
    """Give up every system call that is not in ALLOWED, for good. Raises OSError where the kernel refuses."""
    machine, column = MACHINES[platform.machine()]
    program = b"".join(struct.pack("=HBBI", *step) for step in _program(machine, column))
    steps = ctypes.create_string_buffer(program, len(program))
    _control(PR_SET_NO_NEW_PRIVS, 1)
    _control(PR_SET_SECCOMP, FILTER_MODE, ctypes.byref(_Program(len(program) // 8, ctypes.addressof(steps))))


def end_with_parent(signal: int) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    _control(PR_SET_PDEATHSIG, signal)


def _program(machine: int, column: int) -> list[tuple[int, int, int, int]]:
    steps = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, machine), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    for numbers in ALLOWED.values():
        if numbers[column] is not None:
            steps += [(EQUAL, 0, 1, numbers[column] or 0), (RETURN, 0, 0, ALLOW)]
    return [*steps, (RETURN, 0, 0, REFUSE)]


def _control(*arguments: object) -> None:
    call = ctypes.CDLL(None, use_errno=True).prctl
    rest = [argument if not isinstance(argument, int) else ctypes.c_ulong(argument) for argument in arguments]
    if call(*rest, *[ctypes.c_ulong(0)] * (5 - len(rest))) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
