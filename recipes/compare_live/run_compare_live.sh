#!/usr/bin/env bash
# run_compare_live.sh [any override of conf/bench.yaml]: `make bench-full`, and what it leaves copied beside this script.
set -xeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BIN=${BIN:-.venv/bin}
RUNS=${RUNS:-runs}
"$BIN"/thunder-rollout bench plan=full "runs_dir=$RUNS" "$@"
cp "$RUNS"/bench_full/{report.md,bench.csv,ratios.png,short_tools-qwen2_3m-load.png,short_tools-qwen2_3m-cost.png} recipes/compare_live/
