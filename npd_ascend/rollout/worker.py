"""One rollout process: take the wanted samples of a weight version, generate, commit shard by shard."""

import hashlib
import time
from collections.abc import Sequence

from npd_ascend.config import Config
from npd_ascend.device import DTYPES, open_device
from npd_ascend.metrics import MetricsLog
from npd_ascend.progress import progress
from npd_ascend.prompts import Wanted, wanted_shards
from npd_ascend.records import Rollout, sample_id
from npd_ascend.rollout.engine import Engine, Request, Sampling
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.rollout.vllm_engine import VllmEngine
from npd_ascend.runfolder import RunFolder
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.weights.canary import compare, read_probes

# Mean difference of log-probs that rounding explains; other weights of the smallest models differ by 0.1 and more.
CANARY_NATS = {"float32": 2e-3, "bfloat16": 0.1}


def run_rollouts(run: RunFolder, version: int) -> None:
    """Commit every missing rollout shard of `version`; nothing to do is a quick no."""
    run.needs_npd()
    config = run.config
    tokenizer = ChatTokenizer(config.student.path)
    shards = wanted_shards(config, tokenizer)
    committed = run.stream.entries("rollouts", version)
    missing = [shard for shard in range(len(shards)) if shard not in committed]
    if not missing:
        return
    longest = max(len(prompt.token_ids) for shard in shards for prompt, _ in shard)
    engine = open_engine(config, tokenizer, longest)
    metrics = MetricsLog(run.path, f"rollout-v{version}")
    engine.load_weights(run.generator(version))
    if probes := read_probes(run.generator(version)):
        found = engine.next_logprobs([probe.context for probe in probes], [probe.next_id for probe in probes])
        difference = compare(probes, found, CANARY_NATS[config.rollout.dtype], run.generator(version))
        metrics.log(0, rollout__canary=difference)
    total = sum(map(len, shards))
    with progress(f"rollout v{version}", total, "samples", total - sum(len(shards[s]) for s in missing)) as bar:
        for shard in missing:
            started = time.perf_counter()
            rollouts = generate(engine, shards[shard], run, version)
            run.stream.commit("rollouts", version, shard, rollouts)
            seconds, tokens = time.perf_counter() - started, sum(r.answer_len for r in rollouts)
            metrics.log(
                shard,
                rollout__samples=len(rollouts),
                rollout__tokens=tokens,
                rollout__tokens_per_s=tokens / seconds,
            )
            bar.update(len(rollouts))
    metrics.close()


def open_engine(config: Config, tokenizer: ChatTokenizer, longest_prompt: int) -> Engine:
    """The engine that config.rollout names, without weights. longest_prompt: in tokens."""
    rollout, device = config.rollout, open_device(config.device.kind, config.device.threads)
    if rollout.engine == "vllm":
        return VllmEngine(
            dtype=DTYPES[rollout.dtype],
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
            max_model_len=longest_prompt + rollout.max_new_tokens,
            kv_cache_gib=rollout.kv_cache_gib,
        )
    return HfEngine(
        dtype=DTYPES[rollout.dtype],
        device=device,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
    )


def generate(engine: Engine, wanted: Sequence[Wanted], run: RunFolder, version: int) -> list[Rollout]:
    """Answers of one shard as records."""
    rollout = run.config.rollout
    ids = [sample_id(prompt.prompt_id, index, version) for prompt, index in wanted]
    requests = [
        Request(prompt.token_ids, rollout.max_new_tokens, seed_of(run.config.run.seed, name))
        for (prompt, _), name in zip(wanted, ids, strict=True)
    ]
    completions = engine.generate(requests, Sampling(rollout.temperature, rollout.top_p))
    return [
        Rollout(
            sample_id=name,
            prompt_id=prompt.prompt_id,
            weight_version=version,
            heldout=prompt.heldout,
            token_ids=prompt.token_ids + done.token_ids,
            prompt_len=len(prompt.token_ids),
            logprobs=done.logprobs,
            finish_reason=done.finish_reason,
        )
        for name, (prompt, _), done in zip(ids, wanted, completions, strict=True)
    ]


def seed_of(run_seed: int, name: str) -> int:
    """63 bits from the run's seed and the sample's name."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{name}".encode()).digest()[:8]) >> 1
