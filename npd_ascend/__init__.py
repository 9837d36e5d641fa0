"""npd_ascend: Near-Policy Distillation of language models on Ascend NPUs, and on an ordinary CPU."""

import os

# torch would import torch_npu by itself, and fail with it where CANN's environment is not set, before anything could be
# said about that; device.py imports it where a configuration asks for it
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

__version__ = "0.1.0"
