"""Arguments of the Triton kernels, for the tests that compile them: tests/ascend and tests/cuda."""

# query heads, key heads, head size
SHAPES = {
    "openPangu-1B": (12, 6, 128),
    "openPangu-7B": (32, 8, 128),
    "head 32": (4, 2, 32),
    "head 64": (4, 2, 64),
    "head 80": (4, 4, 80),
    "head 256": (4, 1, 256),
}
ATTENTION = ["forward", "backward_q", "backward_kv"]
LOSS = ["lse_and_targets", "gradient"]
DIVERGENCE = [("logsumexp", None)] + [(kernel, kind) for kernel in ("terms", "gradient") for kind in range(3)]


def attention_arguments(kernel: str, dtype: str) -> dict[str, str]:
    tensors = {
        "forward": ["q", "k", "v", "out", "lse"],
        "backward_q": ["q", "k", "v", "out", "d_out", "lse", "delta", "d_q"],
        "backward_kv": ["q", "k", "v", "d_out", "lse", "delta", "d_k", "d_v"],
    }[kernel]
    types = {name: "*fp32" if name in ("lse", "delta") else f"*{dtype}" for name in tensors}
    return types | {"tiles": "*i32", "items": "i32", "scale": "fp32"}


def loss_arguments(kernel: str, dtype: str) -> dict[str, str]:
    common = {"logits": f"*{dtype}", "ids": "*i32", "lse": "*fp32"}
    own = {"lse_and_targets": {"targets": "*fp32"}, "gradient": {"sums": "*fp32", "weights": "*fp32"}}[kernel]
    return common | own | {"rows": "i32", "valid": "i32", "width": "i32"}


def loss_constants(kernel: str, slots: int, block: int) -> dict[str, int]:
    sizes = {"K": slots, "BLOCK": block}
    return sizes | ({"SLOTS": 1 << (slots - 1).bit_length()} if kernel == "lse_and_targets" else {})


def divergence_arguments(kernel: str, dtype: str) -> dict[str, str]:
    rows = {"rows": "i32", "valid": "i32", "width": "i32"}
    if kernel == "logsumexp":
        return {"logits": f"*{dtype}", "tops": "*fp32", "rests": "*fp32"} | rows
    logits = {"student": f"*{dtype}", "teacher": f"*{dtype}"}
    statistics = ["student_top", "teacher_top", "student_rest", "teacher_rest"]
    statistics += {"terms": ["teacher_kl", "student_kl"], "gradient": ["student_kl", "scale"]}[kernel]
    return logits | dict.fromkeys(statistics, "*fp32") | rows | {"log_beta": "fp32", "log_rest": "fp32"}


def divergence_constants(kind: int | None, row_tiles: dict) -> dict[str, int]:
    if kind is None:
        return {"BLOCK": row_tiles["logsumexp"].cols}
    return {"BLOCK": row_tiles["divergence"].cols, "KIND": kind}
