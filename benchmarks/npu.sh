#!/usr/bin/env bash
# What a 910B2 reaches of its 354 TFLOP/s in bfloat16, and the kernels beside their bounds; a JSON object a line.
#   bash benchmarks/npu.sh [--small] [--schedules] > npu-benchmarks.jsonl      PYTHON: of requirements-npu.txt
# --small: in sizes of a minute, to see that all of it runs. --schedules: also NPD against on-policy distillation by
# eight cards, and the seconds that new weights take; it wants the models and questions of
# configs/openpangu_1b_8npu.yaml, and has no small form.
# It has not run on a card. What it prints belongs into npd_ascend/planner/rates.py and benchmarks/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
schedules='' mfu=() kernels=()
for word in "$@"; do
  case $word in
    --small)
      mfu=(--model tiny --pack-tokens 1024 --steps 1)
      kernels=(--tokens 32 --vocabulary 1024 --pack-tokens 512 --rounds 1)
      ;;
    --schedules) schedules=1 ;;
    *)
      echo "benchmarks/npu.sh: $word is neither --small nor --schedules" >&2
      exit 2
      ;;
  esac
done
. launch/env_ascend.sh
python=${PYTHON:-python3} failed=''
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
# measure SCRIPT ARGUMENTS...      one line, which says what was asked; one that fails does not cost the others
measure() {
  local printed
  printed=$("$python" "benchmarks/$1.py" "${@:2}") || failed="${failed:+$failed; }$*"
  [ -z "$printed" ] || "$python" -c \
    'import json, sys; print(json.dumps({"asked": sys.argv[1:], "measured": json.load(sys.stdin)}))' "$@" <<< "$printed" ||
    failed="${failed:+$failed; }what $* printed"
}
# what a card holds without a second one to share the optimizer with
measure mfu --device npu --model 1B --pack-tokens 24576 --recompute selective "${mfu[@]}"
measure mfu --device npu --model 1B --pack-tokens 32768 --recompute full "${mfu[@]}"
measure mfu --device npu --model 1B --pack-tokens 16384 --recompute off "${mfu[@]}"
measure kernels --device npu "${kernels[@]}"
if [ -n "$schedules" ]; then
  measure schedules --config configs/openpangu_1b_8npu.yaml data.prompts.count=4096 \
    --on-policy npd.packs_per_step=1 --on-policy parallel.dp=4 --on-policy npd.pack_tokens=24576 \
    --on-policy rollout.weights=device --on-policy "processes={rollout: 3, teacher: 1, timeout_s: 3600}"
fi
if [ -n "$failed" ]; then
  echo "failed: $failed" >&2
  exit 1
fi
