#!/usr/bin/env bash
# A whole run on Ascend NPUs, in the environment of requirements-npu.txt (docs/ascend.md). It has not run on a card.
#   bash launch/npd_npu.sh CONFIG [key=value ...]      PYTHON: of that environment (default: python3)
# for example: bash launch/npd_npu.sh configs/addition_cpu.yaml parallel.dp=8 run.folder=runs/npu
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:?"name a configuration, for example configs/addition_cpu.yaml"}
shift
. launch/env_ascend.sh
npd=(${PYTHON:-python3} -m npd_ascend)
own=(device.kind=npu kernels.attention=npu kernels.layer=npu "$@")
"${npd[@]}" doctor --config "$config" "${own[@]}"
"${npd[@]}" plan --config "$config" "${own[@]}"
exec "${npd[@]}" run --config "$config" "${own[@]}"
