"""NPD's cycle against on-policy distillation, both by `npd run`, on the device that a configuration names.

    python benchmarks/schedules.py --config FILE [--folder FOLDER] [--on-policy KEY=VALUE]... [key=value ...]

The cycle as configured; then the same start and as many passes over the same prompts, but with fresh answers in every
pass, new weights after every step and no answer by older ones (npd.stream with max_lag 0). --on-policy: what only the
second run has, such as its share of cards and a rollout.batch_size of one step. Prints one JSON object: answer tokens
trained an hour, from the first rollout to the last step; the held-out KL; seconds that new weights cost, by part. A
finished run is not made again.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from npd_ascend.metrics import read_metrics

ON_POLICY = ["npd.refresh_after=[]", "npd.stream={publish_every: 1, max_lag: 0}"]
WEIGHTS = ("publish/busy_s", "rollout/load_s", "sync/gather_s", "sync/wait_s", "sync/transfer_s", "sync/load_s")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/schedules"))
    parser.add_argument("--on-policy", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(words)


def on_policy_words(args: argparse.Namespace) -> list[str]:
    return [*args.overrides, *ON_POLICY, *args.on_policy]


def main() -> None:
    args = arguments()
    cycle, on_policy = (args.folder.absolute() / name for name in ("cycle", "on-policy"))
    run(args.config, cycle, args.overrides)
    if (sft := cycle / "weights" / "v0").exists() and not on_policy.exists():
        shutil.copytree(sft, on_policy / "weights" / "v0")
    run(args.config, on_policy, on_policy_words(args))
    rows = {folder.name: measure(folder) for folder in (cycle, on_policy)}
    ratio = rows["cycle"]["answer_tokens_per_hour"] / rows["on-policy"]["answer_tokens_per_hour"]
    print(json.dumps(rows | {"cycle / on-policy": ratio}, indent=2))


def run(config: Path, folder: Path, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "npd_ascend", "run", "--config", str(config), f"run.folder={folder}", *overrides]
    if (folder / "summary.json").exists():
        command.append("--dry-run")  # refuses a finished run of another configuration, and adds nothing to its times
    subprocess.run(command, check=True, stdout=sys.stderr)


def measure(folder: Path) -> dict:
    rows = read_metrics(folder)
    stages = [json.loads(line) for line in (folder / "logs" / "stages.jsonl").read_text().splitlines()]
    parts = [row for row in stages if row["stage"].startswith(("rollout", "score", "distill"))]
    seconds = max(row["started"] + row["seconds"] for row in parts) - min(row["started"] for row in parts)
    trained = sum(row["train/answer_tokens"] for row in rows if row["stage"] == "npd" and "train/answer_tokens" in row)
    spent = {name: [row[name] for row in rows if row.get(name)] for name in WEIGHTS}
    return {
        "seconds": round(seconds, 1),
        "answer_tokens": trained,
        "answer_tokens_per_hour": round(3600 * trained / seconds),
        "heldout_kl": json.loads((folder / "summary.json").read_text())["heldout_kl"]["last"],
        "versions that generated": len({row["rollout/version"] for row in rows if "rollout/version" in row}),
        "weights, mean s": {name: round(statistics.mean(values), 4) for name, values in spent.items() if values},
    }


if __name__ == "__main__":
    main()
