"""The sandboxes of programs that wait for the model: how little each takes up meanwhile.

With `when_paused=auto` the node's pressure decides, when a program begins to wait and again every
`LOOK_EVERY_S`: who has waited longest gives up first, and no more do than the pressure asks for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from thunder_rollout.errors import SandboxFailed
from thunder_rollout.sandbox.pressure import Pressure, read_pressure, rest_under
from thunder_rollout.sandbox.protocol import HostedSandbox, Rest

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
_PATIENCE_S = 10.0  # with one of them, before the next


class RestingSandboxes:
    """`when_paused` is `SandboxConfig`'s. A sandbox that fails here is left to its program, which finds out, and
    the others rest on."""

    def __init__(
        self,
        when_paused: str,
        *,
        pressure: Callable[[], Pressure] = read_pressure,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._fixed = None if when_paused == "auto" else Rest[when_paused.upper()]
        self._pressure = pressure
        self._look_every_s = look_every_s
        self._waiting: dict[str, HostedSandbox] = {}  # by program, in the order in which they began to wait

    async def rest(self, program: str, sandbox: HostedSandbox) -> Rest:
        """How deep a rest it came to."""
        self._waiting.setdefault(program, sandbox)
        return await self._deepen(program, sandbox)

    async def wake(self, program: str) -> float | None:
        """The seconds it took; None if it was at work. Raises `SandboxFailed`."""
        sandbox = self._waiting.pop(program, None)
        if sandbox is None:
            return None
        began_s = time.monotonic()
        await sandbox.rest(Rest.KEEP)
        return time.monotonic() - began_s

    def forget(self, program: str) -> None:
        """It is at work again, or gone."""
        self._waiting.pop(program, None)

    async def run(self) -> None:
        """Follow the pressure, until cancelled."""
        while self._fixed is None:
            await asyncio.sleep(self._look_every_s)
            for program, sandbox in list(self._waiting.items()):
                if program in self._waiting:
                    await self._deepen(program, sandbox)

    async def _deepen(self, program: str, sandbox: HostedSandbox) -> Rest:
        try:
            how = rest_under(self._pressure()) if self._fixed is None else self._fixed
            if how is Rest.KEEP:
                return how
            async with asyncio.timeout(_PATIENCE_S):
                return await sandbox.rest(how)
        except TimeoutError:
            logger.info("program=%s: its sandbox is busy and does not rest", program)
        except OSError as error:  # of the machine or the engine: both may be well again at the next look
            logger.warning("program=%s: its sandbox does not rest now: %s: %s", program, type(error).__name__, error)
        except SandboxFailed as error:
            logger.info("program=%s: its sandbox can't rest: %s", program, error)
            self.forget(program)
        return Rest.KEEP
