"""The file system and namespaces of a local sandbox, as shell scripts for util-linux.

Two stages, the first `exec`ing the second. *Build* runs in a mount namespace of its own and makes
the new root: a tmpfs of limited size with read-only binds of the host's programs and interpreter.
*Enter* runs as PID 1 of fresh user, mount, pid, network, ipc, uts and cgroup namespaces, swaps
the roots (so that the host's is gone, not hidden), drops capabilities and becomes `INIT_SCRIPT`.

Under root, the sandbox's root is the unprivileged host user `SANDBOX_UID`; otherwise it is the
user himself. Either way nothing inside has power over anything outside.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
import tarfile
from pathlib import Path
from shlex import quote

from thunder_rollout.sandbox.gitdiff import SCRATCH
from thunder_rollout.sandbox.installed import installed_copies
from thunder_rollout.sandbox.protocol import SandboxLimits
from thunder_rollout.sandbox.shell import INIT_SCRIPT
from thunder_rollout.sandbox.variables import common_variables

SANDBOX_UID = 64_931  # outside Debian's ranges for users and for systemd's dynamic users
SCRATCH_BYTES = 256 * 1024**2
TOOLS = ("bash", "unshare", "nsenter", "setpriv", "mount", "umount", "pivot_root", "git", "tar")

# The mount point of the new root until the roots are swapped. Any folder that surely exists and
# holds no program will do: inside a private mount namespace nobody else sees it covered.
_STAGE = "/sys"
_OWN_PACKAGE = Path(__file__).resolve().parents[1]
_PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "mime.types", "localtime")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_FOLDERS = ("dev/shm", "etc", "home", "proc", "root", "run", "testbed", "tmp", "var/tmp", SCRATCH.lstrip("/"))
_TABLE = f"{SCRATCH}/mounts"
_SHARED_FOLDERS = ("tmp", "var/tmp", "dev/shm")
_TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost sandbox\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
_LINKS = {"dev/fd": "/proc/self/fd", "dev/stdin": "fd/0", "dev/stdout": "fd/1", "dev/stderr": "fd/2"}

_LOOPBACK_UP = (
    "import fcntl,socket,struct;socket.sethostname('sandbox');"
    "fcntl.ioctl(socket.socket(),0x8914,struct.pack('16sh14x',b'lo',0x41))"
)
_DROP_CAPABILITIES = (
    "setpriv",
    "--bounding-set=-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid",
    "--inh-caps=-all",
    "--no-new-privs",
    "--",
)
_BECOME_SANDBOX_USER = ("setpriv", f"--reuid={SANDBOX_UID}", f"--regid={SANDBOX_UID}", "--clear-groups", "--")
_NAMESPACES = ("--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup")

# bash would read ~/.bashrc where its stdin is a socket, as it is under uvloop.
_BASH = ("bash", "--norc", "-c")

# $1 = files to write the process id to, colon separated; then a command.
_PLACE = 'IFS=:; for procs in $1; do echo $$ > "$procs"; done; shift; exec "$@"'


def open_skeleton(hidden_modules: tuple[str, ...] = ()) -> int:
    """What a new root holds before anything is mounted, as a tar archive in memory; a file descriptor to close.
    Of `hidden_modules` no installed copy is seen."""
    descriptor = os.memfd_create("thunder-skeleton")
    os.write(descriptor, _skeleton(_owner(), hidden_modules))
    return descriptor


def start_argv(limits: SandboxLimits, *, skeleton: int, procs_files: list[str], marker: str) -> list[str]:
    """The command that becomes a sandbox. It prints "ready <host pid of PID 1>", then reads
    `INIT_SCRIPT`'s commands from stdin. It inherits `skeleton` (see `open_skeleton`) under the same number;
    `marker` stands in the command lines, for the reaper."""
    root = os.geteuid() == 0
    unshare = ["unshare", *_NAMESPACES, "--fork", "--kill-child"]
    enter = [*unshare, "--", *_BASH, _enter_script(marker, math.ceil(limits.ttl_s)), marker]
    if root:
        enter = [*_BECOME_SANDBOX_USER, "unshare", "--user", "--map-root-user", *enter[1:]]
    build = f"{_build_script(limits, skeleton)}\nexec {' '.join(quote(part) for part in enter)}\n"
    outer = ["unshare", "--mount", "--propagation=private"]
    if not root:
        outer += ["--user", "--map-root-user"]
    shield = [*_BASH, 'echo -900 > /proc/self/oom_score_adj; exec "$@"', marker] if root else []
    return _placed(procs_files, [*shield, *outer, "--", *_BASH, build, marker])


def exec_argv(init_pid: int, script: str, *, procs_files: list[str]) -> list[str]:
    """The command that runs `script` inside, as the sandbox's root and without capabilities."""
    nsenter = ["nsenter", f"--target={init_pid}", "--preserve-credentials", "--user", *_NAMESPACES, "--"]
    if os.geteuid() == 0:
        nsenter = [*_BECOME_SANDBOX_USER, *nsenter]
    return _placed(procs_files, [*nsenter, *_DROP_CAPABILITIES, *_BASH, script])


def inner_env(limits: SandboxLimits) -> dict[str, str]:
    """What every command sees: the interpreter first."""
    path = dict.fromkeys([f"{sys.prefix}/bin", "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"])
    return common_variables(limits) | {"PATH": ":".join(path), "HOME": "/root", "LANG": "C.UTF-8"}


def missing_tools() -> list[str]:
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return [tool for tool in TOOLS if shutil.which(tool, path=path) is None]


def _placed(procs_files: list[str], argv: list[str]) -> list[str]:
    return [*_BASH, _PLACE, "thunder-place", ":".join(procs_files), *argv] if procs_files else argv


def _build_script(limits: SandboxLimits, skeleton: int) -> str:
    disk_bytes = min(limits.disk_bytes, limits.memory_bytes // 2)
    return f"""
set -eu
mount -t tmpfs -o size={disk_bytes},nr_inodes={max(4096, disk_bytes // 4096)},mode=755 thunder {_STAGE}
tar -x -p --numeric-owner -f /proc/self/fd/{skeleton} -C {_STAGE}
exec {skeleton}<&-
mount --all --fstab {_STAGE}{_TABLE}
cd {_STAGE}
"""


def _skeleton(owner: int, hidden_modules: tuple[str, ...]) -> bytes:
    """The folders, files and links of a new root, with the table of its mounts; `owner` is the sandbox's root."""
    binds = _binds()
    table = _mount_table(owner, binds, [*_own_package(binds), *installed_copies(hidden_modules, tuple(binds))])
    links = {path.lstrip("/"): os.readlink(path) for path in _PROGRAMS if os.path.islink(path)} | _LINKS
    folders = [*_FOLDERS, *(str(path).lstrip("/") for path in binds if path.is_dir())]
    files = [str(path).lstrip("/") for path in binds if not path.is_dir()] + [f"dev/{name}" for name in _DEVICES]
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, kind: bytes, mode: int, *, text: str = "", link: str = "") -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.uid, entry.gid, entry.linkname = kind, mode, owner, owner, link
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))

        parents = [
            str(parent) for name in (*folders, *files, *_TEXTS, *links) for parent in reversed(Path(name).parents)
        ]
        for name in dict.fromkeys([*parents, *folders]):
            add(name, tarfile.DIRTYPE, 0o1777 if name in _SHARED_FOLDERS else 0o755)
        for name in files:
            add(name, tarfile.REGTYPE, 0o644)
        for name, text in (_TEXTS | {_TABLE.lstrip("/"): table}).items():
            add(name, tarfile.REGTYPE, 0o644, text=text)
        for name, link in links.items():
            add(name, tarfile.SYMTYPE, 0o777, link=link)
    return target.getvalue()


def _mount_table(owner: int, binds: list[Path], hidden: list[Path]) -> str:
    """What is mounted over the skeleton, as fstab(5) has it; the scratch folder goes over the table itself."""
    scratch = f"size={SCRATCH_BYTES},mode=700,uid={owner},gid={owner}"
    lines = [
        ("thunder", SCRATCH, "tmpfs", scratch),
        *((str(path), str(path), "none", _bind_options(path)) for path in binds),
        *(("thunder", str(path), "tmpfs", "ro,size=4k,mode=555") for path in hidden if path.is_dir()),
        *(("/dev/null", str(path), "none", "bind") for path in hidden if not path.is_dir()),
        *((f"/dev/{name}", f"/dev/{name}", "none", "bind") for name in _DEVICES),
    ]
    return "".join(
        f"{_in_table(source)} {_in_table(_STAGE + target)} {kind} {options} 0 0\n"
        for source, target, kind, options in lines
    )


def _in_table(text: str) -> str:
    return "".join(f"\\{ord(character):03o}" if character in " \t\n\\#" else character for character in text)


def _owner() -> int:
    return SANDBOX_UID if os.geteuid() == 0 else 0


def _binds() -> list[Path]:
    """What of the host is seen, outermost first."""
    programs = [Path(path) for path in _PROGRAMS if os.path.isdir(path) and not os.path.islink(path)]
    return [*programs, *_interpreter_folders(), *(path for name in _ETC if (path := Path("/etc", name)).exists())]


def _enter_script(marker: str, ttl_s: int) -> str:
    python = quote(sys.executable)
    drop = " ".join(_DROP_CAPABILITIES)
    return f"""
set -eu
read -r host_pid _ < /proc/self/stat
mount --rbind {_STAGE} {_STAGE}
cd {_STAGE}
mount -t proc -o nosuid,nodev,noexec proc proc
mkdir .host
pivot_root . .host
cd /
umount -l /.host
rmdir /.host
{python} -I -S -c {quote(_LOOPBACK_UP)}
echo "ready $host_pid"
exec > /dev/null 2>&1
exec {drop} bash --norc -c {quote(INIT_SCRIPT)} {quote(marker)} {ttl_s}
"""


def _interpreter_folders() -> list[Path]:
    """Where our Python and its packages live, outermost first; nothing that `_PROGRAMS` shows."""
    candidates = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1]}
    hidden = sorted(path for path in candidates if path.parts[1:2] not in {("usr",), ()})
    return [path for path in hidden if not any(other != path and path.is_relative_to(other) for other in hidden)]


def _own_package(binds: list[Path]) -> list[Path]:
    """This package, where it is installed beside the interpreter: it can make the toy tasks' answers."""
    return [_OWN_PACKAGE] if any(_OWN_PACKAGE.is_relative_to(path) for path in binds) else []


def _bind_options(path: Path) -> str:
    # A remount in a user namespace must repeat the flags that the host has locked.
    noexec = ",noexec" if os.statvfs(path).f_flag & os.ST_NOEXEC else ""
    return f"bind,ro,nosuid,nodev{noexec}"
