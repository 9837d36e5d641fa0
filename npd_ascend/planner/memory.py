"""Bytes of a card in each role of a run, part by part. A part that depends on an assumption says so in rates.py.

The trainer's peak is the largest of four moments of a step, since activations go while gradients come:
    loss       all layers' activations are kept, one chunk of logits and the head's gradient are there
    backward   the last layer's backward begins
    gradients  the first layer's backward ends: all other gradients are there
    embedding  its gradient, dense, meets the head's (tied) or comes to all others
    update     every gradient sum, and with replicas this one's rows of it a second time
"""

from dataclasses import dataclass, replace

import torch

from npd_ascend.model.decoder import PLAIN, Decoder, Kernels
from npd_ascend.model.families import DecoderConfig
from npd_ascend.parallel.mesh import Mesh
from npd_ascend.parallel.plan import cut_model
from npd_ascend.planner.layer import count_layer, silent_mesh
from npd_kernels.streaming import CHUNK_BYTES
from npd_kernels.token_loss import IMPLEMENTATIONS

# log-probs, their exponentials and the product with them: what teacher/local.py holds of a chunk beside the logits
_SCORE_COPIES = 3
# log-probs, probabilities, and in float64 those and their running sum: what rollout/hf_engine.py holds to draw a token
_DRAW_COPIES = 6
# of masters and moments: ours, and two that torch.distributed.checkpoint makes of it (tests/test_planner.py)
CHECKPOINT_COPIES = 3
# max_num_seqs and max_num_batched_tokens of vLLM's LLM class, of which nothing here asks for more (engine/arg_utils.py)
VLLM_REQUESTS, VLLM_TOKENS = 256, 8192
VLLM_CPU_TOKENS = (
    4096  # the same on a CPU, or the longest prompt with its answer: rollout/vllm_versions.py asks for that
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the trainer is spread, and what one pack is."""

    tp: int
    dp: int
    sequence_parallel: bool
    recompute: str
    pack_tokens: int
    packs_per_rank: int = 1  # between two updates
    section: str = "npd"  # of the configuration, whose packs these are

    def __str__(self) -> str:
        parallel = {
            "tp": self.tp,
            "dp": self.dp,
            "sequence_parallel": str(self.sequence_parallel).lower(),
            "recompute": self.recompute,
        }
        return " ".join(f"parallel.{key}={value}" for key, value in parallel.items()) + (
            f" {self.section}.pack_tokens={self.pack_tokens}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one card, or of one process on CPU, in one role."""

    role: str
    weights: int
    gradients: int = 0  # float32 sums over packs
    optimizer: int = 0  # float32 masters and two moments, this replica's rows of them
    activations: int = 0
    loss: int = 0  # a chunk of logits, the head's gradient until it is a gradient sum
    kv_cache: int = 0
    collectives: int = 0  # buffers of the collective library
    transfer: int = 0  # of weights on their way from trainer to generators; of the host's, or of the card (transfer.py)
    checkpoint: int = 0  # of the host's memory, while one is written and training goes on
    step: int = 0  # the largest moment of a step; not the sum, see above
    peak: int


def trainer_memory(
    role: str,
    config: DecoderConfig,
    layout: Layout,
    dtype: torch.dtype,
    *,
    device: str,
    answer_tokens: int,
    kernels: Kernels = PLAIN,
    loss_impl: str = "chunked",
    group_bytes: int = 0,
) -> Memory:
    """Of one rank of `npd sft`, `npd distill` and `npd grpo` from its second step on.

    device: of the chunks of logits (npd_kernels.streaming). answer_tokens: of a pack, which is what the head sees.
    kernels: those that run here, or stand-ins (fused.py). loss_impl: key of npd_kernels.token_loss.IMPLEMENTATIONS.
    group_bytes: what one group of ranks takes of a card.
    """
    with silent_mesh(layout.tp, sequence_parallel=layout.sequence_parallel) as mesh:
        sizes = _local_sizes(config, mesh, layout.dp)
        layer = count_layer(config, dtype, layout.pack_tokens, mesh, layout.recompute, kernels)
    wide, own, e = 4 * sizes.all, 4 * sizes.own, dtype.itemsize
    weights = e * sizes.all
    # float32 weights are their own masters
    optimizer = own * (2 if e == 4 else 3)
    collectives = group_bytes * ((layout.tp > 1) + (layout.dp > 1))
    static = weights + optimizer + collectives

    kept = config.num_layers * layer.kept
    hidden = e * config.hidden_size * (layout.pack_tokens + answer_tokens)  # of train_step's two names
    head, chunk = sizes.head, logits_chunk_bytes(dtype, sizes.head // config.hidden_size, answer_tokens, device)
    # a chunk's part of the head's gradient, unless one operator multiplies and adds it
    product = 0 if e == 4 or hasattr(IMPLEMENTATIONS[loss_impl], "add_product") else e * head
    loss = chunk + 4 * head + product + e * config.hidden_size * answer_tokens
    waiting = e * head if config.tie_embeddings else 4 * head
    rest = wide - 4 * head * (1 if config.tie_embeddings else 2)  # gradients of the layers
    meeting = 2 * e * head + (4 * head if e < 4 else 0) if config.tie_embeddings else 4 * head + (4 + e) * head
    before = wide if layout.packs_per_rank > 1 else 0
    last_layer = layer.backward - layer.kept
    # gloo reduces a copy of each gradient, and has all of them until the last has come
    copied = wide if layout.dp > 1 and device == "cpu" else 0
    moments = {
        "loss": before + kept + hidden + loss,
        "backward": before + kept + hidden + waiting + e * config.hidden_size * layout.pack_tokens + last_layer,
        "gradients": (before or rest) + waiting + hidden + layer.backward,
        "embedding": (before or rest) + hidden + meeting,
        "update": wide + (own if layout.dp > 1 else 0) + hidden + copied,
    }
    step = static + max(moments.values())
    checkpoint = CHECKPOINT_COPIES * 3 * own
    return Memory(
        role=role,
        weights=weights,
        gradients=wide,
        optimizer=optimizer,
        activations=kept + hidden + last_layer,
        loss=loss,
        collectives=collectives,
        checkpoint=checkpoint,
        step=step,
        # for a CPU the host's memory is the same
        peak=step + (checkpoint if device == "cpu" else 0),
    )


def beside_reference(memory: Memory) -> Memory:
    """A trainer's with a second student of its type, whose weights alone it holds: for the KL of GRPO."""
    return replace(
        memory, weights=2 * memory.weights, step=memory.step + memory.weights, peak=memory.peak + memory.weights
    )


def logits_chunk_bytes(dtype: torch.dtype, head_rows: int, answer_tokens: int, device: str) -> int:
    """Of one chunk of logits as the loss goes over it: bfloat16 ones are widened and their gradient narrowed."""
    rows = min(answer_tokens, max(1, CHUNK_BYTES[device] // (4 * head_rows)))
    return rows * head_rows * (4 if dtype.itemsize == 4 else dtype.itemsize + 4 + dtype.itemsize)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Elements of one rank."""

    all: int
    own: int  # whose masters and moments it has
    head: int


def _local_sizes(config: DecoderConfig, mesh: Mesh, dp: int) -> _Sizes:
    with torch.device("meta"):
        model = Decoder(config, PLAIN)
    cut_model(model, mesh)
    parameters = list(model.parameters())
    own = sum(p.numel() // dp if p.dim() == 2 and len(p) % dp == 0 else p.numel() for p in parameters)
    return _Sizes(sum(p.numel() for p in parameters), own, model.head_weight_VD.numel())


def bytes_of_set(samples: int, tokens: float, answer_tokens: float, top_k: int) -> int:
    """Of the host's memory, what a rank holds of a set of rollouts and scores that it trains on. tokens: means.

    A token id is an object of Python and a pointer to it; the answer's log-probs of student, teacher and top-k are
    arrays of 4 bytes each, the top-k's ids too; the rest are names and what belongs to every object.
    """
    return int(samples * (40 * tokens + (8 + 8 * top_k) * answer_tokens + 1500))


def teacher_memory(
    teacher: DecoderConfig,
    student: DecoderConfig,
    dtypes: tuple[torch.dtype, torch.dtype],
    pack_tokens: int,
    *,
    device: str,
    kernels: Kernels = PLAIN,
) -> Memory:
    """Of `npd score` with a teacher of its own: it holds teacher and student, and one of them at work.

    dtypes: of teacher and student. pack_tokens: of a prefill.
    """
    working, chunk, weights = 0, 0, 0
    for config, dtype in zip((teacher, student), dtypes, strict=True):
        layer = count_layer(config, dtype, pack_tokens, Mesh(), "off", kernels)
        working = max(working, layer.forward + 2 * dtype.itemsize * config.hidden_size * pack_tokens)
        rows = min(pack_tokens, max(1, CHUNK_BYTES[device] // (4 * config.vocab_size)))
        chunk = max(chunk, rows * config.vocab_size * (dtype.itemsize + 4 * _SCORE_COPIES))
        weights += dtype.itemsize * config.num_parameters
    return Memory(role="teacher", weights=weights, activations=working, loss=chunk, peak=weights + max(working, chunk))


def rollout_memory(
    config: DecoderConfig,
    dtype: torch.dtype,
    *,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    kv_cache_bytes: int | None = None,
    whole_prompts: bool = False,
) -> Memory:
    """Of `npd rollout`. prompt_tokens: of the longest prompt, to which the others of a batch are padded.

    kv_cache_bytes: of a cache that is there from the start, as vLLM's, which takes no more requests and tokens at once
    than its limits; None: it grows with the answers, layer by layer and copied as it does, as rollout/hf_engine.py's.
    whole_prompts: vLLM cuts none, as on a CPU.
    """
    weights, per_token = dtype.itemsize * config.num_parameters, kv_bytes_per_token(config, dtype)
    prompts = batch * prompt_tokens
    if kv_cache_bytes is not None:
        limit = max(VLLM_CPU_TOKENS, prompt_tokens + new_tokens) if whole_prompts else VLLM_TOKENS
        batch, prompts = min(batch, VLLM_REQUESTS), min(prompts, limit)
    prefill = (
        count_layer(config, dtype, prompts, Mesh(), "off").forward + 2 * dtype.itemsize * config.hidden_size * prompts
    )
    logits = batch * config.vocab_size * (dtype.itemsize + 4 * _DRAW_COPIES)
    if kv_cache_bytes is None:
        first, last = per_token * prompts, per_token * batch * (prompt_tokens + new_tokens)
        copied = last // (2 * config.num_layers)
    else:
        first, last, copied = kv_cache_bytes, kv_cache_bytes, 0
    return Memory(
        role="rollout",
        weights=weights,
        activations=prefill,
        loss=logits,
        kv_cache=last,
        peak=weights + max(first + prefill, last + max(logits, copied)),
    )


def kv_bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
