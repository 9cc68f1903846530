"""A process that owns an engine: `python -m tests.support.engine_owner MODEL_FOLDER`.

Prints the ids of all its descendants once the engine serves, then keeps it busy for ever.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

import psutil

from tests.support.engine_contract import CONFIG, new_prompt, run
from thunder_rollout.engine.vllm import VllmEngine


async def main() -> None:
    engine = VllmEngine(replace(CONFIG, model=sys.argv[1]))
    await engine.start()
    await run(engine, new_prompt(40))
    print("pids", *(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    while True:
        await asyncio.gather(*(run(engine, new_prompt(100), max_tokens=1000) for _ in range(4)))


if __name__ == "__main__":
    asyncio.run(main())
