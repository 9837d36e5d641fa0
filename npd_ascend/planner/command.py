"""The plan of a run as a table, and the layout that fits where the configured one does not."""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

import torch

from npd_ascend.config import Config
from npd_ascend.device import DTYPES, NPU, group_bytes
from npd_ascend.errors import UserError
from npd_ascend.model.families import read_config
from npd_ascend.parallel.launch import ranks_of
from npd_ascend.parallel.plan import refusal
from npd_ascend.placement import recipe, share
from npd_ascend.planner.fused import countable
from npd_ascend.planner.memory import (
    VLLM_REQUESTS,
    Layout,
    Memory,
    beside_reference,
    bytes_of_set,
    rollout_memory,
    teacher_memory,
    trainer_memory,
)
from npd_ascend.planner.rates import ASCEND, Hardware, this_host
from npd_ascend.planner.timing import Samples, StageTime, Workload, answering, cycle, train_tokens_per_s, training
from npd_ascend.planner.transfer import beside_receiver, beside_sender
from npd_ascend.prompts import Wanted, grpo_shards, wanted_shards
from npd_ascend.ranks import this_node
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.samples import gold_samples

HEADROOM = 0.9  # of a card: the rest is for fragments, workspaces of operators and the runtime itself
_PARTS = (
    *("weights", "gradients", "optimizer", "activations", "loss", "kv_cache"),
    *("collectives", "transfer", "checkpoint", "peak"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    layout: Layout
    limits: dict[str, int]  # role -> bytes of a card, or of a process of a host that its like share
    memory: list[Memory]
    times: list[StageTime]


def print_plan(config: Config) -> None:
    """Print memory, time and rates of a run. UserError names what does not fit, and what would."""
    hardware = _hardware(config.device.kind)
    asked = _Asked(config, hardware)
    plan = asked.plan(asked.layout)
    print(f"plan of {config.run.name} on {hardware.name}\n{plan.layout}\n")
    print(table(plan))
    if config.npd and not config.npd.stream:
        held, of_one = held_of_a_set(config, asked.work.samples, asked.work.prompt_tokens)
        print(f"\nprocesses of a host that hold a set of rollouts at a time: {held}, up to {size(of_one)}iB each")
    print()
    print(rates_table(hardware))
    _refuse_too_large(asked, plan, HEADROOM, {memory.role for memory in plan.memory})


def check_that_it_fits(config: Config, roles: Container[str]) -> None:
    """The same UserError where not even all of a card would do for one of these roles, and nothing printed."""
    asked = _Asked(config, _hardware(config.device.kind))
    _refuse_too_large(asked, asked.plan(asked.layout), 1.0, roles)


def held_of_a_set(config: Config, samples: int, prompt_tokens: float) -> tuple[int, int]:
    """(processes of this node that hold a set at the same time, bytes of its memory that each holds at most): every
    answer as long as it may be, and all of them kept. prompt_tokens: their mean.

    The trainer's ranks do, the teacher's workers, which look for duplicates among all, and with npd.overlap both.
    """
    answer, node = config.rollout.max_new_tokens, this_node()
    of_one = bytes_of_set(samples, prompt_tokens + answer, answer, config.teacher.top_k)
    ranks = len(ranks_of(node, config.parallel.tp * config.parallel.dp))
    held = 0
    for group in recipe(config):
        here = (process for process in share(config, group, node) if not (config.processes.ray and process.needs))
        roles = [process.arguments[0] for process in here]
        held = max(held, ranks * roles.count("distill") + roles.count("score"))
    return held, of_one


def _refuse_too_large(asked: "_Asked", plan: Plan, share: float, roles: Container[str]) -> None:
    for memory in _too_large(plan, share, roles):
        limit = plan.limits[memory.role] * share / HEADROOM
        raise UserError(
            f"{memory.role} needs {size(memory.peak)}iB of a card and {size(limit)}iB are there "
            f"({share:.0%} of what is free when idle); {asked.way_out(memory, share, roles)}"
        )


def _too_large(plan: Plan, share: float, roles: Container[str]) -> list[Memory]:
    """share: of what is free of a card; the limits of the plan are HEADROOM of it."""
    return [
        memory
        for memory in plan.memory
        if memory.role in roles and memory.peak > plan.limits[memory.role] * share / HEADROOM
    ]


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
        train = config.npd or config.grpo or config.sft
        self.layout = Layout(
            tp=parallel.tp,
            dp=parallel.dp,
            sequence_parallel=parallel.sequence_parallel,
            recompute=parallel.recompute,
            pack_tokens=train.pack_tokens,
            packs_per_rank=1,  # until the samples are counted
            section="npd" if config.npd else "grpo" if config.grpo else "sft",
        )
        gold = gold_samples(config, tokenizer) if config.sft else []
        self._gold_tokens = sum(len(sample.token_ids) for sample in gold)
        self._gold_samples = len(gold)
        if config.npd:
            # every pass of a stream has prompts of its own
            passes = 1 if config.npd.stream else config.npd.epochs
            shards = wanted_shards(config, tokenizer)
            self.work, self._longest_prompt = self._workload(shards, passes, len(config.npd.phases))
        if config.grpo:
            self._grpo_work, self._longest_problem = self._workload(grpo_shards(config, tokenizer), 1, 1)
        self.layout = self._with_packs_of(self.layout, self.layout.section)

    def _workload(self, shards: list[list[Wanted]], epochs: int, sets: int) -> tuple[Workload, int]:
        """And the tokens of the longest prompt."""
        lens = [len(prompt.token_ids) for shard in shards for prompt, _ in shard]
        answer, mean = self._config.rollout.max_new_tokens, sum(lens) / len(lens)
        work = Workload(samples=len(lens), prompt_tokens=mean, answer_tokens=answer, epochs=epochs, sets=sets)
        return work, max(lens)

    def _with_packs_of(self, layout: Layout, section: str) -> Layout:
        """The packs of a step of sft, npd or grpo; shorter ones than configured if the layout's are.

        A step of a stream takes whole shards and one of GRPO whole groups, as many packs as they fill.
        """
        config = self._config
        stage = getattr(config, section)
        tokens = layout.pack_tokens if section == layout.section else stage.pack_tokens
        if layout.pack_tokens < self.layout.pack_tokens:
            tokens = min(tokens, layout.pack_tokens)
        if section == "grpo":
            packs = stage.groups_per_step * stage.group_size * self._grpo_work.mean.tokens / tokens
        elif section == "npd" and stage.stream:
            packs = stage.stream.shards_per_step * config.rollout.batch_size * self.work.mean.tokens / tokens
        else:
            packs = stage.packs_per_step
        return replace(layout, pack_tokens=tokens, packs_per_rank=math.ceil(packs / layout.dp))

    def plan(self, layout: Layout) -> Plan:
        config, hardware = self._config, self._hardware
        limit = int(HEADROOM * (hardware.memory.value - hardware.idle.value))
        ranks, processes = layout.tp * layout.dp, config.processes
        sharing = {"rollout": processes.rollout, "teacher": processes.teacher, "grpo-rollout": processes.rollout}
        sharing = sharing if hardware.shared else {}
        others = ranks if hardware.shared else 1
        memory, times = [], []
        if config.sft:
            sft = self._with_packs_of(layout, "sft")
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
        if config.grpo:
            grpo = self._with_packs_of(layout, "grpo")
            memory += self._grpo_memory(grpo)
            times += self._grpo_times(grpo)
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
        config, dtype, kind = self._config, DTYPES[self._config.rollout.dtype], self._config.device.kind
        roles = [self._rollout("rollout", self._longest_prompt)]
        if config.teacher.engine == "local":
            dtypes, teacher = (DTYPES[config.teacher.dtype], dtype), read_config(config.teacher.path)
            with countable(config.kernels) as kernels:
                pack_tokens = config.teacher.pack_tokens
                roles.append(teacher_memory(teacher, self._student, dtypes, pack_tokens, device=kind, kernels=kernels))
        trainer = self._trainer("distill", layout, int(self.work.mean.answer_share * layout.pack_tokens))
        if config.npd.stream:
            roles[0], trainer = self._joined(roles[0], trainer)
        return [*roles, trainer]

    def _joined(self, generator: Memory, trainer: Memory) -> tuple[Memory, Memory]:
        """Both with what the weights take on their way from one to the other."""
        config, kind, dtype = self._config, self._config.device.kind, DTYPES[self._config.rollout.dtype]
        if config.rollout.weights == "disk":
            return generator, trainer
        between_devices = config.rollout.weights == "device"
        of_card = between_devices or kind == "cpu"
        group = group_bytes(kind) if between_devices else 0
        generator = beside_receiver(
            generator, self._student, dtype, in_buckets=between_devices, of_card=of_card, group_bytes=group
        )
        groups = config.processes.rollout * group
        return generator, beside_sender(trainer, self._student, dtype, of_card=of_card, group_bytes=groups)

    def _rollout(self, role: str, longest_prompt: int) -> Memory:
        rollout = self._config.rollout
        memory = rollout_memory(
            self._student,
            DTYPES[rollout.dtype],
            batch=rollout.batch_size,
            prompt_tokens=longest_prompt,
            new_tokens=rollout.max_new_tokens,
            kv_cache_bytes=None if rollout.engine == "hf" else int(rollout.kv_cache_gib * 2**30),
            whole_prompts=self._config.device.kind == "cpu",
        )
        return replace(memory, role=role)

    def _grpo_memory(self, layout: Layout) -> list[Memory]:
        trainer = self._trainer("grpo", layout, int(self._grpo_work.mean.answer_share * layout.pack_tokens))
        if self._config.grpo.kl_weight:
            trainer = beside_reference(trainer)
        return list(self._joined(self._rollout("grpo-rollout", self._longest_problem), trainer))

    def _grpo_times(self, layout: Layout) -> list[StageTime]:
        config, work, hardware = self._config, self._grpo_work, self._hardware
        generators, model = config.processes.rollout, (self._student, DTYPES[config.student.dtype])
        return [
            answering(self._student, self._generator(), work, hardware, generators, "grpo-rollout"),
            training(model, layout, work, hardware, "grpo"),
        ]

    def _generator(self) -> tuple[torch.dtype, int]:
        """Its type, and how many requests it answers at once."""
        rollout = self._config.rollout
        batch = rollout.batch_size if rollout.engine == "hf" else min(rollout.batch_size, VLLM_REQUESTS)
        return DTYPES[rollout.dtype], batch

    def _npd_times(self, layout: Layout) -> list[StageTime]:
        config = self._config
        return cycle(
            (self._student, DTYPES[config.student.dtype]),
            (read_config(config.teacher.path), DTYPES[config.teacher.dtype]),
            self._generator(),
            layout,
            self.work,
            self._hardware,
            processes=(config.processes.rollout, config.processes.teacher),
        )

    def way_out(self, memory: Memory, share: float, roles: Container[str]) -> str:
        if memory.role.endswith("rollout"):
            return "lower rollout.batch_size, rollout.kv_cache_gib or rollout.max_new_tokens"
        if memory.role == "teacher":
            return "lower teacher.pack_tokens, or put the teacher behind a server (teacher.engine=served)"
        trainers = {role for role in ("sft", "distill", "grpo") if role in roles}
        fitting = [plan for plan in map(self.plan, self._other_layouts()) if not _too_large(plan, share, trainers)]
        if not fitting:
            return "no layout of these cards fits; take more cards or a smaller student"
        longest = max(plan.layout.pack_tokens for plan in fitting)
        best = min(
            (plan for plan in fitting if plan.layout.pack_tokens == longest), key=lambda plan: plan.times[-1].seconds
        )
        others = [name for name in ("sft", "grpo") if getattr(self._config, name) and name != best.layout.section]
        shorter = {
            name: tokens
            for name in others
            if (tokens := self._with_packs_of(best.layout, name).pack_tokens) < getattr(self._config, name).pack_tokens
        }
        return f"this fits: {best.layout}" + "".join(f" {name}.pack_tokens={n}" for name, n in shorter.items())

    def _other_layouts(self) -> Iterator[Layout]:
        """Every way to cut the model over the same cards; shorter packs only while no longer one was there."""
        cards = self.layout.tp * self.layout.dp
        packs = self.layout.packs_per_rank * self.layout.dp
        works = {"npd": lambda: self.work.mean.tokens, "grpo": lambda: self._grpo_work.mean.tokens}
        shortest = works.get(self.layout.section, lambda: self._gold_tokens / self._gold_samples)()
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
                        section=self.layout.section,
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
