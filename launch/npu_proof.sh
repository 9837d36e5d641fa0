#!/usr/bin/env bash
# What can be shown of the NPU path without an NPU: interfaces, shapes, autograd and compilers, no numbers and no times.
#   bash launch/npu_proof.sh [--row]
# --row: with the torch and torch-npu of requirements-npu.txt, whose torch is several GB on x86_64, in the place of newer
# ones of which PyPI has a small build.
# torch_npu and vllm-ascend are the real wheels, in environments of their own; CANN and HCCL are stubs, tensors are fake.
set -euo pipefail
cd "$(dirname "$0")/.."
case "$*" in
  '') ;;
  --row)
    [ "$(uname)" = Linux ] || {
      echo "--row: torch-npu has wheels for Linux only, this is $(uname)" >&2
      exit 2
    }
    ;;
  *)
    echo "usage: bash launch/npu_proof.sh [--row]" >&2  # not the other environment for a mistyped --row
    exit 2
    ;;
esac
log=$(mktemp) of_row=$(mktemp) table='' failed=''
trap 'rm -f "$log" "$of_row"' EXIT
. launch/env.sh
environment .venv-ascend requirements-ascend-check.txt
check=.venv-npu-check requirements=requirements-npu-check.txt
if [ "${1:-}" = --row ]; then
  check=.venv-npu-row requirements=$of_row
  grep -E '^(torch|numpy|safetensors|pydantic|PyYAML|pytest)==' requirements-npu.txt > "$requirements"
fi
environment "$check" "$requirements"
row_npu=$(grep -o '^torch-npu==[0-9a-z.]*' requirements-npu.txt)
if [ "$check" = .venv-npu-row ]; then  # it asks for a build of torch that PyPI lacks on x86_64
  "$check/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile "$row_npu"
fi
# its weight transfer alone is loaded, without the torch and the vLLM that it asks for
"$check/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  "$(grep -o '^vllm-ascend==[0-9.]*' requirements-npu.txt)" ||
  echo "no wheel of vllm-ascend for this machine: tests/ascend_wheel/test_hccl_transfer.py is left out"
# and the torch-npu of the row beside the newer one, to read what its operators take
"$check/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade \
  --target "$check/row" "$row_npu"

# shown WHAT ENVIRONMENT FOLDER TESTS...      a line of the table, and everything that was said if it fails
shown() {
  local what=$1 python=$2/bin/python folder=$3 result
  shift 3
  if "$python" -m pytest -q --confcutdir="$folder" "$@" > "$log" 2>&1; then
    result=$(tail -n 1 "$log")
  else
    cat "$log"
    failed=1 result="FAILED: $(tail -n 1 "$log")"
  fi
  table+=$(printf '%-68s %s' "$what" "$result")$'\n'
}
wheel=tests/ascend_wheel
shown "every call of torch_npu fits its schema; planted mistakes do not" "$check" $wheel $wheel/test_schemas.py
shown "device, collectives and switches through torch_npu on a stub of CANN" "$check" $wheel $wheel/test_device.py
shown "whole steps of openPangu-1B on fake NPU tensors, torch_npu's autograd" "$check" $wheel \
  $wheel/test_trace.py $wheel/test_memory.py
shown "weights to vllm-ascend's worker and hccl engine, HCCL a stub" "$check" $wheel \
  $wheel/test_hccl_transfer.py $wheel/test_worker.py
shown "Triton kernels lowered for 910B1 and 910B3, up to the step of CANN" .venv-ascend tests/ascend tests/ascend
"$check/bin/python" $wheel/step_report.py
printf '\n%s\nNothing of this ran on an NPU.\n' "$table"
[ -z "$failed" ]
