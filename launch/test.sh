#!/usr/bin/env bash
# Every check and every test, the slow ones included, in environments of their own.
#   bash launch/test.sh [pytest arguments]      with arguments: without compiling for devices
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
environment .venv-test requirements.txt requirements-dev.txt
bin=.venv-test/bin
$bin/ruff format --check .
$bin/ruff check .
$bin/mypy npd_ascend kernels/npd_kernels
NPD_SLOW=1 $bin/python -m pytest "$@"
if [ $# = 0 ]; then
  $bin/python -m pytest --confcutdir=tests/cuda tests/cuda
  environment .venv-ascend requirements-ascend-check.txt
  .venv-ascend/bin/python -m pytest --confcutdir=tests/ascend tests/ascend
  environment .venv-npu-check requirements-npu-check.txt
  .venv-npu-check/bin/python -m pytest --confcutdir=tests/ascend_wheel tests/ascend_wheel
fi
