"""Memory and time of a training step of openPangu-Embedded on eight 64 GB NPUs, on paper.

    python benchmarks/scale.py > docs/scale.md

Counted, not assumed: parameters and flops from the published configurations; activation memory from what autograd
really keeps of one layer of the real size (run on the CPU through the tensor-parallel code, with a process group that
sends nothing). Assumed, and named in the output: the share of peak that is reached, the bandwidth between NPUs.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from npd_ascend.model import decoder
from npd_ascend.model.decoder import PLAIN, Decoder
from npd_ascend.model.families import DecoderConfig
from npd_ascend.parallel.mesh import Mesh
from npd_ascend.parallel.plan import cut_model, refusal

PACK_TOKENS, SAMPLE_TOKENS, ANSWER_SHARE = 32768, 1024, 0.75
CARDS, CARD_GB = 8, 64
PEAK_FLOPS, MFU, BUS_BYTES_PER_S = 354e12, 0.40, 100e9
PROBE_TOKENS = 256

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
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=CARDS)
    print("# Scale, on paper\n")
    print(
        f"What one step needs on {CARDS} NPUs of {CARD_GB} GB; printed by `python benchmarks/scale.py`. None of it was"
    )
    print(
        "measured on an NPU. Parameters, flops and kept activations are counted from the published configurations and"
    )
    print("this project's own layers; assumed are")
    print(f"{MFU:.0%} of a {PEAK_FLOPS / 1e12:.0f} TFLOP/s peak and {BUS_BYTES_PER_S / 1e9:.0f} GB/s between NPUs.\n")
    print(f"A step is one pack of {PACK_TOKENS:,} tokens per replica, samples of {SAMPLE_TOKENS:,} tokens of which")
    print(f"{ANSWER_SHARE:.0%} are answer; bfloat16 weights, float32 gradients, float32 masters and moments cut over")
    print("replicas; sequence parallelism where tp > 1. `static` is weights, gradients and optimizer; `kept` what the")
    print("layers keep for the backward. Communication is counted as if nothing overlapped.")
    for name, config in MODELS.items():
        _print_model(name, config)


def _print_model(name: str, config: DecoderConfig) -> None:
    print(f"\n## {name}, {config.num_parameters / 1e9:.3f}B parameters\n")
    print("| tp x dp | recompute | static, GB | kept, GB | sum, GB | fits | compute, s | communication, s | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for tp in (1, 2, 4, 8):
        dp = CARDS // tp
        if reason := refusal(config, tp):
            print(f"| {tp} x {dp} | refused: {reason} | | | | | | | |")
            continue
        static = config.num_parameters / tp * (2 + 4 + 12 / dp) / 1e9
        for recompute in ("off", "selective", "full"):
            kept = kept_bytes_per_token(config, tp, recompute) * PACK_TOKENS * config.num_layers / 1e9
            compute, talk = _seconds(config, tp, dp, recompute)
            fits = "yes" if static + kept < 0.9 * CARD_GB else "no"
            rate = PACK_TOKENS * dp / (compute + talk)
            print(
                f"| {tp} x {dp} | {recompute} | {static:.1f} | {kept:.1f} | {static + kept:.1f} | {fits} "
                f"| {compute:.2f} | {talk:.2f} | {rate:,.0f} |"
            )


def _seconds(config: DecoderConfig, tp: int, dp: int, recompute: str) -> tuple[float, float]:
    """(products and attention, communication) of a step; a ring moves 2 (n-1)/n of the bytes of an all-reduce."""
    samples = [SAMPLE_TOKENS] * (PACK_TOKENS // SAMPLE_TOKENS)
    forward = config.forward_flops(samples, int(ANSWER_SHARE * PACK_TOKENS))
    compute = forward * (4 if recompute == "full" else 3) / tp / (MFU * PEAK_FLOPS)
    hidden = PACK_TOKENS * config.hidden_size * 2
    reduces = config.num_layers * (5 if recompute == "full" else 4) + 2
    layers = reduces * hidden * 2 * (tp - 1) / tp
    # reduce-scatter of float32 gradients, gather of bfloat16 weights
    replicas = config.num_parameters / tp * (4 + 2) * (dp - 1) / dp
    return compute, (layers + replicas) / BUS_BYTES_PER_S


def kept_bytes_per_token(config: DecoderConfig, tp: int, recompute: str) -> float:
    """What one layer keeps for the backward on one rank, per token of the pack, in bfloat16."""
    if recompute == "full":
        return 2 * config.hidden_size / tp  # the layer's input
    mesh = Mesh(tp=tp, sequence_parallel=tp > 1, tp_group=dist.new_group(list(range(tp))) if tp > 1 else None)
    with torch.device("meta"):
        model = Decoder(replace(config, num_layers=1, vocab_size=64), PLAIN, recompute)
    cut_model(model, mesh)
    model = model.bfloat16().to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    rotary = model._rotary([0, PROBE_TOKENS])
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *rotary)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def keep_argument(fn, argument, *rest, **how):
        keep(argument)
        return checkpoint(fn, argument, *rest, **how)

    checkpoint, decoder.checkpoint = decoder.checkpoint, keep_argument
    x_TD = torch.randn(PROBE_TOKENS // tp, config.hidden_size).bfloat16().requires_grad_()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y_TD = model.layers[0](x_TD, rotary, [0, PROBE_TOKENS])
            return sum(kept.values()) / PROBE_TOKENS + 0 * y_TD.numel()  # y holds the graph alive till here
    finally:
        decoder.checkpoint = checkpoint


if __name__ == "__main__":
    main()
