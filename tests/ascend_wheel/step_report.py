"""One training step of openPangu-1B as rank 0 of two: what is called, what waits, and the memory that it takes.

python tests/ascend_wheel/step_report.py            in the environment of requirements-npu-check.txt
"""

import textwrap

from wheel import open_wheel

PACK = [1024] * 32


def main() -> None:
    open_wheel()
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from tracing import PANGU_1B, planned_step, traced_step

    from npd_ascend.parallel.mesh import Mesh

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = Mesh(tp=2, sequence_parallel=True, tp_group=dist.group.WORLD)
    watch, peak, batch = traced_step(PANGU_1B, PACK, "selective", mesh)
    dist.destroy_process_group()  # the planner has a silent one of its own
    planned = planned_step(PANGU_1B, PACK, "selective", 2, batch)
    print(f"openPangu-1B, tp 2 with sequence parallelism, {sum(PACK):,} tokens: forward, backward, clip, AdamW")
    own = {name: count for name, count in watch.operators.items() if name.startswith(("npu::", "c10d::"))}
    for name, count in sorted(own.items(), key=lambda item: -item[1]):
        print(f"  {name:<44}{count:>6}")
    rest = {name.removeprefix("aten::"): n for name, n in watch.operators.items() if name.startswith("aten::")}
    line = "of torch itself: " + ", ".join(f"{name} {rest[name]}" for name in sorted(rest))
    print(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    "))
    print(f"  {'waits of the host for the device in the step':<44}{len(watch.waits):>6}")
    gib = [f"{size / 2**30:.1f}" for size in (peak, planned)]
    print(f"  peak of the step {gib[0]} GiB as traced, {gib[1]} GiB as planned, without workspace and buffers of HCCL")


if __name__ == "__main__":
    main()
