"""What can be typed after `npd`."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options and key=value in any order, which argparse alone would not have."""
    top = parser()
    args, left = top.parse_known_args(arguments)
    words = [word for word in left if "=" in word and not word.startswith("-")]
    if hasattr(args, "overrides"):
        args.overrides += words
        left = [word for word in left if word not in words]
    if left:
        top.error(f"npd {args.command} does not know {' '.join(left)}; `npd {args.command} --help` shows what it knows")
    return args


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    top = argparse.ArgumentParser(prog="npd", description="Near-Policy Distillation of language models.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, *, worker: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        place = command.add_mutually_exclusive_group(required=True)
        place.add_argument("--config", type=Path, help="YAML of the run; its folder is made or continued")
        place.add_argument("--run", type=Path, help="an existing run folder")
        if name == "eval":
            place.add_argument("--benchmarks", type=Path, help="YAML of a model and public benchmarks (docs/eval.md)")
        if worker:
            command.add_argument("--set", type=int, help="of rollouts, one per phase (default 0); not with npd.stream")
            command.add_argument("--worker", type=int, metavar="N", help="do the share of worker N; default: all")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted override, with --config")
        return command

    run = add("run", "the whole recipe: SFT, rollouts, scoring, distillation, evaluation, report")
    run.add_argument("--dry-run", action="store_true", help="check everything and print the plan, train nothing")
    add("processes", "every process of a run with its environment and command line; needs no device and no model")
    add("sft", "supervised warm-up on data.gold")
    add("rollout", "let the student answer data.prompts and data.heldout", worker=True)
    add("score", "teacher prefill, Δ-IFD, decisions", worker=True)
    add("distill", "train on every decided set of rollouts")
    add("grpo", "reinforcement learning on data.problems, beside grpo-rollout and grpo-reward")
    answers = add("grpo-rollout", "let the student answer data.problems in groups")
    answers.add_argument("--worker", type=int, metavar="N", help="do the share of worker N; default: all")
    add("grpo-reward", "judge those answers")
    asks = add(
        "eval", "exact match on data.heldout of every model of the run; or a model's scores in public benchmarks"
    )
    asks.add_argument(
        "--dry-run", action="store_true", help="of --benchmarks: check packages, data and prompts, ask none"
    )
    add("report", "summary.json and report.html from what the run folder holds")
    add("plan", "memory of every card and time of every stage of a run, before anything is started")

    def tool(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    replay = tool("replay", "train again from a recorded stream with other settings")
    replay.add_argument("--run", type=Path, required=True, help="the recorded run")
    replay.add_argument("folder", type=Path, help="the new run folder, made or continued")
    replay.add_argument("overrides", nargs="*", metavar="key=value", help="what differs, for example npd.lambda=0.5")
    sweep = tool("sweep", "many settings and seeds, replayed or run, in one table and one plot")
    sweep.add_argument("file", type=Path, help="YAML: source or config, folder, seeds, variants")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    prepare = tool("prepare", "files of questions to data of a run: checked, split, decontaminated")
    prepare.add_argument("file", type=Path, help="YAML: sources, evaluation_sets, folder, lengths")
    doctor = tool("doctor", "what a run needs of this machine: NPUs, versions, numbers, collectives")
    doctor.add_argument("--config", type=Path, help="YAML of a run, for its layout, device and folder")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="dotted override, with --config")
    convert = tool("convert", "a GGUF file to a Hugging Face folder of safetensors")
    convert.add_argument("gguf", type=Path)
    convert.add_argument("folder", type=Path)
    prune = tool("prune", "cut a model's depth: keep some of its layers")
    prune.add_argument("source", type=Path)
    prune.add_argument("folder", type=Path)
    prune.add_argument("--keep", required=True, help="layers that stay, for example 0-4,25-29")
    return top
