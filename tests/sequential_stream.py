"""python tests/sequential_stream.py RUN: the schedule with npd.stream in one process, one thing after the other.

Makes what the trainer needs next and no more, so that the newest weights generate everything.
"""

import sys
from pathlib import Path

from npd_ascend.filters import free_reasons
from npd_ascend.metrics import MetricsLog
from npd_ascend.parallel.mesh import ALONE
from npd_ascend.rollout.worker import open_maker
from npd_ascend.runfolder import RunFolder, reopen_run
from npd_ascend.teacher.worker import open_reader
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.live import LiveTrainer, npd_stage


def train(run: RunFolder, metrics: MetricsLog | None = None) -> None:
    tokenizer, trainer = ChatTokenizer(run.config.student.path), LiveTrainer(run, npd_stage(run), ALONE, metrics)
    pacing = trainer.pacing
    with (
        open_maker(run, tokenizer, pacing.shards, "rollout", None) as maker,
        open_reader(run, tokenizer, None) as reader,
    ):

        def make(shard: int) -> None:
            version = run.weights.newest()[0]
            maker.make(shard, version, version)
            rollouts = run.stream.read_shard(run.stream.shards("rollouts")[shard])
            dropped = free_reasons(rollouts, run.config.filters, run.config.npd.pack_tokens)
            scores = {score.sample_id: score for score in reader.score(version, shard, rollouts, dropped)}
            reader.decide(version, shard, rollouts, scores, dropped)

        for shard in pacing.heldout:
            make(shard)
        for step in range(pacing.steps):
            for shard in pacing.shards_of(step):
                make(shard)
            trainer.step(0.0)
    trainer.finish()


if __name__ == "__main__":
    train(reopen_run(Path(sys.argv[1])))
