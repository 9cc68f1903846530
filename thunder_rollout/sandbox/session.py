"""The name of one life of one sandbox host, from which others can tell whether it is over.

It names the process by machine boot, pid namespace, pid and start time, so a recycled pid is no
life. Every sandbox bears it (a label, a part of a command line, a cgroup's name).
"""

from __future__ import annotations

import os
import secrets
from enum import Enum

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Life(Enum):
    GOING_ON = "going on"
    OVER = "over"
    UNKNOWN = "unknown"  # of another machine, another pid namespace, or not a name of ours


def new_session(pid: int | None = None) -> str:
    """Of the calling process, or of another on this machine."""
    pid = os.getpid() if pid is None else pid
    return "_".join([*_here(), str(pid), _start_time(pid), secrets.token_hex(4)])


def life_of(session: str) -> Life:
    parts = session.split("_")
    if len(parts) != 5 or tuple(parts[:2]) != _here() or not parts[2].isdecimal():
        return Life.UNKNOWN
    return Life.GOING_ON if _start_time(int(parts[2])) == parts[3] else Life.OVER


def _here() -> tuple[str, str]:
    with open(_BOOT_ID) as file:
        boot = file.read(8)
    return boot, str(os.stat("/proc/self/ns/pid").st_ino)


def _start_time(pid: int) -> str:
    """In clock ticks since boot; "" for a process that has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
