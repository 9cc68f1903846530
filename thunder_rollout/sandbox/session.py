"""The name of one life of one sandbox host, from which others can tell whether it is over.

It names the process by machine, boot, pid namespace, pid and start time, so a recycled pid is no
life, nor is what another boot of this machine left. Every sandbox bears it (a label, a part of a
command line, a cgroup's name), so that hosts of several machines can share one Docker engine.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from enum import Enum

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_MACHINE_ID = "/etc/machine-id"
_NO_MACHINE = "none"


class Life(Enum):
    GOING_ON = "going on"
    OVER = "over"
    UNKNOWN = "unknown"  # of another machine, another pid namespace, or not a name of ours


def new_session(pid: int | None = None) -> str:
    """Of the calling process, or of another on this machine."""
    pid = os.getpid() if pid is None else pid
    return "_".join([_machine(), *_here(), str(pid), _start_time(pid), secrets.token_hex(4)])


def life_of(session: str) -> Life:
    parts = session.split("_")
    if len(parts) != 6 or not parts[3].isdecimal():
        return Life.UNKNOWN
    machine, boot, namespace, pid, started, _ = parts
    if (boot, namespace) == _here():
        return Life.GOING_ON if _start_time(int(pid)) == started else Life.OVER
    is_of_an_earlier_boot = machine == _machine() != _NO_MACHINE and boot != _here()[0]
    return Life.OVER if is_of_an_earlier_boot else Life.UNKNOWN


def _machine() -> str:
    """Copies of one system image may have one id, so the name belongs to it."""
    try:
        with open(_MACHINE_ID) as file:
            machine = file.read().strip()
    except OSError:
        return _NO_MACHINE
    return hashlib.sha256(f"{machine} {socket.gethostname()}".encode()).hexdigest()[:8] if machine else _NO_MACHINE


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
