"""Tiny real models: Llama, openPangu's bias form, Qwen2 and Qwen3 from transformers, with random biases and norms."""

import os

# Before anything imports triton: its kernels run here in triton's interpreter, element by element, and the processes
# that tests start inherit it.
os.environ.setdefault("TRITON_INTERPRET", "1")

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from npd_ascend.model.load import load_decoder
from npd_ascend.records import Sample

# launch/test.sh runs them, tests/npu/run.sh the last: they need triton-ascend in triton's place, torch-npu,
# Triton's compiler, or a card
collect_ignore = ["ascend", "ascend_wheel", "cuda", "npu"]
CONFIGS = Path(__file__).parent.parent / "configs"
SLOW = os.environ.get("NPD_SLOW") == "1"
torch.set_num_threads(1)  # two test processes run side by side on two cores


_files_with_ranks: set[Path] = set()


def pytest_collection_modifyitems(config, items):
    """Files that share the pool of ranks come first, then long ones, so that no process ends with one of them alone;
    plain pytest names what it leaves out and why."""
    _files_with_ranks.update(item.path for item in items if "ranks" in item.fixturenames)
    long_files = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: (item.path not in _files_with_ranks, item.path not in long_files))
    if SLOW or "slow" in config.getoption("markexpr"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: minutes; NPD_SLOW=1 or launch/test.sh runs it"))


_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "pangu": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False, "head_dim": 32}),
}


def make_hf_model(family: str, seed: int = 0, **changes):
    """A random model whose biases and norms are not at their initial values, so that losing one shows."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**_SHAPE | extra | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 0.15)
    return model


def make_samples(lengths, vocab_size=61, top_k=5, seed=0):
    """Ragged, prompts of 1 to 3 tokens, teacher distributions decades apart."""
    random = np.random.Generator(np.random.PCG64(seed))
    samples = []
    for i, length in enumerate(lengths):
        prompt_len = 1 + i % 3
        logits = random.normal(0, 10.0 ** (i % 3 - 1), (length, vocab_size))
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ids = np.argsort(-logprobs, -1)[:, :top_k].astype(np.int32)
        samples.append(
            Sample(
                sample_id=f"s{i}",
                token_ids=tuple(random.integers(0, vocab_size, prompt_len + length).tolist()),
                prompt_len=prompt_len,
                teacher_topk_ids=ids,
                teacher_topk_logprobs=np.take_along_axis(logprobs, ids, -1).astype(np.float32),
            )
        )
    return samples


@pytest.fixture
def ranks():
    """A pool of gloo processes; tests that use it name a layout (tp, dp, sequence_parallel)."""
    from ranks import shared_pool

    return shared_pool()


def pytest_runtest_setup(item):
    """The pool goes before the next file that does without: its idle threads wake up so often that they fill a core."""
    ranks = sys.modules.get("ranks")
    if ranks and item.path not in _files_with_ranks:
        ranks.close_pool()


def pytest_sessionfinish():
    if ranks := sys.modules.get("ranks"):
        ranks.close_pool()


@pytest.fixture(params=list(FAMILIES))
def hf_pair(request, tmp_path):
    """(transformers model, our decoder of the same weights, folder)."""
    model = make_hf_model(request.param)
    model.save_pretrained(tmp_path / "model")
    ours = load_decoder(tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"))
    return model, ours, tmp_path / "model"


@pytest.fixture
def addition_student(tmp_path) -> Path:
    """A copy of the addition student's folder, free to be damaged."""
    return Path(shutil.copytree(CONFIGS / "addition" / "student", tmp_path / "student"))
