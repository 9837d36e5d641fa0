"""lm-eval at work: one pass over one benchmark, question by question. What depends on lm-eval's version is here."""

import logging
import os
import random
import warnings
from collections.abc import Mapping
from copy import copy
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from npd_ascend.errors import UserError
from npd_ascend.evaluate.benchmarks import BENCHMARKS, Benchmark
from npd_ascend.evaluate.settings import BenchmarkSettings, EvalSettings

_WAY_OUT = "pip install -r requirements-eval.txt"


def require_lm_eval() -> str:
    """Its version; UserError if it is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(f"npd eval --benchmarks asks lm-eval, but the package lm_eval is not installed; {_WAY_OUT}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it reports every setting that it takes from us
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lm_eval|datasets")
    return version("lm_eval")


class Harness:
    """The benchmarks' tasks, lm-eval's and our own. digests: of the benchmarks' data, by their name."""

    def __init__(self, settings: EvalSettings, digests: Mapping[str, str]):
        from lm_eval import tasks

        self._settings, self._digests = settings, digests
        # by itself it reads all of its 14 000 definitions, which takes seconds
        folders: list[Any] = [Path(tasks.__file__).parent / benchmark.folder for benchmark in BENCHMARKS.values()]
        self._manager = tasks.TaskManager(include_path=folders, include_defaults=False)
        self._loaded: dict[str, Any] = {}  # tasks with their data, by benchmark

    def rehearse(self, name: str, chosen: BenchmarkSettings, lm: Any) -> None:
        """All of `ask` with an lm that asks nobody. UserError, before hours of answers, for rows that do not fit the
        task and for prompts that do not fit the model."""
        from jinja2 import TemplateError

        try:
            self.ask(name, chosen, lm)
        except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
            place, tried = (
                (f"benchmarks.{name}.data", chosen.data) if chosen.data else (f"benchmarks.{name}", "the hub")
            )
            raise UserError(
                f"{place}: a row or split from {tried} does not fit lm-eval's task of {BENCHMARKS[name].title} "
                f"({type(error).__name__}: {_line(error)}); want rows and splits as on the hub, see docs/eval.md"
            ) from error

    def ask(self, name: str, chosen: BenchmarkSettings, lm: Any) -> list[dict]:
        """Rows of one pass: task, question (its number there), score in 0..1, answer after the task's filter, target.

        UserError if the data cannot be had or lack fields.
        """
        from lm_eval import evaluate
        from lm_eval.defaults import DEFAULT_RANDOM_SEED

        benchmark = BENCHMARKS[name]
        random.seed(DEFAULT_RANDOM_SEED)  # as lm-eval does before it loads: GPQA shuffles its choices then
        if name not in self._loaded:  # a rehearsal and every sample ask the same
            self._loaded[name] = self._load(name, chosen, benchmark)
        # copies, since lm-eval leaves all prompts and answers in the tasks that it asks
        loaded = self._loaded[name] | {"tasks": {key: copy(task) for key, task in self._loaded[name]["tasks"].items()}}
        for task in loaded["tasks"].values():
            _ask_as_chosen(task, chosen, benchmark)
        # not simple_evaluate, which asks git, pip and the hardware for a report that nobody reads here
        results = evaluate(
            lm,
            loaded,
            limit=chosen.questions,
            bootstrap_iters=0,  # its standard errors; ours are over questions, whatever the metric
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=name in self._settings.run_code_of,
        )
        return [
            {
                "task": task,
                "question": row["doc_id"],
                "score": float(row[benchmark.metric]),
                "answer": row["filtered_resps"][0] if benchmark.metric != "acc" else None,
                "target": str(row["target"]),
            }
            for task, rows in sorted(results["samples"].items())
            for row in rows
            if row["filter"] == benchmark.filter
        ]

    def _load(self, name: str, chosen: BenchmarkSettings, benchmark: Benchmark) -> Any:
        """lm-eval's tasks of the benchmark with their data, as its TaskManager gives them."""
        import datasets

        if benchmark.runs_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the user has named it in run_code_of
        changes = self._changes(name, chosen, benchmark)
        spec = {"group": f"npd_{name}", "task": [{"task": leaf} | changes for leaf in self._leaves(benchmark.task)]}
        place = f"benchmarks.{name}.data" if chosen.data else f"benchmarks.{name}"
        try:
            loaded = self._manager.load([spec])
        # not TypeError and LookupError: those come of rows, and `rehearse` says so
        except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
            tried = chosen.data or "the hub's data set"
            also = ", and have the hub's metric code_eval in the cache" if benchmark.runs_code else ""
            raise UserError(
                f"{place}: {benchmark.title} from {tried} cannot be loaded ({type(error).__name__}: "
                f"{_line(error)}); set benchmarks.{name}.data to a copy of the data set{also}, see docs/eval.md"
            ) from None
        for task in loaded["tasks"].values():
            rows = task.dataset[benchmark.split]
            missing = [field for field in benchmark.fields if field not in rows.column_names or None in rows[field]]
            if missing:  # lm-eval would write None into the prompt or want it for an answer
                raise UserError(
                    f"{place}: {chosen.data or 'the data set on the hub'} has rows of {task.config.task} without "
                    f"{', '.join(missing)}; {benchmark.title} wants {', '.join(benchmark.fields)} in every row, named "
                    f"as on the hub"
                )
        return loaded

    def _changes(self, name: str, chosen: BenchmarkSettings, benchmark: Benchmark) -> dict:
        """Of the task's definition."""
        changes: dict[str, Any] = {} if self._settings.model.system_prompt == "task" else {"description": ""}
        changes |= benchmark.changes
        if chosen.data and chosen.data.is_dir():
            # datasets knows a folder by its name, and would give the rows of another one or of an earlier day
            cache = self._settings.folder / "data" / self._digests[name][:16]
            changes |= {"dataset_path": str(chosen.data), "dataset_kwargs": {"cache_dir": str(cache)}}
        elif chosen.data:
            files = {"data_files": {benchmark.split: str(chosen.data)}}
            changes |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files, "training_split": None}
            changes |= {} if benchmark.own_shots else {"fewshot_split": None}
        return changes

    def _leaves(self, name: str) -> list[str]:
        """The tasks of a group. lm-eval 0.4.13 takes changes to single tasks, not to groups of tags."""
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self._manager.task_index[name]
        if entry.kind.name == "TAG":
            return sorted(entry.tags)
        if entry.kind.name == "GROUP":
            members = load_yaml(entry.yaml_path, resolve_func=False)["task"]
            return [leaf for member in members for leaf in self._leaves(member)]
        return [name]


def _ask_as_chosen(task: Any, chosen: BenchmarkSettings, benchmark: Benchmark) -> None:
    """As lm-eval's own command does with --num_fewshot, --gen_kwargs and its default seed."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    own_shots = task.get_config("num_fewshot")
    if own_shots != 0:  # a task that says none stays without
        task.set_config("num_fewshot", (own_shots or 0) if chosen.shots is None else chosen.shots)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    if benchmark.metric != "acc":
        changes: dict[str, Any] = {"do_sample": chosen.temperature > 0, "temperature": chosen.temperature}
        if chosen.max_new_tokens:
            changes["max_gen_toks"] = chosen.max_new_tokens
        task.set_config("generation_kwargs", changes, update=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
