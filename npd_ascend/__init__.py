"""npd_ascend: Near-Policy Distillation of language models on Ascend NPUs, and on an ordinary CPU."""

__version__ = "0.1.0"
