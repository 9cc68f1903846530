"""Resolve cpu.in into lock-cpu.txt: `make lock`, or `make lock ARGS=--upgrade` to move every pin forward.

pip's own resolver decides, so what it accepts is consistent; then the distributions that a CPU
never loads are dropped, which is why the lock is installed with --no-deps.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
INPUT = FOLDER / "cpu.in"
LOCK = FOLDER / "lock-cpu.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DROPPED = ("torchvision", "torchaudio", "torchcodec", "triton")
DROPPED_PREFIXES = ("nvidia-", "cuda-")

HEADER = """\
# Every distribution of the CPU set-up, pinned. Made by `make lock` (requirements/lock.py) from cpu.in
# on Python {python} with pip {pip}; it holds for Python 3.11 and 3.12 on Linux x86_64.
# Install it with --no-deps (requirements/setup.sh does): dropped on purpose are the CUDA builds that
# vLLM's and verl's metadata ask for and a CPU never loads: {dropped}.
"""


def resolve(constraints: Path | None) -> dict[str, Any]:
    """pip's installation report; the CPU build of torch may need PyTorch's own index."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command = [*pip, "--report", str(report), "--requirement", str(INPUT)]
        if constraints is not None:
            command += ["--constraint", str(constraints)]
        if subprocess.run(command, check=False).returncode != 0:
            subprocess.run([*command, "--extra-index-url", TORCH_CPU_INDEX], check=True)
        return json.loads(report.read_text())


def pins(report: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The pins to keep, and the names dropped, both sorted without regard to case."""
    kept, dropped = [], []
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name in DROPPED or name.startswith(DROPPED_PREFIXES):
            dropped.append(name)
        else:
            kept.append(f"{name}=={version}")
    return sorted(kept, key=str.lower), sorted(dropped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="forget the present pins; cpu.in alone binds")
    upgrade = parser.parse_args().upgrade
    report = resolve(None if upgrade or not LOCK.exists() else LOCK)
    kept, dropped = pins(report)
    header = HEADER.format(python=platform.python_version(), pip=report["pip_version"], dropped=", ".join(dropped))
    LOCK.write_text(header + "\n".join(kept) + "\n")
    print(f"{LOCK.relative_to(FOLDER.parent)}: {len(kept)} pins")


if __name__ == "__main__":
    main()
