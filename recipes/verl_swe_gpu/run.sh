#!/usr/bin/env bash
# One run: CONFIG=sync (one node of 8 GPUs) or CONFIG=separate_async (2 nodes of 8). On a Ray cluster that runs
# (RAY_ADDRESS) or a private one on this machine.
set -xeuo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
CONFIG=${CONFIG:-sync}
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-Qwen/Qwen3-Coder-30B-A3B-Instruct}
DATA=${DATA:-$root/runs/verl_data}
LOOP=${LOOP:-$here/thunder_swe.yaml}
ROUTER=${ROUTER:-$root/conf/verl/thunder_router.yaml}
export VERL_LOGGING_LEVEL=${VERL_LOGGING_LEVEL:-WARN} # verl 0.9.1's separate_async logs with a bad keyword at INFO

exec "$PYTHON" -m verl.trainer.main_ppo --config-dir "$here" --config-name "$CONFIG" \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.rollout.agent.agent_loop_config_path="$LOOP" \
    actor_rollout_ref.rollout.router_config_path="$ROUTER" \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/validation.parquet" \
    "$@"
