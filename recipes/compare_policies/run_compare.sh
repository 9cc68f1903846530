#!/usr/bin/env bash
# OUT=... run_compare.sh [any override of conf/simulate.yaml]: the sweep on both engine profiles, then the table.
set -xeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BIN=${BIN:-.venv/bin}
OUT=${OUT:-runs/compare_policies}
LONG=mini_swe_agent,openhands,tool_orchestration,science_agent,grpo_groups,coding_assistant,mixed_sizes
SWEEP=("seeds=[0,1,2,3,4]" warmup_lives=1.5 "bounds=[infinite_kv]")
"$BIN"/thunder-rollout simulate "${SWEEP[@]}" out_dir="$OUT/cpu_tiny" "$@"
"$BIN"/thunder-rollout simulate "${SWEEP[@]}" sim_engine=h100x8_glm46_fp8 "workloads=[$LONG]" out_dir="$OUT/h100" "$@"
exec "$BIN"/python recipes/compare_policies/compare.py "$OUT"/*/sim.csv --out "$OUT/table.md"
