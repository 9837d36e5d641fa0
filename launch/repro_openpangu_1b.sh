#!/usr/bin/env bash
# The stages of openPangu-Embedded-1B's reproduction on one node of 8 Ascend NPUs, one after the other.
#   bash launch/repro_openpangu_1b.sh [--dry-run]
# SFT, NPD, GRPO; then the eleven benchmarks, which want requirements-eval.txt and one more permission, to run the code
# that MBPP and HumanEval get as answers:
#   npd eval --benchmarks configs/repro/openpangu_1b/eval.yaml model.path=runs/openpangu_1b_grpo/student "run_code_of=[mbpp, humaneval]"
# Models and data where configs/repro/openpangu_1b/*.yaml say; killed, the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
for stage in sft npd grpo; do
  echo "== $stage"
  NPD_CONFIG=configs/repro/openpangu_1b/$stage.yaml bash launch/npd_8npu.sh "$@"
done
