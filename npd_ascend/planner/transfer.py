"""Bytes that rollout.weights=memory or device adds: weights on their way from the trainer to the generators."""

from dataclasses import replace

import torch

from npd_ascend.model.decoder import PLAIN, Decoder
from npd_ascend.model.families import DecoderConfig
from npd_ascend.model.hf_weights import hf_shapes
from npd_ascend.planner.memory import Memory
from npd_ascend.weights.collective import packed_sizes
from npd_ascend.weights.device_group import DEVICE_BUCKET_BYTES

# the newest version, and one that a slow worker has not taken to its end (weights/sender.py)
SNAPSHOTS = 2
# vLLM's worker makes the next one before it lets the last but one go (packed_tensor.py)
BUCKETS = 3


def beside_sender(
    trainer: Memory, config: DecoderConfig, dtype: torch.dtype, *, of_card: bool, group_bytes: int
) -> Memory:
    """With the snapshots in `dtype` that rank 0 holds, whole ones however the model is cut.

    of_card: they lie in the memory that is planned, else in the host's. group_bytes: of the groups with all workers.
    """
    transfer = SNAPSHOTS * sum(_tensor_bytes(config, dtype))
    more = group_bytes + (transfer if of_card else 0)
    collectives = trainer.collectives + group_bytes
    return replace(
        trainer, transfer=transfer, collectives=collectives, step=trainer.step + more, peak=trainer.peak + more
    )


def beside_receiver(
    generator: Memory, config: DecoderConfig, dtype: torch.dtype, *, in_buckets: bool, of_card: bool, group_bytes: int
) -> Memory:
    """With what comes while nothing is generated. in_buckets: between devices; else a whole version, checked before it
    is loaded. of_card, group_bytes: as above, of the group with the trainer."""
    tensors = _tensor_bytes(config, dtype)
    buckets = packed_sizes(tensors, DEVICE_BUCKET_BYTES)
    transfer = max(sum(buckets[at : at + BUCKETS]) for at in range(len(buckets))) if in_buckets else sum(tensors)
    loading = generator.weights + generator.kv_cache + (transfer if of_card else 0)
    peak = group_bytes + max(generator.peak, loading)
    return replace(generator, transfer=transfer, collectives=group_bytes, peak=peak)


def _tensor_bytes(config: DecoderConfig, dtype: torch.dtype) -> list[int]:
    with torch.device("meta"):
        shapes = hf_shapes(Decoder(config, PLAIN)).values()
    return [dtype.itemsize * torch.Size(shape).numel() for shape in shapes]
