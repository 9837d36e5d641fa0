"""For test_planned_memory.py, in its own process: what reading a set of rollouts with their scores takes of a host.

python tests/measured_set.py SAMPLES PROMPT_TOKENS ANSWER_TOKENS TOP_K FOLDER       prints bytes
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from conftest import CONFIGS
from peak import peak_bytes
from test_stream import decision, rollout, score

from npd_ascend.config import load_config
from npd_ascend.config_file import override
from npd_ascend.runfolder import RunFolder
from npd_ascend.trainer.samples import heldout_rows, kept_samples

SHARD, VOCAB = 50, 150_000


def record(run: RunFolder, samples: int, prompt: int, answer: int, top_k: int) -> None:
    """A set in which every sample is as long as the others and kept."""
    random = np.random.Generator(np.random.PCG64(0))
    tokens = prompt + answer
    for first in range(0, samples, SHARD):
        rollouts, scores = [], []
        for index in range(first, first + SHARD):
            ids = tuple(random.integers(0, VOCAB, tokens).tolist())
            rollouts.append(rollout(index, answer, token_ids=ids, prompt_len=prompt))
            topk_ids = random.integers(0, VOCAB, (answer, top_k)).astype(np.int32)
            topk_logprobs = -random.random((answer, top_k), np.float32)
            scores.append(replace(score(index, answer), teacher_topk_ids=topk_ids, teacher_topk_logprobs=topk_logprobs))
        run.stream.commit("rollouts", 0, first // SHARD, rollouts)
        run.stream.commit("scores", 0, first // SHARD, scores)
        run.stream.commit("decisions", 0, first // SHARD, [decision(row) for row in range(first, first + SHARD)])


def main() -> None:
    samples, prompt, answer, top_k = map(int, sys.argv[1:5])
    config = load_config(CONFIGS / "addition_cpu.yaml", [override("run.folder", Path(sys.argv[5]))])
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"top_k": top_k})})
    run, grpo = RunFolder(config), RunFolder(config, "grpo")
    with ProcessPoolExecutor(1) as another:  # memory that making them has freed would be used again
        another.submit(record, run, samples, prompt, answer, top_k).result()
        another.submit(record, grpo, SHARD, prompt, answer, top_k).result()
    held = [kept_samples(grpo, 0), heldout_rows(grpo, 0)]  # what the first reader of a file imports
    print(peak_bytes(lambda: held.extend([kept_samples(run, 0), heldout_rows(run, 0)])))  # as trainer/stages.py does


if __name__ == "__main__":
    main()
