"""The only file that names a device."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_device(kind: str, threads: int) -> torch.device:
    """The device of this process. `threads`: CPU threads of torch; 0 keeps torch's own choice."""
    if threads:
        torch.set_num_threads(threads)
    return torch.device(kind)
