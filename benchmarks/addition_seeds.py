"""Is it NPD, or only more training? Several seeds of configs/addition_cpu.yaml against more SFT.

    python benchmarks/addition_seeds.py [--seeds 0 1 2 3] [--threads 1] [--folder runs/addition_seeds]

Arms, each scored on the same held-out sums: the SFT student where NPD starts; NPD; and SFT continued from
that student on the same gold sums, with NPD's own optimizer settings, for as many training tokens as NPD took.
Prints a table and one JSON object. A finished seed is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from npd_ascend.config import load_config
from npd_ascend.metrics import read_metrics

CONFIG = Path(__file__).parent.parent / "configs" / "addition_cpu.yaml"
ARMS = ("sft", "npd", "sft continued")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/addition_seeds"))
    args = parser.parse_args()
    scores = {seed: one_seed(seed, args.folder / f"seed{seed}", args.threads) for seed in args.seeds}
    print("seed  " + "  ".join(f"{arm:>14}" for arm in ARMS))
    for seed, row in scores.items():
        print(f"{seed:<4}  " + "  ".join(f"{row[arm]:14.4f}" for arm in ARMS))
    mean = {arm: statistics.mean(row[arm] for row in scores.values()) for arm in ARMS}
    print("mean  " + "  ".join(f"{mean[arm]:14.4f}" for arm in ARMS))
    print(json.dumps({"scores": scores, "mean": mean}))


def one_seed(seed: int, folder: Path, threads: int) -> dict[str, float]:
    """Exact match of each arm, and the tokens trained."""
    common, npd, config = [f"run.seed={seed}", f"device.threads={threads}"], folder / "npd", load_config(CONFIG)
    _npd("run", npd, *common)
    tokens = {
        stage: sum(row.get("train/tokens", 0) for row in read_metrics(npd) if row["stage"] == stage)
        for stage in ("sft", "npd")
    }
    more = round(tokens["npd"] / (tokens["sft"] / config.sft.epochs))
    sft_only = [*common, "npd=null", "teacher=null", "rollout=null"]
    as_npd = [f"sft.optimizer={json.dumps(config.npd.optimizer.model_dump())}"]
    start = [f"student.path={npd / 'weights' / 'v0'}", "student.init=pretrained"]
    _npd("run", folder / "continued", *sft_only, *as_npd, *start, f"sft.epochs={more}")
    return {
        "sft": _score(npd, "sft"),
        "npd": _score(npd, "npd"),
        "sft continued": _score(folder / "continued", "sft"),
        "sft tokens": tokens["sft"],
        "npd tokens": tokens["npd"],
    }


def _npd(command: str, folder: Path, *overrides: str) -> None:
    arguments = [sys.executable, "-m", "npd_ascend", command, "--config", str(CONFIG), f"run.folder={folder}"]
    subprocess.run([*arguments, *overrides], check=True, stdout=subprocess.DEVNULL)


def _score(folder: Path, name: str) -> float:
    return json.loads((folder / "evaluations.json").read_text())[name]["exact_match"]


if __name__ == "__main__":
    main()
