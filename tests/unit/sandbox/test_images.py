from __future__ import annotations

from pathlib import Path

import pytest

from thunder_rollout.sandbox.images import AptSource, host_apt_source

ONE_LINE = "# a comment\ndeb [signed-by=/k.gpg] http://mirror.test/debian bookworm main\n"
STANZAS = """Types: deb
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://mirror.test/security
Suites: bookworm-security
"""


@pytest.mark.parametrize(("name", "text"), [("sources.list", ONE_LINE), ("sources.list.d/debian.sources", STANZAS)])
def test_the_hosts_own_archive_is_found_in_both_formats(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / name).write_text(text)
    release = tmp_path / "os-release"
    release.write_text('ID=debian\nVERSION_CODENAME="bookworm"\n')
    assert host_apt_source(tmp_path, release) == AptSource(uri="http://mirror.test/debian", suite="bookworm")


def test_another_distribution_has_none(tmp_path: Path) -> None:
    assert host_apt_source(tmp_path, tmp_path / "os-release") is None
