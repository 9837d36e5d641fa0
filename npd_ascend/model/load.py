"""Open a model folder as a decoder, and write one back as a Hugging Face folder."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from npd_ascend.config import KernelConfig
from npd_ascend.errors import UserError
from npd_ascend.model.decoder import PLAIN, Decoder, Kernels, initialise
from npd_ascend.model.families import read_config
from npd_ascend.model.hf_weights import hf_shapes, hf_views, load_hf_weights
from npd_ascend.model.safetensors_stream import write_safetensors
from npd_kernels import layer_ops, packed_attention, token_loss

# Every other file beside config.json belongs to the model and travels with it (licences included).
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|onnx_data|ot|tflite)|.*\.index\.json|(version|canary)\.json"
)
_TEMPLATES = "additional_chat_templates"  # the one folder that transformers has for a tokenizer


def choose_kernels(config: KernelConfig, device: torch.device) -> Kernels:
    """The configured implementations; UserError for the first that cannot run on `device`."""
    for key, operation in (("attention", packed_attention), ("loss", token_loss), ("layer", layer_ops)):
        impl = getattr(config, key)
        if reason := operation.IMPLEMENTATIONS[impl].unavailable_reason(device):
            raise UserError(f"kernels.{key}: {impl} cannot run here: {reason}; choose another one")
    return Kernels(config.attention, config.layer)


def load_decoder(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels = PLAIN,
    seed: int | None = None,
    recompute: str = "off",
    cut: Callable[[Decoder], None] | None = None,
) -> Decoder:
    """The model in `folder`, without a copy in another dtype beside it.

    seed: of fresh weights for the architecture of the folder's config.json; None: the weights in the folder.
    cut: called on the empty model before it takes any memory; leaves one rank's part of it.
    """
    with torch.device("meta"):
        model = Decoder(read_config(folder), kernels, recompute)
    if cut:
        cut(model)
    # to_empty does the same, after a third of a second of imports
    empty = {name: torch.empty(x.shape, dtype=dtype, device=device) for name, x in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
    if seed is None:
        load_hf_weights(model, folder)
    else:
        initialise(model, seed)
    return model


def save_decoder(
    model: Decoder, source: Path, folder: Path, tensors: Iterable[tuple[str, torch.Tensor]] | None = None
) -> None:
    """Write `folder` (made if needed) with the weights of `model` and every other file of `source`.

    tensors: the whole Hugging Face tensors by name, in any order, taken one at a time; None: those of a model that
    is not cut.
    """
    copy_model_files(source, folder)
    dtype = model.embed.weight.dtype
    if tensors is None:
        tensors = ((piece.name, view) for piece, view in hf_views(model))
    write_safetensors(folder / "model.safetensors", hf_shapes(model), dtype, tensors)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_model_files(source: Path, folder: Path) -> None:
    """The files of a model folder but for weights, in any format, and what is hidden; of its folders chat templates."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(".") and not _WEIGHTS.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES, dirs_exist_ok=True)
