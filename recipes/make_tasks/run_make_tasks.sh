#!/usr/bin/env bash
# OUT=... run_make_tasks.sh [any override of conf/make_tasks.yaml]: tasks out of three packages.
set -xeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
BIN=${BIN:-.venv/bin}
OUT=${OUT:-runs/tasks}
PACKAGES=${PACKAGES:-"toolz=1.0.0 parse=1.20.2 inflection=0.5.1"}
for package in $PACKAGES; do
  name=${package%%=*} version=${package##*=}
  "$BIN"/thunder-rollout make-tasks package="$name" version="$version" count=25 out="$OUT/$name-$version.jsonl" "$@"
done
