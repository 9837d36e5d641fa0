"""The reward process of GRPO: judge every shard of answers as soon as it is generated, commit, shard by shard."""

import logging
import time
from functools import partial
from typing import Any

from npd_ascend.config import ReasoningGymSource
from npd_ascend.errors import UserError
from npd_ascend.metrics import MetricsLog
from npd_ascend.pacing import open_grpo_pacing
from npd_ascend.progress import progress
from npd_ascend.records import Prompt, Reward, Rollout
from npd_ascend.rewards.functions import Answer, check_installed
from npd_ascend.rewards.sandbox import Sandbox
from npd_ascend.runfolder import RunFolder
from npd_ascend.tokenizer import ChatTokenizer

# of the reasons of one shard that the log names; all of them are in the stream
_SAID = 3
_log = logging.getLogger(__name__)


def run_rewards(run: RunFolder) -> bool:
    """Commit every missing shard of rewards; False if none is missing."""
    part, grpo = run.for_grpo(), run.config.grpo
    tokenizer = part.tokenizer()
    check_installed(grpo.rewards)
    pacing, committed = open_grpo_pacing(run.config, tokenizer), part.stream.shards("rewards")
    missing = [shard for shard in pacing.order if shard not in committed]
    if not missing:
        return False
    total = sum(map(len, pacing.shards))
    done = total - sum(len(pacing.shards[shard]) for shard in missing)
    judge, heartbeat = Judge(run, tokenizer), run.heartbeat("grpo-reward")
    try:
        with progress("grpo-reward", total, "answers", done) as bar:
            for shard in missing:
                waited = heartbeat.wait(partial(_is_generated, part, shard), f"rollouts of shard {shard}")
                started = time.perf_counter()
                entry = part.stream.shards("rollouts")[shard]
                prompts = {prompt.prompt_id: prompt for prompt, _ in pacing.shards[shard]}
                rewards = []
                for rollout in part.stream.read_shard(entry):
                    rewards.append(judge.reward(rollout, prompts[rollout.prompt_id]))
                    heartbeat.beat()
                if not committed and shard == missing[0]:
                    judge.check_first(rewards)
                part.stream.commit("rewards", entry.version, shard, rewards)
                judge.report(shard, rewards, time.perf_counter() - started, waited)
                bar.update(len(rewards))
    finally:
        judge.close()
    return True


def _is_generated(run: RunFolder, shard: int) -> bool:
    return shard in run.stream.shards("rollouts")


class Judge:
    """The weighted sum of grpo.rewards for an answer, computed in a process that can be stopped."""

    def __init__(self, run: RunFolder, tokenizer: ChatTokenizer):
        self._grpo, self._tokenizer, self._where = run.config.grpo, tokenizer, run.for_grpo().stream.folder
        self._problems = run.config.data.problems
        self._sandbox = Sandbox(list(self._grpo.rewards), self._grpo.reward_timeout_s)
        self._metrics = MetricsLog(run.path, "grpo-reward")

    def reward(self, rollout: Rollout, prompt: Prompt) -> Reward:
        """Of one answer to `prompt`; a function that fails is a reason in the record, not an error."""
        ids = rollout.token_ids[rollout.prompt_len :]
        values, why = self._sandbox.score(
            Answer(
                text=self._tokenizer.decode_answer(ids),
                whole_text=self._tokenizer.decode_text(ids),
                reference=prompt.answer,
                prompt_id=prompt.prompt_id,
                dataset=self._dataset(prompt),
                format=self._grpo.format,
            )
        )
        weights = self._grpo.rewards
        total = None if values is None else sum(weight * values[name] for name, weight in weights.items())
        return Reward(sample_id=rollout.sample_id, weight_version=rollout.weight_version, reward=total, why=why)

    def _dataset(self, problem: Prompt) -> dict[str, Any] | None:
        if not isinstance(self._problems, ReasoningGymSource):
            return None
        return self._problems.arguments(problem.prompt_id.split(":")[1])

    def check_first(self, rewards: list[Reward]) -> None:
        """UserError if no reward of the run's first shard is known: the functions do not fit the problems."""
        if all(reward.reward is None for reward in rewards):
            raise UserError(
                f"{self._where}: no reward is known of the first {len(rewards)} answers ({rewards[0].why}); mend "
                f"data.problems or choose other grpo.rewards, and start again with a new run.folder"
            )

    def report(self, shard: int, rewards: list[Reward], seconds: float, waited: float) -> None:
        """Count and name the failures."""
        failed = [reward for reward in rewards if reward.reward is None]
        self._metrics.log(
            shard,
            reward__samples=len(rewards),
            reward__failed=len(failed),
            reward__timeouts=sum(reward.why.startswith("timeout") for reward in failed),
            reward__busy_s=seconds,
            reward__wait_s=waited,
        )
        for reward in failed[:_SAID]:
            _log.warning("shard %d: no reward for %s: %s", shard, reward.sample_id, reward.why)
        if len(failed) > _SAID:
            _log.warning("shard %d: and for %d more; the stream has their reasons", shard, len(failed) - _SAID)

    def close(self) -> None:
        self._sandbox.close()
        self._metrics.close()
