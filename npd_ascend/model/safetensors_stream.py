"""A safetensors file written tensor by tensor.

The library's own writer wants the whole model in memory; the format (8 bytes of header length, a JSON header, the
tensors' bytes; https://github.com/huggingface/safetensors) does not.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Write `tensors`, which are all those of `shapes` in any order; ValueError if they are not.

    The bytes depend on names and values alone: every tensor has its place in the file by name.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        begin, end = end, end + torch.Size(shapes[name]).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligned data, as the format asks
    missing = set(shapes)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            if name not in missing or tuple(tensor.shape) != tuple(shapes[name]) or tensor.dtype != dtype:
                raise ValueError(f"{name} of {tuple(tensor.shape)}, {tensor.dtype} is not what {path} is to hold")
            missing.remove(name)
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.cpu().contiguous().view(torch.uint8).flatten().numpy().data)
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors were not given, such as {min(missing)}")
