"""From a Hugging Face config.json to the few numbers the decoder needs.

A key that is not known here stops the load: openPangu-R, for example, carries the same architecture
name as openPangu-Embedded and is a different network.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from npd_ascend.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a Llama-family decoder. Sizes in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    init_std: float

    @property
    def qkv_rows(self) -> list[int]:
        """Rows of the query, key and value projections."""
        return [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]

    @property
    def layer_matrix_size(self) -> int:
        """Weights of one layer's projections, biases left out."""
        return self.hidden_size * (sum(self.qkv_rows) + self.qkv_rows[0] + 3 * self.intermediate_size)

    @property
    def num_parameters(self) -> int:
        bias = self.qkv_bias * sum(self.qkv_rows) + self.o_bias * self.hidden_size + 2 * self.qk_norm * self.head_dim
        layer = self.layer_matrix_size + 2 * self.hidden_size + bias
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + tables + self.hidden_size

    def forward_flops(self, sample_lens: Sequence[int], answer_tokens: int) -> float:
        """Of the matrix products and causal attention of a pack; the head is multiplied for answer tokens only."""
        attention = 2 * self.qkv_rows[0] * sum(length**2 for length in sample_lens)
        head = 2 * self.vocab_size * self.hidden_size * answer_tokens
        return self.num_layers * (2 * self.layer_matrix_size * sum(sample_lens) + attention) + head


# model_type -> (bias on q, k, v; bias on o; norm on q and k); None: the config's own flag decides.
_FAMILIES = {
    "llama": (None, None, False),
    "PanguEmbedded": (None, None, False),
    "qwen2": (True, False, False),
    "qwen3": (None, None, True),
}

_READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rope_parameters", "rms_norm_eps",
    "attention_bias", "bias", "tie_word_embeddings", "initializer_range",
}  # fmt: skip

# Keys that do not change the network.
_INERT = {
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "use_cache",
    "transformers_version", "pretraining_tp", "max_window_layers", "_name_or_path", "is_llama_config",
    "transformers.js_config", "rope_interleaved", "_flash_attn_2_enabled", "is_decoder", "is_encoder_decoder",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "problem_type",
    "id2label", "label2id", "unk_token_id", "_model_name_or_path",
}  # fmt: skip

# What openPangu's configuration class fills in with the 7B model's values.
_PANGU_KEYS = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "rope_theta", "rms_norm_eps", "bias", "tie_word_embeddings", "max_position_embeddings",
}  # fmt: skip

# Keys that are accepted only while they switch nothing on.
_NEUTRAL: dict[str, object] = {
    "hidden_act": "silu",
    "attention_dropout": 0,
    "mlp_bias": False,
    "rope_scaling": None,
    "use_sliding_window": False,
}


def read_config(folder: Path) -> DecoderConfig:
    """Decoder shape of the model in `folder`; UserError names the file and the key that does not fit."""
    path = Path(folder) / "config.json"
    return decoder_config(_read_raw(path), path)


def _read_raw(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: no such file; a model folder holds config.json, a tokenizer and safetensors"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def decoder_config(raw: dict, path: Path) -> DecoderConfig:
    """Decoder shape from a parsed config.json; `path` is named in errors."""
    family = raw.get("model_type")
    if family not in _FAMILIES:
        raise UserError(f"{path}: model_type {family!r} is not supported; supported are {', '.join(_FAMILIES)}")
    _refuse_what_changes_the_network(raw, path)
    if family == "PanguEmbedded" and (absent := sorted(key for key in _PANGU_KEYS if raw.get(key) is None)):
        raise UserError(f"{path}: key {absent[0]!r} is missing; openPangu's own code would take the 7B model's value")
    qkv_bias, o_bias, qk_norm = _FAMILIES[family]
    if raw.get("attention_bias", raw.get("bias")) != raw.get("bias", raw.get("attention_bias")):
        raise UserError(f"{path}: bias={raw['bias']} and attention_bias={raw['attention_bias']} contradict each other")
    flag = bool(raw.get("attention_bias", raw.get("bias", False)))
    try:
        return DecoderConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            max_position=raw["max_position_embeddings"],
            rope_theta=float(_rope_theta(raw, path)),
            rms_norm_eps=raw["rms_norm_eps"],
            qkv_bias=flag if qkv_bias is None else qkv_bias,
            o_bias=flag if o_bias is None else o_bias,
            qk_norm=qk_norm,
            tie_embeddings=raw.get("tie_word_embeddings", False),
            init_std=raw.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing") from None


def licence_notice(folder: Path) -> str | None:
    """What whoever uses the model in `folder` should have been told; None if there is nothing particular."""
    if _read_raw(folder / "config.json").get("model_type") != "PanguEmbedded":
        return None
    return (
        f"{folder} holds openPangu weights: their use is under the OPENPANGU MODEL LICENSE AGREEMENT VERSION 1.0 (see "
        f"LICENSE there), which does not license use inside the European Union; what you train from them is a "
        f"derivative, and products based on it must display 'Powered by openPangu' and state 'openPangu is a "
        f"trademark of Huawei Technologies Co., Ltd.'"
    )


def _refuse_what_changes_the_network(raw: dict, path: Path) -> None:
    for key, neutral in _NEUTRAL.items():
        if key in raw and raw[key] != neutral:
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported; only {neutral!r} is")
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        raise UserError(f"{path}: layer_types holds other than full_attention, which is not supported")
    if raw.get("sliding_window") is not None and raw.get("use_sliding_window", True):
        raise UserError(f"{path}: sliding_window={raw['sliding_window']!r} is not supported")
    unknown = set(raw) - _READ - _INERT - set(_NEUTRAL) - {"layer_types", "sliding_window"}
    if unknown:
        raise UserError(
            f"{path}: unknown key {sorted(unknown)}; it may change the network, so the model is refused. "
            f"If it does not, add it to _INERT in npd_ascend/model/families.py"
        )


def _rope_theta(raw: dict, path: Path) -> float:
    """transformers 4 writes rope_theta, transformers 5 rope_parameters."""
    rope = raw.get("rope_parameters") or {}
    extra = set(rope) - {"rope_theta", "rope_type"}
    if rope.get("rope_type", "default") != "default" or extra:
        raise UserError(f"{path}: rope_parameters={rope} is not supported; only plain rotary embedding is")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise UserError(
            f"{path}: neither rope_theta nor rope_parameters.rope_theta is there; a default would be a guess"
        )
    return theta
