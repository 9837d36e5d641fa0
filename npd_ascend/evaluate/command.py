"""`npd eval --benchmarks`: every benchmark that the settings name, then the table."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npd_ascend.device import DTYPES, open_device
from npd_ascend.durable import commit_file, make_folder, only_process, sha256
from npd_ascend.errors import UserError
from npd_ascend.evaluate.answers import AnswerFile
from npd_ascend.evaluate.benchmarks import BENCHMARKS
from npd_ascend.evaluate.scores import Score, score_of
from npd_ascend.evaluate.settings import BenchmarkSettings, EvalSettings, content_digest, load_settings
from npd_ascend.evaluate.table import terminal_table, write_results
from npd_ascend.model.families import read_config
from npd_ascend.progress import progress
from npd_ascend.rollout.engine import Engine
from npd_ascend.rollout.hf_engine import HfEngine
from npd_ascend.rollout.vllm_versions import require_vllm
from npd_ascend.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from npd_ascend.evaluate.harness import Harness


def run_benchmarks(path: Path, overrides: list[str], dry_run: bool = False) -> None:
    """Ask what has not been asked yet, then write FOLDER/results.json and results.html and print the table.

    dry_run: only say what would be refused before the first question, with any model of the same tokenizer.
    """
    from npd_ascend.evaluate.harness import require_lm_eval

    settings = load_settings(path, overrides)
    lm_eval_version = require_lm_eval()
    if settings.model.engine == "vllm":
        require_vllm("model.engine")
    make_folder(settings.folder)
    refusal = f"{settings.folder}: another `npd eval` is working there; wait for it or set another folder"
    with only_process(settings.folder / "eval.lock", refusal):
        digests = {name: content_digest(chosen.data) for name, chosen in settings.benchmarks.asked() if chosen.data}
        if dry_run:
            asked = dict(settings.benchmarks.asked())
            _, requests = _rehearse(settings, asked, digests)
            print(f"packages, data and prompts are sound: {len(asked)} benchmarks, {requests} requests; none was asked")
            return
        model = _fingerprint(settings)
        for name, chosen in settings.benchmarks.asked():
            identity = _identity(settings, name, chosen, digests.get(name), model, lm_eval_version)
            _same_as_before(settings.folder / name, identity)
        left = [
            (name, chosen, sample)
            for name, chosen in settings.benchmarks.asked()
            for sample in range(chosen.samples)
            if not _rows_file(settings, name, sample).exists()
        ]
        if left:  # not for a table alone
            _ask(settings, left, digests)
        scores = {name: _score(settings, name, chosen.samples) for name, chosen in settings.benchmarks.asked()}
        write_results(settings, scores, model, lm_eval_version)
        print(terminal_table(settings, scores))


def _ask(settings: EvalSettings, left: list[tuple[str, BenchmarkSettings, int]], digests: dict[str, str]) -> None:
    """All samples that are missing, each kept when it is complete."""
    from npd_ascend.evaluate.engine_lm import EngineLM

    tokenizer = ChatTokenizer(settings.model.path)
    engine = _engine(settings, tokenizer, _max_tokens(settings))
    engine.load_weights(settings.model.path)
    harness, _ = _rehearse(settings, {name: chosen for name, chosen, _ in left}, digests)
    lm = EngineLM(engine, tokenizer, **_asking(settings))
    for name, chosen, sample in left:
        lm.begin(name, sample, AnswerFile(settings.folder / name / f"answers-{sample}.jsonl"))
        rows = harness.ask(name, chosen, lm)
        with commit_file(_rows_file(settings, name, sample)) as draft:
            draft.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        # the table may be hours away
        print(f"{BENCHMARKS[name].title}: {100 * _score(settings, name, sample + 1).mean:.2f}", file=sys.stderr)


def _rehearse(
    settings: EvalSettings, chosen_of: dict[str, BenchmarkSettings], digests: dict[str, str]
) -> "tuple[Harness, int]":
    """Load the data, make and measure every prompt and count them; UserError for what would be in the way later."""
    from npd_ascend.evaluate.engine_lm import Rehearsal
    from npd_ascend.evaluate.harness import Harness

    harness = Harness(settings, digests)
    rehearsal = Rehearsal(None, ChatTokenizer(settings.model.path), **_asking(settings))
    with progress("eval: data and prompts", len(chosen_of), "benchmarks") as bar:
        for name, chosen in chosen_of.items():
            rehearsal.begin(name, 0, None)
            harness.rehearse(name, chosen, rehearsal)
            bar.update(1)
    return harness, rehearsal.requests


def _asking(settings: EvalSettings) -> dict[str, Any]:
    model = settings.model
    asking: dict[str, Any] = {"prompt_suffix": model.prompt_suffix, "batch_size": model.batch_size}
    return asking | {"max_tokens": _max_tokens(settings), "seed": settings.seed}


def _score(settings: EvalSettings, name: str, samples: int) -> Score:
    files = [_rows_file(settings, name, sample) for sample in range(samples)]
    return score_of([json.loads(file.read_text(encoding="utf-8")) for file in files])


def _rows_file(settings: EvalSettings, name: str, sample: int) -> Path:
    return settings.folder / name / f"questions-{sample}.json"


def _max_tokens(settings: EvalSettings) -> int:
    """Of a prompt with its answer; UserError where the model cannot read so many."""
    model = settings.model
    context = read_config(model.path).max_position
    if (model.max_tokens or 0) > context:
        raise UserError(
            f"model.max_tokens={model.max_tokens} is above max_position_embeddings={context} of "
            f"{model.path}/config.json; lower it"
        )
    return model.max_tokens or context


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


def _identity(
    settings: EvalSettings,
    name: str,
    chosen: BenchmarkSettings,
    digest: str | None,
    model: dict[str, str],
    lm_eval_version: str,
) -> dict:
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
        "data": digest,
    }


def _same_as_before(place: Path, identity: dict) -> None:
    """UserError if `place` holds answers of another model or settings."""
    saved = place / "settings.json"
    if saved.exists() and any(place.glob("*-*.json*")):  # before the first answer they may still be mended
        was = json.loads(saved.read_text())
        if differing := _differing(was, identity):
            other = _other(differing[0], was.get(differing[0]), identity.get(differing[0]))
            raise UserError(
                f"{saved}: the answers there were given with {other}; set folder to a new one or delete {place}"
            )
        return
    with commit_file(saved) as draft:
        draft.write_text(json.dumps(identity, indent=2) + "\n")


def _other(key: str, was, now) -> str:
    if key == "data" and was is None:  # had they come from the hub, `benchmark` would differ first
        return "data whose content an older version did not record"
    if key == "task":  # whole definitions would fill the screen
        changed = ", ".join(_differing(was or {}, now or {}))
        return f"another task: this version asks it or reads its answers otherwise ({changed})"
    if not isinstance(was, dict) or not isinstance(now, dict):
        return f"another {key} (was {was!r}, is {now!r})"
    first = _differing(was, now)[0]
    return f"another {key} ({first} was {was.get(first)!r}, is {now.get(first)!r})"


def _differing(was: dict, now: dict) -> list[str]:
    return [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
