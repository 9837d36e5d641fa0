#!/usr/bin/env bash
# The stages of openPangu-Embedded-1B's reproduction on one node of 8 Ascend NPUs, one after the other.
#   bash launch/repro_openpangu_1b.sh [--dry-run]
# Models and data where configs/repro/openpangu_1b/*.yaml say; killed, the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
for stage in sft npd; do
  echo "== $stage"
  NPD_CONFIG=configs/repro/openpangu_1b/$stage.yaml bash launch/npd_8npu.sh "$@"
done
