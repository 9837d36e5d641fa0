"""The command line: `npd COMMAND ...`, the same as `python -m npd_ascend COMMAND ...`.

Exit codes: 0 done; 2 wrong input or a run that must stop, said in one line; 75 another rank was lost; 130 interrupted.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from npd_ascend.arguments import parse
from npd_ascend.errors import UserError

if TYPE_CHECKING:
    from npd_ascend.config import Config
    from npd_ascend.runfolder import RunFolder

_STARTED = time.time()  # the imports that follow are part of what the user waits for
_EVERYWHERE = ("run", "sft", "distill", "grpo")  # on every node of a run


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        return _COMMANDS[args.command](args)
    except UserError as error:
        print(f"npd {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"npd {args.command}: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


# Everything below imports what it needs when it is called: `npd --help` and a typo should not wait for torch.
def _open(args: argparse.Namespace) -> "RunFolder":
    """The run of a stage, its folder made or continued."""
    from npd_ascend.runfolder import open_run, reopen_run

    _refuse_overrides_of_a_run(args)
    if args.run:
        run, is_new = reopen_run(args.run), False
    else:
        config = _config(args)
        is_new = not (config.run.folder / "config.yaml").exists()
        run = open_run(config)
    _log_of(run, args)
    if is_new:  # once per run, not once per stage
        _say_licences(run.config)
    return run


def _config(args: argparse.Namespace) -> "Config":
    """What --config and its overrides say, or the run of --run."""
    from npd_ascend.config import load_config
    from npd_ascend.runfolder import reopen_run

    _refuse_overrides_of_a_run(args)
    return reopen_run(args.run).config if args.run else load_config(args.config, args.overrides)


def _log_of(run: "RunFolder", args: argparse.Namespace) -> None:
    from npd_ascend.ranks import this_rank

    logging.basicConfig(
        level=logging.INFO if this_rank().rank == 0 else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=_log_handlers(run.logs / f"{_name(args)}.log"),
    )


def _name(args: argparse.Namespace) -> str:
    """Of this process in the run."""
    from npd_ascend.runfolder import worker_name

    return worker_name(args.command, getattr(args, "worker", None)) + (
        _on_node() if args.command in _EVERYWHERE else ""
    )


def _on_node() -> str:
    """What tells the names of a process apart that every node has."""
    from npd_ascend.ranks import this_node

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
    """One process alone on its part of the run; its wall time goes to logs/stages.jsonl as `label`.

    work: returns False if all of it was done already, which is no part of the run's time.
    """
    from npd_ascend.durable import append_line
    from npd_ascend.runfolder import working_on

    with working_on(run, name):
        worked = True
        try:
            worked = work() is not False
        finally:
            if worked:
                row = {"stage": label or name, "started": _STARTED, "seconds": time.time() - _STARTED}
                append_line(run.logs / "stages.jsonl", json.dumps(row))


def _stage(args: argparse.Namespace, work) -> "RunFolder":
    run = _open(args)
    _timed(run, args.command, lambda: work(run))
    return run


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
        number, sets = args.set or 0, len(npd.phases) if npd else 0
        if npd and not 0 <= number < sets:
            raise UserError(f"--set {number}: the run has {sets}, counted from 0 (npd.refresh_after)")
        label = worker_name(f"{args.command}-v{number}", args.worker)
        _timed(run, _name(args), lambda: work(run, number, args.worker), label)
    return 0


def _check_worker(args: argparse.Namespace, most: int) -> None:
    if args.worker is not None and not 0 <= args.worker < most:
        raise UserError(f"--worker {args.worker}: the run has {most} of them, counted from 0 (processes)")


def _run(args: argparse.Namespace) -> int:
    from npd_ascend.runfolder import allowed_changes, enter_run, working_on

    config = _config(args)
    if args.dry_run:
        from npd_ascend.preflight import check_run

        allowed_changes(config)
        if not (config.run.folder / "config.yaml").exists():  # once per run
            _say_licences(config)
        print(check_run(config))
        return 0
    from npd_ascend.nodes import open_nodes
    from npd_ascend.supervisor import run_recipe

    with open_nodes(config) as nodes:
        run = enter_run(config)
        place = ["--run", str(args.run)] if args.run else ["--config", str(args.config), *args.overrides]
        with working_on(run, _name(args)):
            _log_of(run, args)  # one that waits has none that the other might take away
            return run_recipe(run, nodes, place)


def _processes(args: argparse.Namespace) -> int:
    from npd_ascend.placement import listing

    print(listing(_config(args)))
    return 0


def _training_stage(args: argparse.Namespace, work) -> int:
    """A stage that has as many processes as the trainer has ranks: this one is a rank, or starts them."""
    from npd_ascend.parallel.launch import run_ranks
    from npd_ascend.ranks import this_rank
    from npd_ascend.runfolder import working_on

    here, run = this_rank(), _open(args)
    ranks = run.config.parallel.tp * run.config.parallel.dp
    if here.world_size > 1 and here.rank > 0:
        work(run)
    elif here.world_size > 1 or ranks == 1:
        _timed(run, args.command, lambda: work(run))
    else:
        with working_on(run, f"{args.command}-ranks{_on_node()}"):
            arguments, timeout_s = [args.command, "--run", str(run.path)], run.config.parallel.timeout_s
            return run_ranks(arguments, ranks, run.logs, args.command, timeout_s)
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

    _stage(args, run_rewards)
    return 0


def _eval(args: argparse.Namespace) -> int:
    if args.benchmarks:
        from npd_ascend.evaluate.command import run_benchmarks

        run_benchmarks(args.benchmarks, args.overrides, args.dry_run)
        return 0
    if args.dry_run:
        raise UserError("--dry-run goes with --benchmarks; `npd run --dry-run` looks at a whole run")
    from npd_ascend.evaluate.exact_match import run_evaluations

    for name, found in json.loads(_stage(args, run_evaluations).evaluations.read_text()).items():
        print(f"{name:<10}{found['exact_match']:.3f} ± {found['standard_error']:.3f}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from npd_ascend.report.summary import write_report

    print(f"report: {_stage(args, write_report).report}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from npd_ascend.planner.command import print_plan

    print_plan(_config(args))
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
    if sys.argv[1:2] in (["plan"], ["processes"]):  # they only print, and `npd plan | head` ends as of other programs
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())


if __name__ == "__main__":
    entry()
