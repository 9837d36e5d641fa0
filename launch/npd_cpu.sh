#!/usr/bin/env bash
# Near-Policy Distillation end to end on this machine: 3-digit addition, a 0.81M teacher, a student of half its layers.
#   bash launch/npd_cpu.sh [key=value ...]     for example: run.seed=3 run.folder=runs/seed3
# Killed or interrupted, the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
environment .venv requirements.txt
exec .venv/bin/npd run --config configs/addition_cpu.yaml "$@"
