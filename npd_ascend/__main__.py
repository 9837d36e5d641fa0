"""The command line: `npd COMMAND ...`, the same as `python -m npd_ascend COMMAND ...`.

Exit codes: 0 done; 2 wrong input or a run that must stop, said in one line; 130 interrupted.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from npd_ascend.errors import UserError

if TYPE_CHECKING:
    from npd_ascend.runfolder import RunFolder


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return _COMMANDS[args.command](args)
    except UserError as error:
        print(f"npd {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"npd {args.command}: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="npd", description="Near-Policy Distillation of language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, *, version: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        place = command.add_mutually_exclusive_group(required=True)
        place.add_argument("--config", type=Path, help="YAML of the run; its folder is made or continued")
        place.add_argument("--run", type=Path, help="an existing run folder")
        if version:
            command.add_argument("--version", type=int, default=0, help="student weights that generate (default 0)")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted override, with --config")
        return command

    run = add("run", "the whole recipe: SFT, rollouts, scoring, distillation, evaluation, report")
    run.add_argument("--dry-run", action="store_true", help="check everything and print the plan, train nothing")
    add("sft", "supervised warm-up on data.gold")
    add("rollout", "let the student answer data.prompts and data.heldout", version=True)
    add("score", "teacher prefill, Δ-IFD, decisions", version=True)
    add("distill", "train on every decided set of rollouts")
    add("eval", "exact match on data.heldout of every model of the run")
    add("report", "summary.json and report.html from what the run folder holds")

    convert = commands.add_parser("convert", help="a GGUF file to a Hugging Face folder of safetensors")
    convert.add_argument("gguf", type=Path)
    convert.add_argument("folder", type=Path)
    prune = commands.add_parser("prune", help="cut a model's depth: keep some of its layers")
    prune.add_argument("source", type=Path)
    prune.add_argument("folder", type=Path)
    prune.add_argument("--keep", required=True, help="layers that stay, for example 0-4,25-29")
    return parser


# Everything below imports what it needs when it is called: `npd --help` and a typo should not wait for torch.
def _open(args: argparse.Namespace) -> "RunFolder":
    from npd_ascend.config import load_config
    from npd_ascend.runfolder import open_run, reopen_run

    if args.run and args.overrides:
        raise UserError(f"overrides ({args.overrides[0]}) go with --config; a run folder keeps its configuration")
    run = reopen_run(args.run) if args.run else open_run(load_config(args.config, args.overrides))
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(run.logs / f"{args.command}.log")],
    )
    return run


def _stage(args: argparse.Namespace, work) -> int:
    """Run one stage alone on its run folder and keep its wall time."""
    from npd_ascend.durable import append_line
    from npd_ascend.runfolder import working_on

    run = _open(args)
    version = getattr(args, "version", None)
    name = args.command if version is None else f"{args.command}-v{version}"
    with working_on(run, args.command):
        started = time.time()
        work(run) if version is None else work(run, version)
        row = {"stage": name, "started": started, "seconds": time.time() - started}
        append_line(run.logs / "stages.jsonl", json.dumps(row))
    return 0


def _run(args: argparse.Namespace) -> int:
    from npd_ascend.config import load_config
    from npd_ascend.preflight import check_run
    from npd_ascend.runfolder import reopen_run, working_on
    from npd_ascend.supervisor import run_recipe

    if args.dry_run:
        config = reopen_run(args.run).config if args.run else load_config(args.config, args.overrides)
        print(check_run(config))
        return 0
    run = _open(args)
    with working_on(run, "run"):
        return run_recipe(run)


def _sft(args: argparse.Namespace) -> int:
    from npd_ascend.trainer.stages import run_sft

    return _stage(args, run_sft)


def _rollout(args: argparse.Namespace) -> int:
    from npd_ascend.rollout.worker import run_rollouts

    return _stage(args, run_rollouts)


def _score(args: argparse.Namespace) -> int:
    from npd_ascend.teacher.worker import run_scoring

    return _stage(args, run_scoring)


def _distill(args: argparse.Namespace) -> int:
    from npd_ascend.trainer.stages import run_distill

    return _stage(args, run_distill)


def _eval(args: argparse.Namespace) -> int:
    from npd_ascend.evaluate.exact_match import run_evaluations

    return _stage(args, run_evaluations)


def _report(args: argparse.Namespace) -> int:
    from npd_ascend.report.summary import write_report

    return _stage(args, write_report)


def _convert(args: argparse.Namespace) -> int:
    from npd_ascend.model.prepare import convert_gguf

    convert_gguf(args.gguf, args.folder)
    return 0


def _prune(args: argparse.Namespace) -> int:
    from npd_ascend.model.prepare import prune_depth

    prune_depth(args.source, args.folder, args.keep)
    return 0


_COMMANDS = {
    "run": _run,
    "sft": _sft,
    "rollout": _rollout,
    "score": _score,
    "distill": _distill,
    "eval": _eval,
    "report": _report,
    "convert": _convert,
    "prune": _prune,
}


def entry() -> None:
    """The `npd` console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
