"""Make model folders: safetensors from a GGUF file, and a shallower copy of a model."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from npd_ascend.durable import commit_folder
from npd_ascend.errors import UserError
from npd_ascend.model.decoder import PLAIN, Decoder
from npd_ascend.model.families import read_config
from npd_ascend.model.hf_weights import check_hf_weights
from npd_ascend.model.load import copy_model_files


def convert_gguf(gguf: Path, folder: Path) -> None:
    """A quantised GGUF file as a float32 Hugging Face folder with its tokenizer.

    The values are those of the quantised file; converting does not bring back what quantising lost.
    """
    _refuse_existing(folder)
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file")
    try:
        import gguf as _gguf  # noqa: F401  transformers reads GGUF through it
    except ImportError:
        raise UserError("the gguf package is not installed; pip install -r requirements-smollm2.txt") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    with commit_folder(folder) as draft:
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(draft)
        _as_readable_as_its_config(draft)


def prune_depth(source: Path, folder: Path, keep: str) -> None:
    """Copy `source` with only the layers that `keep` names, such as 0-4,25-29, in rising order."""
    _refuse_existing(folder)
    with torch.device("meta"):
        check_hf_weights(Decoder(read_config(source), PLAIN), source)
    layers = _parse_layers(keep, read_config(source).num_layers)
    new_index = {old: new for new, old in enumerate(layers)}
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, value in load_file(file).items():
            match = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name)
            if match is None:
                tensors[name] = value
            elif int(match[2]) in new_index:
                tensors[f"{match[1]}{new_index[int(match[2])]}{match[3]}"] = value
    with commit_folder(folder) as draft:
        copy_model_files(source, draft)
        config = json.loads((draft / "config.json").read_text())
        config["num_hidden_layers"] = len(layers)
        if "layer_types" in config:
            config["layer_types"] = [config["layer_types"][layer] for layer in layers]
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        _as_readable_as_its_config(draft)


def _parse_layers(text: str, num_layers: int) -> list[int]:
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise UserError(f"--keep {text!r}: {part!r} is neither a layer nor a range such as 0-4")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    if layers != sorted(set(layers)) or not layers or layers[-1] >= num_layers:
        raise UserError(f"--keep {text!r}: want rising layers between 0 and {num_layers - 1}")
    return layers


def _as_readable_as_its_config(folder: Path) -> None:
    """safetensors makes files that only their owner can read, whatever the umask."""
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder}: exists already; delete it or choose another folder")
