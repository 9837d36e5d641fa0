# make check: seconds, before every commit. make test: everything. make cpu: the demonstration.
bin := .venv-test/bin

.PHONY: check test cpu bench
check:
	$(bin)/ruff format --check . && $(bin)/ruff check . && $(bin)/mypy npd_ascend kernels/npd_kernels

test:
	bash launch/test.sh

cpu:
	bash launch/npd_cpu.sh

bench:
	$(bin)/python benchmarks/train_step.py
