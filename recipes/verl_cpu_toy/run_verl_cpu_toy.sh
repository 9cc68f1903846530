#!/usr/bin/env bash
# GRPO on toy tasks with verl's trainer on two cores: the starting policy (once), the tasks, the training.
# CONFIG=sync or CONFIG=separate_async (a trainer and a rollout of their own).
# Further arguments are verl's overrides: run_verl_cpu_toy.sh trainer.total_training_steps=10
set -xeuo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
PYTHON=${PYTHON:-$root/.venv/bin/python}
CONFIG=${CONFIG:-sync}
SEED=${SEED:-0}
RUN=${RUN:-$root/runs/verl_cpu_toy/seed$SEED}
POLICY=${POLICY:-$here/policy.yaml}
DIFFICULTY=${DIFFICULTY:-easy}
NUM_TRAIN=${NUM_TRAIN:-2048}
NUM_VALIDATION=${NUM_VALIDATION:-256}
mkdir -p "$RUN"
RUN=$(cd "$RUN" && pwd)
DATA=${DATA:-$RUN/data}

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HYDRA_FULL_ERROR=1
export VERL_LOGGING_LEVEL=${VERL_LOGGING_LEVEL:-WARN} # verl 0.9.1's separate_async logs with a bad keyword at INFO
export VERL_FILE_LOGGER_PATH=${VERL_FILE_LOGGER_PATH:-$RUN/metrics.jsonl}

model=$("$PYTHON" "$root/recipes/tiny_policy/train.py" --config "$POLICY" --keep-current | tee /dev/stderr | tail -n 1)
to_verl() { "$PYTHON" -m thunder_rollout.cli tasks to-verl out="$DATA" task.difficulty="$DIFFICULTY" "$@"; }
to_verl task.seed=1 task.count="$NUM_TRAIN" validation_share=0
to_verl task.seed=2 task.count="$NUM_VALIDATION" validation_share=1

cd "$RUN"
SECONDS=0
"$PYTHON" -m verl.trainer.main_ppo --config-path="$here" --config-name="$CONFIG" \
    actor_rollout_ref.model.path="$model" \
    data.seed="$SEED" data.train_files="$DATA/train.parquet" data.val_files="$DATA/validation.parquet" \
    actor_rollout_ref.rollout.router_config_path="$root/conf/verl/thunder_router.yaml" \
    actor_rollout_ref.rollout.agent.agent_loop_config_path="$here/thunder_swe.yaml" \
    "$@"
printf 'trained in %d s\n' "$SECONDS" | tee took.txt
