"""One training step of openPangu-1B as rank 0 of two: what is called, what waits, what memory it is planned to take.

python tests/ascend_wheel/step_report.py            in the environment of requirements-npu-check.txt
"""

from wheel import open_wheel

PACK = [1024] * 32


def main() -> None:
    open_wheel()
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from tracing import PANGU_1B, fake_batch, fake_decoder, objective, tracing

    from npd_ascend.config import KernelConfig, OptimizerConfig
    from npd_ascend.parallel.mesh import Mesh
    from npd_ascend.planner.fused import countable
    from npd_ascend.planner.memory import Layout, trainer_memory
    from npd_ascend.trainer.optimizer import MasterAdamW
    from npd_ascend.trainer.step import train_step

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = Mesh(tp=2, sequence_parallel=True, tp_group=dist.group.WORLD)
    with tracing() as watch:
        model = fake_decoder(PANGU_1B, "selective", mesh)
        optimizer = MasterAdamW(model, OptimizerConfig(), mesh)
        watch.waits.clear()
        batch = fake_batch(PACK, 10, mesh)
        train_step(model, [batch], optimizer, objective(), weight_sum=1.0, lr=1e-5, mesh=mesh)
    dist.destroy_process_group()  # the planner has a silent one of its own
    layout = Layout(tp=2, dp=1, sequence_parallel=True, recompute="selective", pack_tokens=sum(PACK))
    with countable(KernelConfig(attention="npu", layer="npu")) as kernels:
        memory = trainer_memory(
            "distill",
            PANGU_1B,
            layout,
            torch.bfloat16,
            device="npu",
            answer_tokens=len(batch.layout.answer_ids_A),
            kernels=kernels,
            group_bytes=2 * 256 * 10**6,
        )
    print(f"openPangu-1B, tp 2 with sequence parallelism, {sum(PACK):,} tokens: forward, backward, clip, AdamW")
    own = {name: count for name, count in watch.operators.items() if name.startswith(("npu::", "c10d::"))}
    for name, count in sorted(own.items(), key=lambda item: -item[1]):
        print(f"  {name:<44}{count:>6}")
    print(f"  {'of torch itself, kinds':<44}{len(watch.operators) - len(own):>6}")
    print(f"  {'waits of the host for the device in the step':<44}{len(watch.waits):>6}")
    print(f"  planned peak of the rank {memory.peak / 2**30:.1f} GiB, counted and not measured")


if __name__ == "__main__":
    main()
