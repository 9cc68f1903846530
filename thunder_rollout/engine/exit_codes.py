"""What the exit code of one of an engine's processes tells of its end."""

from __future__ import annotations

import signal

_FROM_OUTSIDE = (0, -signal.SIGTERM, -signal.SIGKILL)  # SIGKILL is also the kernel's, for want of memory


def ended_from_outside(code: int | None) -> bool:
    """It did not fail at its work: a signal ended it that only comes from outside. None: it ended without a code."""
    return code in _FROM_OUTSIDE
