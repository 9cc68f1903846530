"""A driver with a Ray cluster and a vLLM engine: `python -m tests.support.engine_driver MODEL_FOLDER`.

Prints the ids of all its descendants, Ray's and vLLM's, once the engine serves, then keeps it busy
for ever. Ray's own agents are left out: they hold nothing and take their time to notice.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

import psutil
import ray

from tests.support.engine_contract import CONFIG, new_prompt, run
from thunder_rollout.engine.actor import create_engine_actor
from thunder_rollout.engine.remote import RemoteEngine


async def main() -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=128 * 1024**2)
    engine = RemoteEngine(create_engine_actor(replace(CONFIG, model=sys.argv[1]), name="engine0"))
    await engine.start()
    await run(engine, new_prompt(40))
    children = psutil.Process().children(recursive=True)
    print("pids", *(child.pid for child in children if "Agent" not in " ".join(child.cmdline())), flush=True)
    while True:
        await asyncio.gather(*(run(engine, new_prompt(100), max_tokens=1000) for _ in range(4)))


if __name__ == "__main__":
    asyncio.run(main())
