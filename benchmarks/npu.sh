#!/usr/bin/env bash
# What a 910B2 reaches of its 354 TFLOP/s in bfloat16, and the kernels beside their bounds; a JSON object a line.
#   bash benchmarks/npu.sh [--schedules] > npu-benchmarks.jsonl      PYTHON: of the environment of requirements-npu.txt
# --schedules: also NPD against on-policy distillation by eight cards, and the seconds that new weights take; it wants
# the models and questions of configs/openpangu_1b_8npu.yaml.
# It has not run on a card. What it prints belongs into npd_ascend/planner/rates.py and benchmarks/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env_ascend.sh
python=${PYTHON:-python3}
# measure SCRIPT ARGUMENTS...      one line, which says what was asked
measure() {
  "$python" "benchmarks/$1.py" "${@:2}" | "$python" -c \
    'import json, sys; print(json.dumps({"asked": sys.argv[1:], "measured": json.load(sys.stdin)}))' "$@"
}
for recompute in selective full; do
  measure mfu --device npu --model 1B --pack-tokens 32768 --recompute $recompute
done
# a pack that needs no recomputation
measure mfu --device npu --model 1B --pack-tokens 16384 --recompute off
measure kernels --device npu
if [ "${1:-}" = --schedules ]; then
  measure schedules --config configs/openpangu_1b_8npu.yaml data.prompts.count=4096 \
    --on-policy npd.packs_per_step=1 --on-policy parallel.dp=4 --on-policy rollout.weights=device \
    --on-policy "processes={rollout: 3, teacher: 1, timeout_s: 3600}"
fi
