"""What the trainer says of fixed tokens when it publishes weights (weights/canary.py)."""

from collections.abc import Sequence

import torch

from npd_ascend.model.decoder import Decoder
from npd_ascend.packing import lay_out
from npd_ascend.parallel.mesh import ALONE, Mesh
from npd_ascend.records import Prompt
from npd_ascend.weights.canary import Probe
from npd_kernels.token_loss import token_logprobs

_PROMPTS = 4


@torch.inference_mode()
def make_probes(model: Decoder, prompts: Sequence[Prompt], loss_impl: str, mesh: Mesh = ALONE) -> list[Probe]:
    """Two tokens of each of the longest prompts, the middle and the last one; called by all ranks.

    The longest, because a key cache that outlived its weights is only read from the second block of keys on.
    """
    longest = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))[:_PROMPTS]
    rows = [p.token_ids[:stop] for p in longest for stop in (len(p.token_ids) // 2 + 1, len(p.token_ids)) if stop > 1]
    layout = lay_out([(ids, len(ids) - 1) for ids in rows], model.embed.weight.device, mesh.row_multiple)
    hidden_AD = model(layout.token_ids_T, layout.cu_seqlens)[layout.predict_A]
    logprobs_A1 = token_logprobs(
        hidden_AD, model.head_weight_VD, layout.answer_ids_A[:, None], shard=model.vocab_shard, impl=loss_impl
    )
    return [
        Probe(tuple(ids[:-1]), ids[-1], logprob) for ids, logprob in zip(rows, logprobs_A1[:, 0].tolist(), strict=True)
    ]
