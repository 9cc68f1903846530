"""Which verl this package is made for and tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from thunder_rollout.errors import UserError

TESTED_VERSIONS = ("0.9.1",)


class UnsupportedVerl(UserError):
    """The installed verl is not one that this package was tested with."""


def require_tested_verl() -> None:
    """Raises `UnsupportedVerl` that names the installed version and those that will do."""
    try:
        installed = version("verl")
    except PackageNotFoundError:
        installed = None
    if installed not in TESTED_VERSIONS:
        wanted = ", ".join(TESTED_VERSIONS)
        found = f"verl {installed} is installed" if installed else "verl is not installed"
        raise UnsupportedVerl(
            f"{found}: thunder_rollout.verl_adapter is tested with {wanted}; pip install verl=={TESTED_VERSIONS[-1]}"
        )
