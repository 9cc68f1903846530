#!/usr/bin/env bash
# OUT=... PYTHON=... run_reproduce.sh [--quick] [any override of conf/simulate.yaml]
set -xeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/reproduce_paper}
exec "$PYTHON" recipes/reproduce_paper/reproduce.py --out "$OUT" "$@"
