#!/usr/bin/env bash
# The numeric tests on a card, and a file with what they measured, to be sent back.
#   bash tests/npu/run.sh [pytest arguments]      PYTHON: of the environment of requirements-npu.txt (default: python3)
set -uo pipefail
cd "$(dirname "$0")/../.."
. launch/env_ascend.sh || exit 2
export NPD_NPU_RESULTS=${NPD_NPU_RESULTS:-npu-results-$(date +%Y%m%d-%H%M%S).json}
"${PYTHON:-python3}" -m pytest --confcutdir=tests/npu -p no:cacheprovider tests/npu "$@"
code=$?
[ -e "$NPD_NPU_RESULTS" ] && echo "send back: $NPD_NPU_RESULTS"
exit $code
