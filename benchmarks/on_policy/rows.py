"""The rows of vs_on_policy.py: who trains, how, and for how long."""

from dataclasses import dataclass, field

EPOCHS_PER_SET = 5  # K = 10 with one refresh after 5: two sets, each for half of the epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One teacher with one student, and what suits them."""

    prompts: int  # of a race; all contestants see each of them ten times
    short_prompts: int  # of a short row that is not synchronous
    heldout: int
    short_s: float  # of a short synchronous row
    max_new_tokens: int
    batch: int
    pack_tokens: int  # about a batch
    lr: float
    filters: dict
    warm: dict  # gold answers and epochs that the student starts from
    keep_layers: str | None = None


PAIRS = {
    "smollm2": Pair(
        prompts=40,
        short_prompts=16,
        heldout=24,
        short_s=25,
        max_new_tokens=128,
        batch=8,
        pack_tokens=2048,
        lr=1e-4,
        filters={"max_repetition": 0.5},
        warm={"count": 128, "epochs": 2, "pack_tokens": 2048, "lr": 3e-4},
        keep_layers="0-6,27-29",
    ),
    "addition": Pair(
        prompts=1000,
        short_prompts=500,
        heldout=200,
        short_s=10,
        max_new_tokens=6,
        batch=32,
        pack_tokens=512,
        lr=1e-3,
        filters={"drop_below_zero": False, "tau": 0.95, "tau_mode": "quantile"},
        warm={"count": 400, "epochs": 15, "pack_tokens": 512, "lr": 3e-3},
    ),
}
QUICK = {
    "smollm2": {"prompts": 8, "short_prompts": 4, "heldout": 4, "short_s": 1, "max_new_tokens": 8}
    | {"warm": {"count": 8, "epochs": 1, "pack_tokens": 2048, "lr": 3e-4}, "batch": 4},
    "addition": {"prompts": 64, "short_prompts": 32, "heldout": 20, "short_s": 1}
    | {"warm": {"count": 100, "epochs": 1, "pack_tokens": 512, "lr": 3e-3}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """dtype: of weights; None: TRL's own choice. trainer: of TRL; None: ours."""

    name: str
    trainer: str | None = None
    dtype: str | None = "float32"
    settings: dict = field(default_factory=dict)

    @property
    def synchronous(self) -> bool:
        return self.trainer is not None or self.settings["set"] is not None

    @property
    def sets(self) -> int | None:
        """Sets of answers in a race; None where every batch has answers of its own."""
        return None if self.synchronous else 10 // self.settings["epochs"]


_TUNED = {"gradient_checkpointing": False, "beta": 0.0, "temperature": 1.0}


def trl_rows(batch: int) -> list[Row]:
    rows = [Row(name="GKD as it comes", trainer="gkd", dtype=None, settings={"per_device_train_batch_size": 8})]
    for trainer, label in (("gkd", "GKD"), ("distillation", "DistillationTrainer")):
        for dtype, bf16, size in (
            ("float32", False, batch),
            ("float32", True, batch),
            ("bfloat16", False, batch),
            ("bfloat16", False, 2 * batch),
        ):
            kind = "autocast" if bf16 else dtype
            settings = _TUNED | {"bf16": bf16, "per_device_train_batch_size": size}
            rows.append(Row(name=f"{label} {kind}, batch {size}", trainer=trainer, dtype=dtype, settings=settings))
    return rows


def our_rows(batch: int) -> list[Row]:
    """The ladder, one switch at a time; then every switch but sets and filters, and NPD's sets with other targets."""
    state = {"engine": "hf", "padded": True, "loss": "full", "set": batch, "epochs": 1, "filtered": False}
    rows = [Row(name="ours, synchronous, padded, full logits", settings=dict(state))]
    for name, change, dtype in (
        ("+ packs", {"padded": False}, "float32"),
        ("+ loss operation", {"loss": "dense"}, "float32"),
        ("+ a set of answers at a time, one version each", {"set": None}, "float32"),
        (f"+ {EPOCHS_PER_SET} epochs over each set", {"epochs": EPOCHS_PER_SET}, "float32"),
        ("+ top-10 targets", {"loss": "topk"}, "float32"),
        ("+ filters: NPD", {"filtered": True}, "float32"),
        ("NPD, vLLM", {"engine": "vllm"}, "float32"),
        ("NPD, vLLM, bfloat16", {}, "bfloat16"),
        ("ours, synchronous, vLLM, bfloat16", {"set": batch, "epochs": 1, "filtered": False}, "bfloat16"),
    ):
        state |= change
        rows.append(Row(name=name, dtype=dtype, settings=dict(state)))
    sets = state | {"set": None, "epochs": EPOCHS_PER_SET}
    tail, dense = sets | {"filtered": True, "loss": "tail"}, sets | {"loss": "dense"}
    return [
        *rows,
        Row(name="NPD with tail, vLLM, bfloat16", dtype="bfloat16", settings=tail),
        Row(name="sets, dense divergence, vLLM, bfloat16", dtype="bfloat16", settings=dense),
    ]
