"""Greedy answers to the held-out prompts against their reference answers."""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npd_ascend.config import Config
from npd_ascend.device import DTYPES, open_device
from npd_ascend.durable import commit_file
from npd_ascend.model.load import save_decoder
from npd_ascend.progress import progress
from npd_ascend.prompts import read_heldout
from npd_ascend.records import Prompt
from npd_ascend.rollout.engine import Engine, Request, Sampling, in_order
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.rollout.vllm_engine import VllmEngine
from npd_ascend.runfolder import RunFolder
from npd_ascend.tokenizer import ChatTokenizer
from npd_ascend.trainer.student import start_student


def run_evaluations(run: RunFolder) -> bool:
    """Evaluate every model of the run that is there and not yet evaluated, into RUN/evaluations.json; False if all are.

    Names: start, sft, npd, grpo, teacher. Without reference answers in data.heldout there is nothing to match
    and the file is an empty object.
    """
    known = run.evaluations.exists()
    done = json.loads(run.evaluations.read_text()) if known else {}
    missing = [name for name in models(run) if name not in done]
    if known and not missing:
        return False
    tokenizer = run.tokenizer()
    heldout = read_heldout(run.config, tokenizer, run.config.evaluate.max_new_tokens)
    prompts = [prompt for prompt in heldout if prompt.answer is not None]
    if not prompts:
        _save(run, done)
        return not known
    for name in missing:
        with tempfile.TemporaryDirectory() as scratch:
            done[name] = exact_match(run.config, _folder(run, name, Path(scratch)), tokenizer, prompts, name)
        _save(run, done)
    return True


def models(run: RunFolder) -> list[str]:
    """Those that exist by now."""
    config, names = run.config, ["start"]
    stages = {"sft": config.sft, "npd": config.npd, "grpo": config.grpo}
    names += [name for name, section in stages.items() if section and run.has_trained(name)]
    names += ["teacher"] if config.teacher and config.teacher.engine == "local" else []
    return names


def exact_match(config: Config, folder: Path, tokenizer: ChatTokenizer, prompts: list[Prompt], name: str) -> dict:
    """Share of greedy answers that equal the reference, its standard error, and the engine that gave the answers."""
    with _engine(config, tokenizer, max(len(prompt.token_ids) for prompt in prompts)) as engine:
        engine.load_weights(folder)
        right = _count_right(config, engine, tokenizer, prompts, name)
    share = right / len(prompts)
    return {
        "exact_match": share,
        "standard_error": math.sqrt(share * (1 - share) / len(prompts)),
        "prompts": len(prompts),
        "engine": config.evaluate.engine,
    }


def _count_right(config: Config, engine: Engine, tokenizer: ChatTokenizer, prompts: list[Prompt], name: str) -> int:
    right, size = 0, config.evaluate.batch_size
    with progress(f"eval {name}", len(prompts), "prompts") as bar:
        for batch in (prompts[at : at + size] for at in range(0, len(prompts), size)):
            requests = [Request(p.token_ids, config.evaluate.max_new_tokens, 0) for p in batch]
            completions = in_order(engine.generate(requests, Sampling(temperature=0)))
            answers = [tokenizer.decode_answer(completion.token_ids).strip() for completion in completions]
            right += sum(answer == prompt.answer.strip() for answer, prompt in zip(answers, batch, strict=True))
            bar.update(len(batch))
    return right


@contextmanager
def _engine(config: Config, tokenizer: ChatTokenizer, longest_prompt: int) -> Iterator[Engine]:
    dtype, device = DTYPES[config.student.dtype], open_device(config.device.kind, config.device.threads)
    eos_id, pad_id, vocab_size = tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size
    if config.evaluate.engine == "hf":
        yield HfEngine(dtype=dtype, device=device, eos_id=eos_id, pad_id=pad_id, vocab_size=vocab_size)
        return
    engine = VllmEngine(
        dtype=dtype,
        eos_id=eos_id,
        vocab_size=vocab_size,
        max_model_len=longest_prompt + config.evaluate.max_new_tokens,
        kv_cache_gib=config.evaluate.kv_cache_gib,
        section="evaluate",
    )
    try:
        yield engine
    finally:
        engine.close()


def _folder(run: RunFolder, name: str, scratch: Path) -> Path:
    if name == "start" and run.config.student.init == "random":
        save_decoder(start_student(run.config), run.config.student.path, scratch)
        return scratch
    if name == "teacher":
        return run.config.teacher.path
    return run.config.student.path if name == "start" else run.trained(name)


def _save(run: RunFolder, evaluations: dict) -> None:
    with commit_file(run.evaluations) as draft:
        draft.write_text(json.dumps(evaluations, indent=2) + "\n")
