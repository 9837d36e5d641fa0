"""For test_planned_memory.py, in its own process: the peak of scoring or of generating, models included, above what
importing them took.

python tests/measured_inference.py '<JSON of case>'       prints bytes
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from peak import peak_bytes

from npd_ascend.device import DTYPES
from npd_ascend.model.families import DecoderConfig
from npd_ascend.model.load import load_decoder
from npd_ascend.rollout.engine import Request, Sampling, in_order
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.teacher.local import score_answers

CPU = torch.device("cpu")
SAMPLE_TOKENS = 256


def save(folder: Path, config: DecoderConfig, dtype: torch.dtype) -> Path:
    """A random model as transformers writes it, for both kinds of process."""
    shape = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "max_position_embeddings": config.max_position,
    }
    LlamaForCausalLM(LlamaConfig(**shape)).to(dtype).save_pretrained(folder)
    return folder


def score(folders: list[Path], dtype: torch.dtype, pack_tokens: int) -> object:
    """Teacher and student there, each scores two packs."""
    models = [load_decoder(folder, dtype=dtype, device=CPU) for folder in folders]
    random = np.random.Generator(np.random.PCG64(0))
    vocab_size, count = min(model.config.vocab_size for model in models), 2 * pack_tokens // SAMPLE_TOKENS
    rows = [(random.integers(0, vocab_size, SAMPLE_TOKENS).tolist(), 1) for _ in range(count)]
    for model in models:
        score_answers(model, rows, top_k=10, vocab_size=model.config.vocab_size, pack_tokens=pack_tokens)
    return models


def generate(
    folder: Path, dtype: torch.dtype, batch: int, prompt_tokens: int, new_tokens: int, vocab_size: int
) -> object:
    engine = HfEngine(dtype=dtype, device=CPU, eos_id=vocab_size, pad_id=0, vocab_size=vocab_size)  # none ends early
    engine.load_weights(folder)
    random = np.random.Generator(np.random.PCG64(0))
    prompts = random.integers(0, vocab_size, (batch, prompt_tokens)).tolist()
    in_order(engine.generate([Request(tuple(ids), new_tokens, i) for i, ids in enumerate(prompts)], Sampling(1.0)))
    return engine


def main() -> None:
    case = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dtype, configs = DTYPES[case["dtype"]], [DecoderConfig(**config) for config in case["configs"]]
    with tempfile.TemporaryDirectory() as name:
        folders = [save(Path(name) / str(i), config, dtype) for i, config in enumerate(configs)]
        small = save(Path(name) / "small", replace(configs[0], num_layers=1, vocab_size=512), dtype)
        # first what the libraries make once
        if case["role"] == "_scoring":
            score([small], dtype, SAMPLE_TOKENS)
            print(peak_bytes(lambda: score(folders, dtype, case["pack_tokens"])))
        else:
            generate(small, dtype, 2, 2, 2, 512)
            sizes = [case[key] for key in ("batch", "prompt_tokens", "new_tokens")]
            print(peak_bytes(lambda: generate(folders[0], dtype, *sizes, configs[0].vocab_size)))


if __name__ == "__main__":
    main()
