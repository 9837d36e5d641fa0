"""Small models whose memory and time are planned."""

from npd_ascend.model.families import DecoderConfig

COMMON = {
    "head_dim": 64,
    "max_position": 8192,
    "rms_norm_eps": 1e-5,
    "qkv_bias": True,
    "o_bias": True,
    "qk_norm": False,
    "init_std": 0.02,
    "rope_theta": 1e4,
}
TIED = DecoderConfig(  # 30M, 12M of them embedding
    hidden_size=384,
    intermediate_size=1536,
    num_layers=8,
    num_heads=6,
    num_kv_heads=3,
    vocab_size=32000,
    tie_embeddings=True,
    **COMMON,
)
UNTIED = DecoderConfig(  # 27M
    hidden_size=512,
    intermediate_size=1536,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    vocab_size=8192,
    tie_embeddings=False,
    **COMMON,
)
