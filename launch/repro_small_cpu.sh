#!/usr/bin/env bash
# The reproduction's stages on an ordinary machine, with seeds: SFT, NPD and GRPO on 3-digit addition, and GRPO without NPD.
# In runs/small_cpu: a table and a page of all, and each run with its report. Killed, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
environment .venv requirements.txt
.venv/bin/npd sweep configs/sweep/small_cpu.yaml --jobs 2
