"""The command line: `npd COMMAND ...`, the same as `python -m npd_ascend COMMAND ...`.

Exit codes: 0 done; 2 wrong input or a run that must stop, said in one line; 75 another rank was lost; 130 interrupted.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from npd_ascend.errors import UserError

if TYPE_CHECKING:
    from npd_ascend.config import Config
    from npd_ascend.runfolder import RunFolder

_STARTED = time.time()  # the imports that follow are part of what the user waits for
_EVERYWHERE = ("run", "sft", "distill", "grpo")  # on every node of a run


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return _COMMANDS[args.command](args)
    except UserError as error:
        print(f"npd {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"npd {args.command}: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="npd", description="Near-Policy Distillation of language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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
    add("grpo", "reinforcement learning on data.problems, beside the next two")
    answers = add("grpo-rollout", "let the student answer data.problems in groups")
    answers.add_argument("--worker", type=int, metavar="N", help="do the share of worker N; default: all")
    add("grpo-reward", "judge those answers")
    add("eval", "exact match on data.heldout of every model of the run; or a model's scores in public benchmarks")
    add("report", "summary.json and report.html from what the run folder holds")
    add("plan", "memory of every card and time of every stage of a run, before anything is started")

    replay = commands.add_parser("replay", help="train again from a recorded stream with other settings")
    replay.add_argument("--run", type=Path, required=True, help="the recorded run")
    replay.add_argument("folder", type=Path, help="the new run folder, made or continued")
    replay.add_argument("overrides", nargs="*", metavar="key=value", help="what differs, for example npd.lambda=0.5")
    sweep = commands.add_parser("sweep", help="many settings and seeds, replayed or run, in one table and one plot")
    sweep.add_argument("file", type=Path, help="YAML: source or config, folder, seeds, variants")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    prepare = commands.add_parser("prepare", help="files of questions to data of a run: checked, split, decontaminated")
    prepare.add_argument("file", type=Path, help="YAML: sources, evaluation_sets, folder, lengths")
    doctor = commands.add_parser(
        "doctor", help="what a run needs of this machine: NPUs, versions, numbers, collectives"
    )
    doctor.add_argument("--config", type=Path, help="YAML of a run, for its layout, device and folder")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="dotted override, with --config")
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
    from npd_ascend.device import this_rank
    from npd_ascend.runfolder import open_run, reopen_run

    _refuse_overrides_of_a_run(args)
    if args.run:
        run, is_new = reopen_run(args.run), False
    else:
        config = load_config(args.config, args.overrides)
        is_new = not (config.run.folder / "config.yaml").exists()
        run = open_run(config)
    logging.basicConfig(
        level=logging.INFO if this_rank().rank == 0 else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=_log_handlers(run.logs / f"{_name(args)}.log"),
    )
    if is_new:  # once per run, not once per stage
        _say_licences(run.config)
    return run


def _name(args: argparse.Namespace) -> str:
    """Of this process in the run."""
    from npd_ascend.runfolder import worker_name

    return worker_name(args.command, getattr(args, "worker", None)) + (
        _on_node() if args.command in _EVERYWHERE else ""
    )


def _on_node() -> str:
    """What tells the names of a process apart that every node has."""
    from npd_ascend.device import this_node

    return f".node{node}" if (node := this_node().rank) else ""


def _log_handlers(path: Path) -> list[logging.Handler]:
    """The terminal and a file; one of them where the supervisor has made the file what stands for the terminal."""
    path.touch()
    if os.path.samestat(os.fstat(2), path.stat()):
        return [logging.StreamHandler()]
    return [logging.StreamHandler(), logging.FileHandler(path)]


def _refuse_overrides_of_a_run(args: argparse.Namespace) -> None:
    if args.run and args.overrides:
        raise UserError(f"overrides ({args.overrides[0]}) go with --config; a run folder keeps its configuration")


def _say_licences(config: "Config") -> None:
    from npd_ascend.model.families import licence_notice

    # a student of random weights has the shape of a family and nothing else
    models = [config.student.path] if config.student.init == "pretrained" else []
    models += [config.teacher.path] if config.teacher else []
    for folder in dict.fromkeys(models):
        if notice := licence_notice(folder):
            logging.getLogger(__name__).warning(notice)


def _timed(run: "RunFolder", name: str, work, label: str | None = None) -> None:
    """One process alone on its part of the run; its wall time goes to logs/stages.jsonl as `label`."""
    from npd_ascend.durable import append_line
    from npd_ascend.runfolder import working_on

    with working_on(run, name):
        try:
            work()
        finally:
            row = {"stage": label or name, "started": _STARTED, "seconds": time.time() - _STARTED}
            append_line(run.logs / "stages.jsonl", json.dumps(row))


def _stage(args: argparse.Namespace, work) -> int:
    run = _open(args)
    _timed(run, args.command, lambda: work(run))
    return 0


def _worker_stage(args: argparse.Namespace, work, live) -> int:
    """Rollouts or scores: of one weight version, or with npd.stream of the whole run."""
    from npd_ascend.runfolder import worker_name

    run = _open(args)
    processes, npd = run.config.processes, run.config.npd
    _check_worker(args, processes.rollout if args.command == "rollout" else processes.teacher)
    if npd and npd.stream:
        if args.set is not None:
            raise UserError("--set is not for a run with npd.stream, whose shards are one set; remove it")
        _timed(run, _name(args), lambda: live(run, args.worker))
    else:
        number = args.set or 0
        label = worker_name(f"{args.command}-v{number}", args.worker)
        _timed(run, _name(args), lambda: work(run, number, args.worker), label)
    return 0


def _check_worker(args: argparse.Namespace, most: int) -> None:
    if args.worker is not None and not 0 <= args.worker < most:
        raise UserError(f"--worker {args.worker}: the run has {most} of them, counted from 0 (processes)")


def _run(args: argparse.Namespace) -> int:
    from npd_ascend.config import load_config
    from npd_ascend.runfolder import allowed_changes, reopen_run, working_on

    _refuse_overrides_of_a_run(args)
    config = reopen_run(args.run).config if args.run else load_config(args.config, args.overrides)
    if args.dry_run:
        from npd_ascend.preflight import check_run

        allowed_changes(config)
        if not args.run:  # whoever made the folder has read it
            _say_licences(config)
        print(check_run(config))
        return 0
    from npd_ascend.nodes import open_nodes
    from npd_ascend.supervisor import run_recipe

    with open_nodes(config) as nodes:
        if nodes.here.rank > 0:
            nodes.meet("the run folder is made")
        run = _open(args)
        if nodes.here.rank == 0:
            nodes.meet("the run folder is made")
        with working_on(run, _name(args)):
            return run_recipe(run, nodes)


def _processes(args: argparse.Namespace) -> int:
    from npd_ascend.config import load_config
    from npd_ascend.placement import listing
    from npd_ascend.runfolder import reopen_run

    _refuse_overrides_of_a_run(args)
    print(listing(reopen_run(args.run).config if args.run else load_config(args.config, args.overrides)))
    return 0


def _training_stage(args: argparse.Namespace, work) -> int:
    """A stage that has as many processes as the trainer has ranks: this one is a rank, or starts them."""
    from npd_ascend.device import this_rank
    from npd_ascend.parallel.launch import run_ranks
    from npd_ascend.runfolder import working_on

    here, run = this_rank(), _open(args)
    ranks = run.config.parallel.tp * run.config.parallel.dp
    if here.world_size > 1 and here.rank > 0:
        work(run)
    elif here.world_size > 1 or ranks == 1:
        _timed(run, args.command, lambda: work(run))
    else:
        with working_on(run, f"{args.command}-ranks{_on_node()}"):
            return run_ranks([args.command, "--run", str(run.path)], ranks, run.logs, args.command)
    return 0


def _sft(args: argparse.Namespace) -> int:
    from npd_ascend.trainer.stages import run_sft

    return _training_stage(args, run_sft)


def _rollout(args: argparse.Namespace) -> int:
    from npd_ascend.rollout.worker import run_live_rollouts, run_rollouts

    return _worker_stage(args, run_rollouts, run_live_rollouts)


def _score(args: argparse.Namespace) -> int:
    from npd_ascend.teacher.worker import run_live_scoring, run_scoring

    return _worker_stage(args, run_scoring, run_live_scoring)


def _distill(args: argparse.Namespace) -> int:
    from npd_ascend.trainer.stages import run_distill

    return _training_stage(args, run_distill)


def _grpo(args: argparse.Namespace) -> int:
    from npd_ascend.trainer.stages import run_grpo

    return _training_stage(args, run_grpo)


def _grpo_rollout(args: argparse.Namespace) -> int:
    from npd_ascend.rollout.worker import run_grpo_rollouts

    run = _open(args)
    _check_worker(args, run.config.processes.rollout)
    _timed(run, _name(args), lambda: run_grpo_rollouts(run, args.worker))
    return 0


def _grpo_reward(args: argparse.Namespace) -> int:
    from npd_ascend.rewards.worker import run_rewards

    return _stage(args, run_rewards)


def _eval(args: argparse.Namespace) -> int:
    if args.benchmarks:
        from npd_ascend.evaluate.command import run_benchmarks

        run_benchmarks(args.benchmarks, args.overrides)
        return 0
    from npd_ascend.evaluate.exact_match import run_evaluations

    return _stage(args, run_evaluations)


def _report(args: argparse.Namespace) -> int:
    from npd_ascend.report.summary import write_report

    return _stage(args, write_report)


def _plan(args: argparse.Namespace) -> int:
    from npd_ascend.config import load_config
    from npd_ascend.planner.command import print_plan
    from npd_ascend.runfolder import reopen_run

    _refuse_overrides_of_a_run(args)
    print_plan(reopen_run(args.run).config if args.run else load_config(args.config, args.overrides))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from npd_ascend.config import load_config
    from npd_ascend.doctor.command import run_doctor

    if args.overrides and not args.config:
        raise UserError(f"overrides ({args.overrides[0]}) go with --config")
    return run_doctor(load_config(args.config, args.overrides) if args.config else None)


def _replay(args: argparse.Namespace) -> int:
    from npd_ascend.replay import open_replay

    open_replay(args.run, args.folder, args.overrides)
    return main(["run", "--run", str(args.folder)])


def _sweep(args: argparse.Namespace) -> int:
    from npd_ascend.sweep import run_sweep

    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: want at least one")
    run_sweep(args.file, args.jobs)
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from npd_ascend.prepare.command import run_prepare

    run_prepare(args.file)
    return 0


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
    "processes": _processes,
    "sft": _sft,
    "rollout": _rollout,
    "score": _score,
    "distill": _distill,
    "grpo": _grpo,
    "grpo-rollout": _grpo_rollout,
    "grpo-reward": _grpo_reward,
    "eval": _eval,
    "report": _report,
    "plan": _plan,
    "doctor": _doctor,
    "replay": _replay,
    "sweep": _sweep,
    "prepare": _prepare,
    "convert": _convert,
    "prune": _prune,
}


def entry() -> None:
    """The `npd` console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
