"""Kills every kind of process of live runs at random, and counts what was lost: nothing may be.

    python benchmarks/soak.py [--stage npd|grpo] [--kills 50] [--seed N] [--ranks N] [--folder FOLDER] [key=value ...]

Runs configs/addition_cpu.yaml with npd.stream, or configs/addition_grpo.yaml (made small: 2 rollout and 2 teacher
processes, or 2 that answer and one that rewards; a trainer of N tensor-parallel ranks) and what is overridden, and
every few seconds SIGKILLs one of its processes, a single rank, or the supervisor, which takes all others along and is
then typed again; runs follow each other until all kills are spent. No kind of process gets more than its share of a
run's kills, else those that start first would get most of them. After each run:

- every wanted sample was generated once and decided on or rewarded once, every one that says something stands in one
  pack of one step;
- of no shard is anything left that its worker had not committed;
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

from npd_ascend.config import GrpoConfig
from npd_ascend.pacing import open_grpo_pacing, open_pacing
from npd_ascend.rollout.journal import begun_shards
from npd_ascend.runfolder import RunFolder, reopen_run
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.policy_loss import group_advantages

CONFIGS = Path(__file__).parent.parent / "configs"
BOTH = ["data.gold.count=200", "data.heldout.count=60", "device.threads=1"]
SETTINGS = {
    "npd": [
        *("--config", str(CONFIGS / "addition_cpu.yaml"), *BOTH),
        "data.prompts.count=1500",
        "sft.epochs=4",
        "npd.epochs=4",
        "npd.refresh_after=[]",
        "npd.pack_tokens=512",
        "npd.checkpoint_every_steps=4",
        "npd.stream={publish_every: 6, max_lag: 1}",
        "rollout.batch_size=64",
        "filters.tau=0.95",
        "processes={rollout: 2, teacher: 2, restarts: 50}",
    ],
    "grpo": [
        *("--config", str(CONFIGS / "addition_grpo.yaml"), *BOTH),
        "sft.epochs=6",
        "grpo.steps=60",
        "grpo.groups_per_step=16",
        "grpo.group_size=4",
        "grpo.publish_every=4",
        "grpo.max_lag=1",
        "grpo.kl_weight=0.01",
        "grpo.rewards={exact_match: 1, format: 0.5}",
        "grpo.format='[0-9]{4}'",  # a few answers have it from the start, so that there is something to learn
        "grpo.checkpoint_every_steps=4",
        "rollout.batch_size=32",
        "processes={rollout: 2, restarts: 50}",
    ],
}
MOST_PER_RUN = 15
ROLES = {  # the last where the trainer has several
    "npd": ("rollout", "score", "distill", "sft", "run", "rank"),
    "grpo": ("grpo-rollout", "grpo-reward", "grpo", "sft", "run", "rank"),
}
TRAINERS = ("sft", "distill", "grpo")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=SETTINGS, default="npd")
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
            roles = [role for role in ROLES[args.stage] if role != "rank" or args.ranks > 1]
            settings = [*SETTINGS[args.stage], f"parallel.tp={args.ranks}", *args.overrides]
            kills = run_with_kills(run, settings, rng, min(MOST_PER_RUN, left), roles)
            left, number = left - kills.total(), number + 1
            faults = check(run)
            row = {
                "stage": args.stage,
                "run": number,
                "seed": args.seed,
                "kills": dict(kills),
                "left": left,
                "faults": faults,
            }
            print(json.dumps(row | {"seconds": round(time.monotonic() - started)}), flush=True)
            if faults:
                return 1
    return 0


def run_with_kills(run: Path, settings: list[str], rng: random.Random, most: int, roles: Sequence[str]) -> Counter:
    """The run to its end; what was killed on the way, by role."""
    kills: Counter = Counter()
    log = run.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with log.open("a") as output:
            supervisor = subprocess.Popen(command(run, settings), stdout=output, stderr=output)
        while supervisor.poll() is None and kills.total() < most:
            _sleep(supervisor, rng.uniform(0.5, 6))
            share = -(-most // len(roles))
            wanted = {role for role in roles if kills[role] < share}
            if victim := _victim(supervisor.pid, rng, wanted):
                role, pid = victim
                os.kill(pid, signal.SIGKILL)
                kills[role] += 1
        if supervisor.wait() == 0:
            return kills
        if supervisor.returncode != -signal.SIGKILL:
            raise SystemExit(f"npd run ended with {supervisor.returncode}; see {log}")


def command(run: Path, settings: list[str]) -> list[str]:
    return [sys.executable, "-m", "npd_ascend", "run", *settings, f"run.folder={run}"]


def _sleep(process: subprocess.Popen, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _victim(supervisor: int, rng: random.Random, wanted: set[str]) -> tuple[str, int] | None:
    """(role, pid), each wanted role that is there as likely as the others; None before and after the stages."""
    found: dict[str, list[int]] = {"run": [supervisor]}
    for pid in _children(supervisor):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except FileNotFoundError:
            continue
        role = words[3] if len(words) > 3 else ""  # python -m npd_ascend ROLE
        if any(role in roles for roles in ROLES.values()):
            found.setdefault(role, []).append(pid)
        if role in TRAINERS and (ranks := _children(pid)):
            found["rank"] = ranks
    if len(found) == 1 or not found.keys() & wanted:
        return None
    role = rng.choice(sorted(found.keys() & wanted))
    return role, rng.choice(found[role])


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def check(folder: Path) -> list[str]:
    """What is wrong with a run that ended."""
    run = reopen_run(folder)
    part = run.for_grpo() if run.config.grpo else run
    return [*_lost_or_twice(part), *_too_old(part), *_other_bits_when_trained_again(part)]


def _lost_or_twice(run: RunFolder) -> list[str]:
    """run: with the stream of NPD or of GRPO."""
    tokenizer, grpo = ChatTokenizer(run.config.student.path), run.config.grpo
    pacing = open_grpo_pacing(run.config, tokenizer) if grpo else open_pacing(run.config, tokenizer)
    wanted = [(prompt.prompt_id, index) for shard in pacing.shards for prompt, index in shard]
    kept, decided, generated = Counter(), Counter(), Counter()
    for shard, entry in run.stream.shards("rollouts").items():
        for rollout in run.stream.read_shard(entry):
            generated[(rollout.prompt_id, int(rollout.sample_id.rsplit("/", 1)[1]))] += 1
        decisions = run.stream.read_shard(run.stream.shards("rewards" if grpo else "decisions")[shard])
        for decision, trains in zip(decisions, _say_something(decisions, grpo), strict=True):
            decided[decision.sample_id] += 1
            kept[decision.sample_id] += trains
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
    return faults + [f"{begun.path} is left" for begun in begun_shards(run.stream.folder)]


def _say_something(decisions: list, grpo: GrpoConfig | None) -> list[bool]:
    """Whether a sample is trained on, by its decision, or by the rewards of its group if they are not all equal."""
    if grpo is None:
        return [decision.kept for decision in decisions]
    rewards = [row.reward for row in decisions]
    groups = [rewards[at : at + grpo.group_size] for at in range(0, len(rewards), grpo.group_size)]
    return [advantage is not None for group in groups for advantage in group_advantages(group)]


def _too_old(run: RunFolder) -> list[str]:
    stream = run.config.grpo or run.config.npd.stream
    lags = [
        step["step"] // stream.publish_every - int(name.split("/v")[-1].split("/")[0])
        for step in _steps(run)
        for pack in step["packs"]
        for name in pack
    ]
    return [f"a sample was {max(lags)} versions old when it was trained on"] if max(lags) > stream.max_lag else []


def _other_bits_when_trained_again(run: RunFolder) -> list[str]:
    stage, part = ("grpo", "grpo") if run.config.grpo else ("distill", "")
    with tempfile.TemporaryDirectory() as name:
        again = Path(name) / "run"
        (again / "logs").mkdir(parents=True)
        shutil.copy(run.path / "config.yaml", again)
        for folder in ("stream", "weights/v0"):
            shutil.copytree(run.path / part / folder, again / part / folder)
        command = [sys.executable, "-m", "npd_ascend", stage, "--run", str(again)]
        if code := subprocess.run(command, capture_output=True, check=False).returncode:
            return [f"npd {stage} on the stream alone ended with {code}"]
        students = [(path / "student" / "model.safetensors").read_bytes() for path in (run.path, again)]
        return [] if students[0] == students[1] else ["trained again from the stream, the student has other bits"]


def _steps(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.packs.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
