"""Hugging Face safetensors in and out, tensor by tensor, through one table of names.

The decoder fuses q, k, v and gate, up into one matrix each; a fused parameter is its parts stacked
along dimension 0 in the order of the table.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from npd_ascend.errors import UserError
from npd_ascend.model.decoder import Decoder
from npd_ascend.model.families import DecoderConfig

_LAYER = {
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}
_TOP = {"embed": ["model.embed_tokens"], "norm": ["model.norm"], "head": ["lm_head"]}


def hf_names(name: str) -> list[str]:
    """Hugging Face names of the parts of our parameter `name`, in stacking order."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("layers."):
        return [f"{part}.{leaf}" for part in _TOP[module]]
    _, index, inner = module.split(".", 2)
    return [f"model.layers.{index}.{part}.{leaf}" for part in _LAYER[inner]]


def part_sizes(config: DecoderConfig, name: str) -> list[int] | None:
    """Rows of each part of a fused parameter; None where the parameter is a single tensor."""
    if ".qkv." in name:
        return [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    if ".gate_up." in name:
        return [config.intermediate_size] * 2
    return None


def hf_tensors(model: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor view) for every parameter."""
    for name, parameter in model.named_parameters():
        sizes = part_sizes(model.config, name)
        parts = parameter.detach().split(sizes) if sizes else [parameter.detach()]
        yield from zip(hf_names(name), parts, strict=True)


@torch.no_grad()
def load_hf_weights(model: Decoder, folder: Path) -> None:
    """Fill `model` from the safetensors in `folder`, whatever its parameters' dtype; UserError as check_hf_weights."""
    files = check_hf_weights(model, folder)
    for name, value in hf_tensors(model):
        with _open(files[name]) as tensors:
            value.copy_(tensors.get_tensor(name))


def check_hf_weights(model: Decoder, folder: Path) -> dict[str, Path]:
    """Which file holds each tensor that `model` wants; the model may be on the meta device.

    UserError on a missing, misshapen or surplus tensor, from the files' headers alone. `rotary_emb.inv_freq`
    buffers, which some checkpoints carry, are computed from the config and passed over; so is a stored copy of a
    tied head.
    """
    wanted = {name: tuple(value.shape) for name, value in hf_tensors(model)}
    passed_over = {"lm_head.weight"} if model.config.tie_embeddings else set()
    files = {
        name: file
        for name, file in _index(Path(folder)).items()
        if not name.endswith("rotary_emb.inv_freq") and name not in passed_over
    }
    for name, file in files.items():
        if name not in wanted:
            raise UserError(f"{file}: tensor {name} has no place in the network that config.json describes")
        with _open(file) as tensors:
            shape = tuple(tensors.get_slice(name).get_shape())
        if shape != wanted[name]:
            raise UserError(f"{file}: {name} is {shape}, config.json wants {wanted[name]}")
    if missing := sorted(wanted.keys() - files.keys()):
        raise UserError(f"{folder}: {len(missing)} tensors are missing from the safetensors, first {missing[0]}")
    return files


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(f"{single}: no such file; only safetensors are read (convert other formats first)")
    with _open(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _open(file: Path):
    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise UserError(f"{file}: named by the index but not there") from None
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}); fetch or export it again") from None
