"""A tiny source distribution with tests, made on the spot."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

FILES = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.5\n",
    "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--no-such-option'\n",
    "setup.py": "def late(x):\n    return x < 1\n",
    "src/tiny/__init__.py": '"""Tiny."""\n',
    "src/tiny/numbers.py": (
        '"""Numbers."""\n\n\n'
        "def clamp(value, low, high):\n"
        '    """Between low and high."""\n'
        "    if value < low:\n"
        "        return low\n"
        "    if value > high:\n"
        "        return high\n"
        "    return value\n\n\n"
        "def mean(values):\n"
        "    total = 0\n"
        "    for value in values:\n"
        "        total += value\n"
        "    return total / len(values)\n"
    ),
    "tests/test_numbers.py": (
        "import random\n\nimport pytest\n\nfrom importlib.metadata import version\n\n"
        "from tiny.numbers import clamp, mean\n\n\n"
        "@pytest.mark.parametrize(('value', 'wanted'), [(0, 1), (2, 2), (9, 3)])\n"
        "def test_clamp(value, wanted):\n    assert clamp(value, 1, 3) == wanted\n\n\n"
        "class TestMean:\n    def test_of_three(self):\n        assert mean([1, 2, 6]) == 3\n\n"
        "    def test_of_one(self):\n        assert mean([4]) == 4\n\n\n"
        "def test_version():\n    assert version('tiny') == '1.5'\n\n\n"
        "def test_broken():\n    assert False\n"
    ),
    "tests/test_other.py": "def test_nothing():\n    pass\n",
}


def write_distribution(folder: Path) -> Path:
    path = folder / "tiny-1.5.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in FILES.items():
            entry = tarfile.TarInfo(f"tiny-1.5/{name}")
            entry.size, entry.mtime = len(text.encode()), 1_700_000_000
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path
