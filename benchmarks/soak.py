"""Kills every kind of process of live runs at random, and counts what was lost: nothing may be.

    python benchmarks/soak.py [--kills 50] [--seed N] [--ranks N] [--folder FOLDER] [key=value ...]

Runs configs/addition_cpu.yaml with npd.stream (made small: 2 rollout and 2 teacher processes, a trainer of N
tensor-parallel ranks) and what is overridden, and every few seconds SIGKILLs one of its processes, a single rank, or
the supervisor, which takes all others along and is then typed again; runs follow each other until all kills are spent.
No kind of process gets more than its share of a run's kills, else those that start first would get most of them. After
each run:

- every wanted sample was generated once and decided once, every kept one stands in one pack of one step;
- no sample was trained on more than max_lag versions after the one that generated it;
- a second trainer, given nothing but the stream and version 0, ends with the same bits.

Prints one JSON object per run and exits with 1 at the first that fails.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from npd_ascend.pacing import open_pacing
from npd_ascend.runfolder import RunFolder, reopen_run
from npd_ascend.tokenizer import ChatTokenizer

CONFIG = Path(__file__).parent.parent / "configs" / "addition_cpu.yaml"
SETTINGS = [
    "data.gold.count=200",
    "data.prompts.count=1500",
    "data.heldout.count=60",
    "sft.epochs=4",
    "npd.epochs=4",
    "npd.refresh_after=[]",
    "npd.pack_tokens=512",
    "npd.checkpoint_every_steps=4",
    "npd.stream={publish_every: 6, max_lag: 1}",
    "rollout.batch_size=64",
    "filters.tau=0.95",
    "device.threads=1",
    "processes={rollout: 2, teacher: 2, restarts: 50}",
]
MOST_PER_RUN = 15
ROLES = ("rollout", "score", "distill", "sft", "run", "rank")  # the last where the trainer has several


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the runs stay; default: a folder that is removed")
    parser.add_argument("overrides", nargs="*", help="for example rollout.engine=vllm rollout.weights=memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, rng, left, number = args.folder or Path(temporary), random.Random(args.seed), args.kills, 0
        while left > 0:
            started, run = time.monotonic(), folder / f"run{number}"
            roles = ROLES if args.ranks > 1 else [role for role in ROLES if role != "rank"]
            settings = [f"parallel.tp={args.ranks}", *args.overrides]
            kills = run_with_kills(run, settings, rng, min(MOST_PER_RUN, left), roles)
            left, number = left - kills.total(), number + 1
            faults = check(run)
            row = {"run": number, "seed": args.seed, "kills": dict(kills), "left": left, "faults": faults}
            print(json.dumps(row | {"seconds": round(time.monotonic() - started)}), flush=True)
            if faults:
                return 1
    return 0


def run_with_kills(run: Path, more: list[str], rng: random.Random, most: int, roles: Sequence[str]) -> Counter:
    """The run to its end; what was killed on the way, by role."""
    kills: Counter = Counter()
    log = run.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with log.open("a") as output:
            supervisor = subprocess.Popen(command(run, more), stdout=output, stderr=output)
        while supervisor.poll() is None and kills.total() < most:
            _sleep(supervisor, rng.uniform(0.5, 6))
            share = -(-most // len(roles))
            if victim := _victim(supervisor.pid, rng, spared={role for role in kills if kills[role] >= share}):
                role, pid = victim
                os.kill(pid, signal.SIGKILL)
                kills[role] += 1
        if supervisor.wait() == 0:
            return kills
        if supervisor.returncode != -signal.SIGKILL:
            raise SystemExit(f"npd run ended with {supervisor.returncode}; see {log}")


def command(run: Path, more: list[str]) -> list[str]:
    settings = [f"run.folder={run}", *SETTINGS, *more]
    return [sys.executable, "-m", "npd_ascend", "run", "--config", str(CONFIG), *settings]


def _sleep(process: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _victim(supervisor: int, rng: random.Random, spared: set[str]) -> tuple[str, int] | None:
    """(role, pid), each role that is there as likely as the others but for those spared, evaluation and report."""
    found: dict[str, list[int]] = {"run": [supervisor]}
    for pid in _children(supervisor):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except FileNotFoundError:
            continue
        role = words[3] if len(words) > 3 else ""  # python -m npd_ascend ROLE
        if role in ROLES:
            found.setdefault(role, []).append(pid)
        if role in ("sft", "distill") and (ranks := _children(pid)):
            found["rank"] = ranks
    if len(found) == 1 or not found.keys() - spared:
        return None
    role = rng.choice(sorted(found.keys() - spared))
    return role, rng.choice(found[role])


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def check(folder: Path) -> list[str]:
    """What is wrong with a run that ended."""
    run = reopen_run(folder)
    return [*_lost_or_twice(run), *_too_old(run), *_other_bits_when_trained_again(run)]


def _lost_or_twice(run: RunFolder) -> list[str]:
    pacing = open_pacing(run.config, ChatTokenizer(run.config.student.path))
    wanted = [(prompt.prompt_id, index) for shard in pacing.shards for prompt, index in shard]
    kept, decided, generated = Counter(), Counter(), Counter()
    for shard, entry in run.stream.shards("rollouts").items():
        for rollout in run.stream.read_shard(entry):
            generated[(rollout.prompt_id, int(rollout.sample_id.rsplit("/", 1)[1]))] += 1
        for decision in run.stream.read_shard(run.stream.shards("decisions")[shard]):
            decided[decision.sample_id] += 1
            kept[decision.sample_id] += decision.kept
    trained = Counter(name for step in _steps(run) for pack in step["packs"] for name in pack)
    faults = []
    if generated != Counter(wanted):
        faults.append(f"{len(wanted)} samples wanted, {generated.total()} generated")
    if set(decided.values()) != {1} or decided.total() != len(wanted):
        faults.append(f"{len(wanted)} samples, {decided.total()} decisions")
    if trained != +kept:
        faults.append(f"{(+kept).total()} samples kept, {trained.total()} trained")
    steps = [step["step"] for step in _steps(run)]
    if steps != list(range(pacing.steps)):
        faults.append(f"packs.jsonl: steps {steps} in the place of {pacing.steps}")
    return faults


def _too_old(run: RunFolder) -> list[str]:
    stream = run.config.npd.stream
    lags = [
        step["step"] // stream.publish_every - int(name.split("/v")[-1].split("/")[0])
        for step in _steps(run)
        for pack in step["packs"]
        for name in pack
    ]
    return [f"a sample was {max(lags)} versions old when it was trained on"] if max(lags) > stream.max_lag else []


def _other_bits_when_trained_again(run: RunFolder) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        again = Path(name) / "run"
        again.mkdir()
        shutil.copy(run.path / "config.yaml", again)
        for part in ("stream", "weights/v0"):
            shutil.copytree(run.path / part, again / part)
        (again / "logs").mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "npd_ascend", "distill", "--run", str(again)], capture_output=True, check=False
        )
        if done.returncode:
            return [f"npd distill on the stream alone ended with {done.returncode}"]
        students = [(path / "student" / "model.safetensors").read_bytes() for path in (run.path, again)]
        return [] if students[0] == students[1] else ["trained again from the stream, the student has other bits"]


def _steps(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.packs.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
