#!/usr/bin/env bash
# The reproduction's stages on an ordinary machine, with seeds: SFT, NPD and GRPO on two tasks of reasoning-gym, and GRPO
# without NPD.
# In runs/small_cpu: a table and a page of all, and each run with its report. Killed, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
environment .venv-rewards requirements.txt requirements-rewards.txt
.venv-rewards/bin/npd sweep configs/sweep/small_cpu.yaml --jobs 2
