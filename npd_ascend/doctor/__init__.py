"""`npd doctor`: what a run would need of this machine, looked at one thing after another.

finding: what a check says.   device: driver, CANN and NPUs.   versions: the row of requirements*.txt.
compute: products and attention against float64.   collectives: sums over the planned groups of ranks.
host: disk, ports, clocks, vLLM.   command: all of them as one table.
"""
