"""The plan of a run as a table, and the layout that fits where the configured one does not."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from npd_ascend.config import Config
from npd_ascend.device import DTYPES, NPU, group_bytes
from npd_ascend.errors import UserError
from npd_ascend.model.families import read_config
from npd_ascend.parallel.plan import refusal
from npd_ascend.planner.fused import countable
from npd_ascend.planner.memory import (
    Layout,
    Memory,
    rollout_memory,
    teacher_memory,
    trainer_memory,
)
from npd_ascend.planner.rates import ASCEND, Hardware, this_host
from npd_ascend.planner.timing import Samples, StageTime, Workload, cycle, train_tokens_per_s
from npd_ascend.prompts import wanted_shards
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.samples import gold_samples

HEADROOM = 0.9  # of a card: the rest is for fragments, workspaces of operators and the runtime itself
# vLLM's own limit of requests at once (max_num_seqs of its LLM class)
_VLLM_BATCH = 256
_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "kv_cache", "collectives", "checkpoint", "peak")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    layout: Layout
    limits: dict[str, int]  # role -> bytes of a card, or of a process of a host that its like share
    memory: list[Memory]
    times: list[StageTime]

    @property
    def too_large(self) -> Memory | None:
        return next((memory for memory in self.memory if memory.peak > self.limits[memory.role]), None)


def print_plan(config: Config) -> None:
    """Print memory, time and rates of a run. UserError names what does not fit, and what would."""
    hardware = _hardware(config.device.kind)
    asked = _Asked(config, hardware)
    plan = asked.plan(asked.layout)
    print(f"plan of {config.run.name} on {hardware.name}\n{plan.layout}\n")
    print(table(plan))
    print()
    print(rates_table(hardware))
    if memory := plan.too_large:
        raise UserError(
            f"{memory.role} needs {size(memory.peak)}iB of a card and {size(plan.limits[memory.role])}iB are there "
            f"({HEADROOM:.0%} of what is free when idle); {asked.way_out(memory)}"
        )


def _hardware(kind: str) -> Hardware:
    if kind not in ("cpu", NPU):
        raise UserError(
            f"device.kind={kind}: npd_ascend/planner/rates.py has no rates of such a card, so nothing can be planned; "
            f"`npd run --dry-run` checks all else"
        )
    return ASCEND if kind == NPU else this_host()


class _Asked:
    """What a configuration asks for, measured in tokens once."""

    def __init__(self, config: Config, hardware: Hardware):
        self._config, self._hardware = config, hardware
        self._student = read_config(config.student.path)
        tokenizer, parallel = ChatTokenizer(config.student.path), config.parallel
        train = config.npd or config.sft
        self.layout = Layout(
            tp=parallel.tp,
            dp=parallel.dp,
            sequence_parallel=parallel.sequence_parallel,
            recompute=parallel.recompute,
            pack_tokens=train.pack_tokens,
            packs_per_rank=1,  # until the samples are counted
        )
        gold = gold_samples(config, tokenizer) if config.sft else []
        self._gold_tokens = sum(len(sample.token_ids) for sample in gold)
        self._gold_samples = len(gold)
        prompts = [p for shard in wanted_shards(config, tokenizer) for p, _ in shard] if config.npd else []
        self._longest_prompt = max((len(prompt.token_ids) for prompt in prompts), default=0)
        if config.npd:
            self._work = Workload(
                samples=len(prompts),
                prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts) / len(prompts),
                answer_tokens=config.rollout.max_new_tokens,
                epochs=1 if config.npd.stream else config.npd.epochs,  # every pass of a stream has prompts of its own
                sets=len(config.npd.phases),
            )
        packs = self._npd_packs_per_step() if config.npd else train.packs_per_step
        self.layout = replace(self.layout, packs_per_rank=math.ceil(packs / parallel.dp))

    def _npd_packs_per_step(self) -> float:
        """A step of a stream takes whole shards, as many packs as they fill."""
        npd = self._config.npd
        if npd.stream is None:
            return npd.packs_per_step
        return npd.stream.shards_per_step * self._config.rollout.batch_size * self._work.mean.tokens / npd.pack_tokens

    def plan(self, layout: Layout) -> Plan:
        config, hardware = self._config, self._hardware
        limit = int(HEADROOM * (hardware.memory.value - hardware.idle.value))
        ranks, processes = layout.tp * layout.dp, config.processes
        sharing = {"rollout": processes.rollout, "teacher": processes.teacher} if hardware.shared else {}
        others = ranks if hardware.shared else 1
        memory, times = [], []
        if config.sft:
            sft = replace(
                layout,
                pack_tokens=min(config.sft.pack_tokens, layout.pack_tokens) if config.npd else layout.pack_tokens,
                packs_per_rank=math.ceil(config.sft.packs_per_step / layout.dp),
            )
            memory.append(self._trainer("sft", sft, sft.pack_tokens))
            rate = train_tokens_per_s(
                self._student,
                sft,
                DTYPES[config.student.dtype],
                hardware,
                Samples(self._gold_tokens / self._gold_samples, 1.0),
            )
            tokens = self._gold_tokens * config.sft.epochs
            times.append(StageTime("sft", layout.tp * layout.dp, tokens, tokens / rate))
        if config.npd:
            memory += self._npd_memory(layout)
            times += self._npd_times(layout)
        limits = {one.role: limit // sharing.get(one.role, others) for one in memory}
        return Plan(layout=layout, limits=limits, memory=memory, times=times)

    def _trainer(self, role: str, layout: Layout, answer_tokens: int) -> Memory:
        config, kind = self._config, self._config.device.kind
        with countable(config.kernels) as kernels:
            return trainer_memory(
                role,
                self._student,
                layout,
                DTYPES[config.student.dtype],
                device=kind,
                answer_tokens=answer_tokens,
                kernels=kernels,
                loss_impl=config.kernels.loss,
                group_bytes=group_bytes(kind),
            )

    def _npd_memory(self, layout: Layout) -> list[Memory]:
        config, rollout, kind = self._config, self._config.rollout, self._config.device.kind
        dtype = DTYPES[rollout.dtype]
        roles = [
            rollout_memory(
                self._student,
                dtype,
                batch=rollout.batch_size,
                prompt_tokens=self._longest_prompt,
                new_tokens=rollout.max_new_tokens,
                kv_cache_bytes=None if rollout.engine == "hf" else int(rollout.kv_cache_gib * 2**30),
            )
        ]
        if config.teacher.engine == "local":
            dtypes, teacher = (DTYPES[config.teacher.dtype], dtype), read_config(config.teacher.path)
            with countable(config.kernels) as kernels:
                pack_tokens = config.teacher.pack_tokens
                roles.append(teacher_memory(teacher, self._student, dtypes, pack_tokens, device=kind, kernels=kernels))
        return [*roles, self._trainer("distill", layout, int(self._work.mean.answer_share * layout.pack_tokens))]

    def _npd_times(self, layout: Layout) -> list[StageTime]:
        config, rollout = self._config, self._config.rollout
        return cycle(
            (self._student, DTYPES[config.student.dtype]),
            (read_config(config.teacher.path), DTYPES[config.teacher.dtype]),
            (DTYPES[rollout.dtype], rollout.batch_size if rollout.engine == "hf" else _VLLM_BATCH),
            layout,
            self._work,
            self._hardware,
            processes=(config.processes.rollout, config.processes.teacher),
        )

    def way_out(self, memory: Memory) -> str:
        if memory.role == "rollout":
            return "lower rollout.batch_size, rollout.kv_cache_gib or rollout.max_new_tokens"
        if memory.role == "teacher":
            return "lower teacher.pack_tokens, or put the teacher behind a server (teacher.engine=served)"
        fitting = [plan for plan in map(self.plan, self._other_layouts()) if not self._trainer_too_large(plan)]
        if not fitting:
            return "no layout of these cards fits; take more cards or a smaller student"
        longest = max(plan.layout.pack_tokens for plan in fitting)
        best = min(
            (plan for plan in fitting if plan.layout.pack_tokens == longest), key=lambda plan: plan.times[-1].seconds
        )
        return f"this fits: {best.layout}"

    @staticmethod
    def _trainer_too_large(plan: Plan) -> bool:
        return any(m.peak > plan.limits[m.role] for m in plan.memory if m.role in ("sft", "distill"))

    def _other_layouts(self) -> Iterator[Layout]:
        """Every way to cut the model over the same cards; shorter packs only while no longer one was there."""
        cards = self.layout.tp * self.layout.dp
        packs = self.layout.packs_per_rank * self.layout.dp
        shortest = self._work.mean.tokens if self._config.npd else self._gold_tokens / self._gold_samples
        tokens = self.layout.pack_tokens
        while tokens >= shortest and tokens * 8 >= self.layout.pack_tokens:
            for tp in (n for n in range(1, cards + 1) if cards % n == 0 and refusal(self._student, n) is None):
                for recompute in ("off", "selective", "full"):
                    yield Layout(
                        tp=tp,
                        dp=cards // tp,
                        sequence_parallel=tp > 1,
                        recompute=recompute,
                        pack_tokens=tokens,
                        packs_per_rank=math.ceil(packs * tp / cards),
                    )
            tokens //= 2


def table(plan: Plan) -> str:
    """Bytes of a card per role (M: 2^20, G: 2^30), and the time of its stage."""
    heads = ["role", *(part.replace("_", " ") for part in _PARTS), "of", "tokens", "tokens/s", "hours", "card-hours"]
    stages = {"teacher" if time.stage == "score" else time.stage: time for time in plan.times}
    rows = []
    for memory in plan.memory:
        time, limit = stages[memory.role], size(plan.limits[memory.role])
        parts = [size(value) if (value := getattr(memory, part)) else "-" for part in _PARTS]
        rate = [f"{time.tokens:,.0f}", f"{time.tokens / time.seconds:,.0f}"]
        rows.append(
            [
                memory.role,
                *parts,
                limit,
                *rate,
                f"{time.seconds / 3600:.2f}",
                f"{time.card_hours:.2f}",
            ]
        )
    return _aligned([heads, *rows])


def rates_table(hardware: Hardware) -> str:
    return _aligned(
        [["rate", "value", "source"], *([name, _scaled(r.value, r.unit), r.source] for name, r in hardware.rows())],
        left=(0, 2),
    )


def _aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    return "\n".join("  ".join(pad[i](cell, widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows)


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:.1f} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def size(count: float) -> str:
    """Bytes in M or G, 2^20 and 2^30."""
    return f"{count / 2**30:.1f} G" if count >= 2**30 else f"{count / 2**20:.0f} M"
