"""Open a model folder as a decoder, and write one back as a Hugging Face folder."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from npd_ascend.model.decoder import Decoder, initialise
from npd_ascend.model.families import read_config
from npd_ascend.model.hf_weights import hf_tensors, load_hf_weights

# Everything but weights and their index belongs to the model and travels with it (licence files included).
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.gguf", "version.json")


def load_decoder(folder: Path, *, dtype: torch.dtype, device: torch.device, attention_impl: str) -> Decoder:
    """The model in `folder`, weights included, without a copy in another dtype beside it."""
    model = Decoder(read_config(folder), attention_impl).to(dtype=dtype, device=device)
    load_hf_weights(model, folder)
    return model


def random_decoder(
    folder: Path, *, seed: int, dtype: torch.dtype, device: torch.device, attention_impl: str
) -> Decoder:
    """The architecture of `folder`/config.json with fresh weights."""
    model = Decoder(read_config(folder), attention_impl)
    initialise(model, seed)
    return model.to(dtype=dtype, device=device)


def save_decoder(model: Decoder, source: Path, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write `folder` (made if needed) with the weights of `model` and every other file of `source`.

    dtype: of the stored tensors; None keeps the model's.
    """
    copy_model_files(source, folder)
    tensors = {name: value.to("cpu", dtype or value.dtype).contiguous().clone() for name, value in hf_tensors(model)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_model_files(source: Path, folder: Path) -> None:
    """Everything of a model folder but its weights."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_WEIGHTS), dirs_exist_ok=True)
