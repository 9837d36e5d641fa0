"""docs/scale.md: the planner's figures for openPangu-Embedded on eight 64 GB NPUs, and against the paper's hours.

    python benchmarks/scale.py > docs/scale.md

Nothing is computed here that `npd plan` does not compute; this file only holds the published shapes and the questions.
"""

from dataclasses import replace

import torch

from npd_ascend.config import KernelConfig
from npd_ascend.model.families import DecoderConfig
from npd_ascend.parallel.plan import refusal
from npd_ascend.planner.command import HEADROOM, rates_table, size
from npd_ascend.planner.fused import countable
from npd_ascend.planner.memory import Layout, trainer_memory
from npd_ascend.planner.rates import ASCEND
from npd_ascend.planner.timing import Workload, cycle, prefill_tokens_per_s, step_seconds, train_tokens_per_s

PACK_TOKENS, CARDS = 32768, 8
WORK = Workload(samples=1, prompt_tokens=256, answer_tokens=768, epochs=10, sets=2)
PAPER_HOURS = {"rollout": 300, "score": 18, "distill": 42}
BATCH = 64
BF16 = torch.bfloat16

COMMON = {
    "vocab_size": 153376,
    "head_dim": 128,
    "max_position": 32768,
    "rms_norm_eps": 1e-5,
    "qkv_bias": True,
    "o_bias": True,
    "qk_norm": False,
    "init_std": 0.02,
}
MODELS = {
    "openPangu-Embedded-1B": DecoderConfig(
        hidden_size=1536,
        intermediate_size=6144,
        num_layers=26,
        num_heads=12,
        num_kv_heads=6,
        rope_theta=4e6,
        tie_embeddings=True,
        **COMMON,
    ),
    "openPangu-Embedded-7B": DecoderConfig(
        hidden_size=4096,
        intermediate_size=12800,
        num_layers=34,
        num_heads=32,
        num_kv_heads=8,
        rope_theta=16e6,
        tie_embeddings=False,
        **COMMON,
    ),
}


def main() -> None:
    limit = HEADROOM * (ASCEND.memory.value - ASCEND.idle.value)
    print(f"""# Scale, on paper

What the planner (`npd plan`) says of {CARDS} NPUs of 64 GB; printed by `python benchmarks/scale.py`, checked by
`tests/test_planner.py`. None of it was measured on an NPU. Parameters, flops and what layers keep are counted from the
published configurations and this project's own layers, with stand-ins for torch_npu's fused operators that keep what
its autograd keeps, to the byte (`tests/ascend_wheel`); workspaces of operators are not known and not counted. The
planner's memory lies within 15% of the measured peak of real training steps, of a teacher that scores and of rollouts
with transformers on CPU (vLLM takes the cache that it is given), and within 1% of what whole steps of the 1B shape hold
on fake NPU tensors under torch_npu's autograd (8 layers; all are tests). What is assumed:

```
{rates_table(ASCEND)}
```

A step is one pack of {PACK_TOKENS:,} tokens per replica, samples of {WORK.mean.tokens:,.0f} tokens of which 75% are
answer; bfloat16 weights, float32 gradients, float32 masters and moments cut over replicas; sequence parallelism where
tp > 1. `peak` is the largest of five moments of a step and less than the sum, since activations go while gradients
come; collectives are {size(2 * 2 * 256 * 10**6)}iB of it where both tp and dp are more than one. It fits up to
{size(limit)}iB, {HEADROOM:.0%} of what is free when idle. Communication is counted as if nothing overlapped.""")
    for name, config in MODELS.items():
        _print_model(name, config, limit)
    _print_paper()


def _print_model(name: str, config: DecoderConfig, limit: float) -> None:
    print(f"\n## {name}, {config.num_parameters / 1e9:.3f}B parameters\n")
    print(
        "| tp x dp | recompute | weights | gradients | optimizer | activations | loss | peak | fits | compute, s |",
        end="",
    )
    print(" communication, s | tokens/s |\n|---|---|---|---|---|---|---|---|---|---|---|---|")
    for tp in (1, 2, 4, 8):
        if reason := refusal(config, tp):
            print(f"| {tp} x {CARDS // tp} | refused: {reason} | | | | | | | | | | |")
            continue
        for recompute in ("off", "selective", "full"):
            layout, memory = _memory(config, tp, recompute)
            compute, talk = step_seconds(config, layout, BF16, ASCEND, WORK.mean)
            rate = train_tokens_per_s(config, layout, BF16, ASCEND, WORK.mean)
            parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.loss, memory.peak]
            print(f"| {tp} x {CARDS // tp} | {recompute} | {' | '.join(map(size, parts))} ", end="")
            print(f"| {'yes' if memory.peak < limit else 'no'} | {compute:.2f} | {talk:.2f} | {rate:,.0f} |")


def _memory(config: DecoderConfig, tp: int, recompute: str):
    layout = Layout(tp=tp, dp=CARDS // tp, sequence_parallel=tp > 1, recompute=recompute, pack_tokens=PACK_TOKENS)
    answers = int(0.75 * PACK_TOKENS)
    with countable(KernelConfig(attention="npu", layer="npu")) as kernels:
        memory = trainer_memory(
            "distill",
            config,
            layout,
            BF16,
            device="npu",
            answer_tokens=answers,
            kernels=kernels,
            group_bytes=2 * 256 * 10**6,
        )
    return layout, memory


def _print_paper() -> None:
    student, teacher = MODELS.values()
    layout, _ = _memory(student, 2, "off")
    one = {time.stage: time for time in _cycle(student, teacher, layout, WORK)}
    samples = PAPER_HOURS["distill"] / one["distill"].card_hours
    times = _cycle(student, teacher, layout, replace(WORK, samples=round(samples)))
    print(f"""
## Against the paper's hours

A summary of the paper (arXiv 2605.05940 in github.com/nick7nlp/OPDHub, `notes/paper_notes.json`) gives its run as 366
NPU-hours on 8 Ascend NPUs (model not named): 300 for rollouts, 42 for training, 18 for the teacher, 6 for the rest.
It gives neither tokens nor layout. So take openPangu 7B to 1B, ten epochs, two sets of rollouts, tp 2 x dp 4 without
recomputation, and as many samples of 1,024 tokens as the planner trains in 42 NPU-hours: {samples:,.0f} a set,
{samples * WORK.mean.tokens / 1e6:,.0f}M tokens. Then:

| stage | tokens | planner: tokens/s of an NPU | planner: NPU-hours | paper | tokens/s of an NPU that give the paper's |
|---|---|---|---|---|---|""")
    for time in times:
        hours = PAPER_HOURS[time.stage]
        rate, wanted = (time.tokens / 3600 / each for each in (time.card_hours, hours))
        print(f"| {time.stage} | {time.tokens / 1e6:,.0f}M | {rate:,.0f} | {time.card_hours:,.0f} ", end="")
        print(f"| {hours} | {wanted:,.0f} |")
    rollout, score = times[0], times[1]
    rate = rollout.tokens / 3600 / PAPER_HOURS["rollout"]
    slower = score.card_hours / PAPER_HOURS["score"]
    faster = PAPER_HOURS["rollout"] / rollout.card_hours
    one_pass = 2 * samples * WORK.mean.tokens / prefill_tokens_per_s(teacher, BF16, ASCEND, WORK.mean) / 3600
    print(f"""
- Training is what the number of samples was taken from, so it agrees by construction. With 1.2M samples, the size of
  the paper's main data set, one would have {samples * WORK.mean.tokens / 1.2e6:,.0f} tokens.
- The teacher: the planner reads every sample and once more its answer alone, for both IFDs, and needs {slower:.1f}
  times the paper's hours. One pass over each sample, without the second, would be {one_pass:,.0f} NPU-hours: the paper
  either has s(y) for less or reads faster than 40% of peak.
- Rollouts: the planner assumes {BATCH} requests at once and steps of 17 ms, and is {faster:.0f} times faster than the
  paper, whose hours come out at {rate:,.0f} tokens/s of an NPU. With the same step that is {rate * 0.017:.0f} requests
  at once, or many more answers than are trained on. Nothing says which. It is the first figure to measure on a card,
  since rollouts are 82% of the paper's hours.""")


def _cycle(student: DecoderConfig, teacher: DecoderConfig, layout: Layout, work: Workload):
    return cycle((student, BF16), (teacher, BF16), (BF16, BATCH), layout, work, ASCEND)


if __name__ == "__main__":
    main()
