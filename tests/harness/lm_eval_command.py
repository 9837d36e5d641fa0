"""lm-eval's own command on the benchmarks of `npd eval --benchmarks`, and the score of every question by either."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from lm_eval import tasks

from npd_ascend.evaluate.benchmarks import BENCHMARKS, TASKS

ORIGINALS = Path(tasks.__file__).parent
# lm-eval's definition, split that is asked; the groups have a definition and a configuration of the data per subject
GROUPS = {
    "mmlu": ("mmlu/default/mmlu_*.yaml", "test"),
    "cmmlu": ("cmmlu/cmmlu_*.yaml", "test"),
    "ceval": ("ceval/ceval-valid_*.yaml", "val"),
}
SINGLE = {
    "gsm8k": (ORIGINALS / "gsm8k" / "gsm8k.yaml", "test"),
    "drop": (ORIGINALS / "drop" / "default.yaml", "validation"),
    "cluewsc": (TASKS / "cluewsc.yaml", "validation"),
    "math500": (ORIGINALS / "minerva_math" / "minerva_math500.yaml", "test"),
    "gpqa_diamond": (ORIGINALS / "gpqa" / "cot_zeroshot" / "gpqa_diamond_cot_zeroshot.yaml", "train"),
    "ifeval": (ORIGINALS / "ifeval" / "ifeval.yaml", "train"),
    "mbpp": (ORIGINALS / "mbpp" / "mbpp_instruct.yaml", "test"),
    "humaneval": (ORIGINALS / "humaneval" / "humaneval_instruct.yaml", "test"),
}


def _with_functions(text: str) -> str:
    """YAML's tags are no text, and safe_dump has none for a function."""
    return re.sub(r"'(!function) ([\w.]+)'", r"\1 \2", text)


def subjects(name: str) -> dict[str, str]:
    """Of a benchmark: lm-eval's file -> the configuration of the data."""
    return {str(file): yaml.safe_load(file.read_text())["dataset_name"] for file in ORIGINALS.glob(GROUPS[name][0])}


def scores_of(folder: Path) -> dict[str, list[float]]:
    names = json.loads((folder / "results.json").read_text())["benchmarks"]
    return {
        name: [row["score"] for row in json.loads((folder / name / "questions-0.json").read_text())] for name in names
    }


def lm_eval_command(
    folder: Path,
    model: Path,
    data: Mapping[str, Path],
    shots: Mapping[str, int],
    *more: str,
    new_tokens: int,
    timeout_s: int = 900,
) -> dict[str, list[float]]:
    """Scores of every question by `lm-eval run --model hf`; only where the data lie is changed, and what we change too.

    shots: examples before a question, none where a benchmark is missing. more: words behind the command.
    """
    (folder / "tasks").mkdir(parents=True)
    for name, (base, split) in SINGLE.items():
        if name not in data:
            continue
        local = {
            "include": str(base),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(data[name])}},
            "training_split": None,
            "num_fewshot": shots.get(name, 0),
            **BENCHMARKS[name].named_changes,
        }
        local |= {} if name in shots else {"fewshot_split": None}
        (folder / "tasks" / f"{name}.yaml").write_text(_with_functions(yaml.safe_dump(local, width=math.inf)))
    for name in GROUPS.keys() & data.keys():
        for base, subject in subjects(name).items():
            local = {
                "include": base,
                "task": f"local_{name}_{subject}",
                "tag": f"local_{name}",
                "dataset_path": str(data[name]),
                "description": "",  # model.system_prompt: none
                "num_fewshot": shots.get(name, 0),
            }
            (folder / "tasks" / f"{name}_{subject}.yaml").write_text(yaml.safe_dump(local))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--include_path", str(folder / "tasks")]
    command += [
        "--tasks",
        *(f"local_{name}" for name in data),
        "--apply_chat_template",
        "--fewshot_as_multiturn",
        "true",
    ]
    command += ["--gen_kwargs", f"max_gen_toks={new_tokens}", "--output_path", str(folder / "out"), "--log_samples"]
    command += more
    # a cache of its own: GPQA shuffles its choices, and would find them shuffled
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    subprocess.run(command, check=True, env=env, timeout=timeout_s)
    scores = {}
    for name in data:
        files = (folder / "out").rglob(f"samples_local_{name}_*.jsonl")
        rows = [
            json.loads(line)
            for file in sorted(files, key=lambda file: re.sub(r"_\d{4}-.*", "", file.name))  # without the date
            for line in file.read_text().split("\n")[:-1]
        ]
        asked = BENCHMARKS[name]
        scores[name] = [float(row[asked.metric]) for row in rows if row["filter"] == asked.filter]
    return scores
