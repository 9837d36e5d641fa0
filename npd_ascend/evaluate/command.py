"""`npd eval --benchmarks`: every benchmark that the settings name, then the table."""

import json
import sys
from pathlib import Path

from npd_ascend.device import DTYPES, open_device
from npd_ascend.durable import commit_file, make_folder, only_process, sha256
from npd_ascend.errors import UserError
from npd_ascend.evaluate.benchmarks import BENCHMARKS
from npd_ascend.evaluate.scores import Score, score_of
from npd_ascend.evaluate.settings import BenchmarkSettings, EvalSettings, content_digest, load_settings
from npd_ascend.evaluate.table import terminal_table, write_results
from npd_ascend.model.families import read_config
from npd_ascend.rollout.engine import Engine
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.tokenizer import ChatTokenizer


def run_benchmarks(path: Path, overrides: list[str]) -> None:
    """Ask what has not been asked yet, then write FOLDER/results.json and results.html and print the table."""
    from npd_ascend.evaluate.harness import Harness, require_lm_eval

    lm_eval_version = require_lm_eval()
    settings = load_settings(path, overrides)
    make_folder(settings.folder)
    refusal = f"{settings.folder}: another `npd eval` is working there; wait for it or set another folder"
    with only_process(settings.folder / "eval.lock", refusal):
        model = _fingerprint(settings)
        scores: dict[str, Score] = {}
        lm = harness = None
        for name, chosen in settings.benchmarks.asked():
            place = settings.folder / name
            _same_as_before(place, _identity(settings, name, chosen, model, lm_eval_version))
            for sample in range(chosen.samples):
                if _rows_file(place, sample).exists():
                    continue
                lm = lm or _open_model(settings)  # not for a table alone
                harness = harness or Harness(settings)
                _pass(harness, lm, name, chosen, sample, place)
            rows = [
                json.loads(_rows_file(place, sample).read_text(encoding="utf-8")) for sample in range(chosen.samples)
            ]
            scores[name] = score_of(rows)
            # the table may be hours away
            print(f"{BENCHMARKS[name].title}: {100 * scores[name].mean:.2f}", file=sys.stderr)
        write_results(settings, scores, model, lm_eval_version)
        print(terminal_table(settings, scores))


def _pass(harness, lm, name: str, chosen: BenchmarkSettings, sample: int, place: Path) -> None:
    from npd_ascend.evaluate.answers import AnswerFile

    lm.begin(name, sample, AnswerFile(place / f"answers-{sample}.jsonl"))
    rows = harness.ask(name, chosen, lm)
    with commit_file(_rows_file(place, sample)) as draft:
        draft.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _rows_file(place: Path, sample: int) -> Path:
    return place / f"questions-{sample}.json"


def _open_model(settings: EvalSettings):
    from npd_ascend.evaluate.engine_lm import EngineLM

    model, tokenizer = settings.model, ChatTokenizer(settings.model.path)
    context = read_config(model.path).max_position
    if (model.max_tokens or 0) > context:
        raise UserError(
            f"model.max_tokens={model.max_tokens} is above max_position_embeddings={context} of "
            f"{model.path}/config.json; lower it"
        )
    max_tokens = model.max_tokens or context
    engine = _engine(settings, tokenizer, max_tokens)
    engine.load_weights(model.path)
    return EngineLM(
        engine,
        tokenizer,
        prompt_suffix=model.prompt_suffix,
        batch_size=model.batch_size,
        max_tokens=max_tokens,
        seed=settings.seed,
    )


def _engine(settings: EvalSettings, tokenizer: ChatTokenizer, max_tokens: int) -> Engine:
    model, device = settings.model, open_device(settings.device.kind, settings.device.threads)
    if model.engine == "hf":
        return HfEngine(
            dtype=DTYPES[model.dtype],
            device=device,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
        )
    from npd_ascend.rollout.vllm_engine import VllmEngine

    return VllmEngine(
        dtype=DTYPES[model.dtype],
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        max_model_len=max_tokens,
        kv_cache_gib=model.kv_cache_gib,
        eager=model.eager,
        section="model",
    )


def _fingerprint(settings: EvalSettings) -> dict[str, str]:
    """sha256 of every file that makes the model: weights, shape, tokenizer, template."""
    folder = settings.model.path
    names = ("*.safetensors", "config.json", "tokenizer*", "chat_template*")
    files = sorted({file for name in names for file in folder.glob(name)})
    return {file.name: sha256(file) for file in files}


def _identity(settings: EvalSettings, name: str, chosen: BenchmarkSettings, model: dict, lm_eval_version: str) -> dict:
    """All that the answers to a benchmark depend on. Memory and threads may change."""
    kept = settings.model.model_dump(mode="json", include={"dtype", "engine", "system_prompt", "prompt_suffix"})
    if not settings.model.eager:
        kept["eager"] = False
    # folders of older versions have no such key, and were asked by lm-eval's own definition
    changes = BENCHMARKS[name].named_changes
    changed = {"task": changes} if changes else {}
    return changed | {
        "lm_eval": lm_eval_version,
        "seed": settings.seed,
        "model": model,
        "settings": kept | {"batch_size": settings.model.batch_size},
        "benchmark": chosen.model_dump(mode="json", exclude={"samples"}),  # more of them may be asked for later
        "data": content_digest(chosen.data) if chosen.data else None,
    }


def _same_as_before(place: Path, identity: dict) -> None:
    """UserError if `place` holds answers of another model or settings."""
    saved = place / "settings.json"
    if saved.exists() and any(place.glob("*-*.json*")):  # before the first answer they may still be mended
        was = json.loads(saved.read_text())
        for key in identity:
            if was.get(key) != identity[key]:
                raise UserError(
                    f"{saved}: the answers there were given with another {key} "
                    f"({_difference(was.get(key), identity[key])}); set folder to a new one or delete {place}"
                )
        return
    with commit_file(saved) as draft:
        draft.write_text(json.dumps(identity, indent=2) + "\n")


def _difference(was, now) -> str:
    if not isinstance(was, dict) or not isinstance(now, dict):
        return f"was {was!r}, is {now!r}"
    key = next(key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key))
    return f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
