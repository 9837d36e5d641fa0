# make check: seconds, before every commit. make test: everything. make cpu: the demonstration. make npu-proof: the NPU path
# without an NPU.
bin := .venv-test/bin

.PHONY: check test cpu bench npu-proof
check:
	$(bin)/ruff format --check . && $(bin)/ruff check . && $(bin)/mypy npd_ascend kernels/npd_kernels

test:
	bash launch/test.sh

cpu:
	bash launch/npd_cpu.sh

npu-proof:
	bash launch/npu_proof.sh

bench:
	$(bin)/python benchmarks/train_step.py
