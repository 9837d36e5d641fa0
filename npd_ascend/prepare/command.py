"""Read, sort out, split, write: twice through the sources, with a few bytes a row in memory between."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from npd_ascend.config_file import load_yaml
from npd_ascend.durable import commit_folder, make_folder
from npd_ascend.errors import UserError
from npd_ascend.prepare.overlap import EvaluationTexts, Match, contaminated
from npd_ascend.prepare.page import write_page
from npd_ascend.prepare.sources import Row, SourceConfig, count_rows, files_of, read_rows
from npd_ascend.progress import progress
from npd_ascend.tokenizer import ChatTokenizer

# Why a row is left out, in the order in which it is asked.
REASONS = {
    "no_text": "no text, or a chat of several turns",
    "too_long": "more than max_prompt_tokens, or with its answer more than max_tokens",
    "duplicate": "the same prompt stands earlier, but for case, spaces and width of letters",
    "contaminated": "shares ngram words with an evaluation set",
}

_QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "99%": 0.99, "most": 1.0}


class PrepareConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path  # is made
    tokenizer: Path  # a model folder: the chat format in which tokens are counted
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    evaluation_sets: tuple[SourceConfig, ...] = ()  # what must not be trained on
    ngram: int = Field(13, ge=1)  # words
    common: int = Field(10, ge=1)  # an n-gram of more rows than that is boilerplate
    max_prompt_tokens: int = Field(ge=1)  # in chat format
    max_tokens: int = Field(ge=2)  # prompt and answer
    heldout_share: float = Field(0.0, ge=0, lt=1)
    salt: str = "npd"  # another one makes another split


@dataclass
class Sorted:
    """What the first pass knows: a reason or None for every row, in the order of reading."""

    reasons: list[str | None] = field(default_factory=list)
    matches: dict[int, list[Match]] = field(default_factory=dict)
    tokens: dict[int, tuple[int, int]] = field(default_factory=dict)  # prompt and answer of rows without a reason


def run_prepare(file: Path) -> None:
    """Make folder/{train,heldout,dropped}.jsonl, statistics.json and report.html, all of it or nothing."""
    config = load_yaml(PrepareConfig, file, ())
    if config.folder.exists():
        raise UserError(f"{config.folder}: there already; remove it, or set folder to a new one")
    make_folder(config.folder.parent)
    total = sum(count_rows(path) for source in config.sources for path in files_of(source))
    texts, evaluation_rows = _evaluation_texts(config)
    evaluation = EvaluationTexts(texts, config.ngram)
    found = _sort_out(config, ChatTokenizer(config.tokenizer), evaluation, total)
    leaked = contaminated(found.matches, config.common)
    for row in leaked:
        found.reasons[row] = "contaminated"
        del found.tokens[row]
    _refuse_nothing(config, found)
    with commit_folder(config.folder) as draft:
        statistics = _write(config, draft, found, leaked, total) | {"evaluation_sets": evaluation_rows}
        (draft / "statistics.json").write_text(json.dumps(statistics, indent=2, ensure_ascii=False) + "\n")
        write_page(draft / "report.html", config.folder, statistics, REASONS)
    for name, count in statistics["rows"].items():
        print(f"{name:<14}{count:>10,}")
    for one in evaluation_rows:
        print(f"compared with {one['path']}: {one['rows']:,} rows, {one['unreadable']:,} of them without a text")
    print(f"page: {config.folder / 'report.html'}")


def _refuse_nothing(config: PrepareConfig, found: Sorted) -> None:
    if found.tokens:
        return
    counts = Counter(found.reasons)
    most = counts.most_common(1)
    why = (
        f"{most[0][1]} of {len(found.reasons)} rows: {most[0][0]}, {REASONS[most[0][0]]}"
        if most
        else "they have no row"
    )
    raise UserError(f"sources: {', '.join(str(source.path) for source in config.sources)}: nothing is left ({why})")


def is_heldout(prompt: str, share: float, salt: str) -> bool:
    """By the prompt alone, so that other files or another order move nothing to the other side."""
    digest = hashlib.sha256(f"{salt}:{_normalised(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _evaluation_texts(config: PrepareConfig) -> tuple[list[tuple[str, str]], list[dict]]:
    """([(place, text)], what was found in each set); UserError for a set without a text to compare with."""
    texts: list[tuple[str, str]] = []
    found = []
    for source in config.evaluation_sets:
        rows = [row for path in files_of(source, all_splits=True) for row in read_rows(source, path)]
        readable = [row for row in rows if row.prompt is not None]
        if not readable:
            raise UserError(
                f"evaluation_sets: {source.path}: none of its {len(rows)} rows has a text or one turn of chat under "
                f"{source.prompt_key!r}, so nothing would be compared; set prompt_key"
            )
        texts += [(row.place, text) for row in readable for text in (row.prompt, row.answer) if text]
        found.append({"path": str(source.path), "rows": len(rows), "unreadable": len(rows) - len(readable)})
    return texts, found


def _rows(config: PrepareConfig) -> Iterator[Row]:
    for source in config.sources:
        for path in files_of(source):
            yield from read_rows(source, path)


def _sort_out(config: PrepareConfig, tokenizer: ChatTokenizer, evaluation: EvaluationTexts, total: int) -> Sorted:
    found, seen = Sorted(), set()
    with progress("look", total, "rows") as bar:
        for number, row in enumerate(_rows(config)):
            bar.update()
            if row.prompt is None:
                found.reasons.append("no_text")
                continue
            prompt_tokens = len(tokenizer.encode_prompt(row.prompt))
            answer_tokens = len(tokenizer.encode_answer(row.answer)) if row.answer else 0
            key = hashlib.sha256(_normalised(row.prompt).encode()).digest()[:12]
            if prompt_tokens > config.max_prompt_tokens or prompt_tokens + answer_tokens > config.max_tokens:
                found.reasons.append("too_long")
            elif key in seen:
                found.reasons.append("duplicate")
            else:
                seen.add(key)
                found.reasons.append(None)
                found.tokens[number] = (prompt_tokens, answer_tokens)
                if matches := evaluation.find(row.prompt, row.answer or ""):
                    found.matches[number] = matches
    return found


def _write(config: PrepareConfig, draft: Path, found: Sorted, leaked: dict[int, Match], total: int) -> dict:
    names = ("train", "heldout", "dropped")
    counts: dict[str, int] = dict.fromkeys(("read", *names[:2], *REASONS), 0)
    with (
        (draft / "train.jsonl").open("w") as train,
        (draft / "heldout.jsonl").open("w") as heldout,
        (draft / "dropped.jsonl").open("w") as dropped,
        progress("write", total, "rows") as bar,
    ):
        for number, row in enumerate(_rows(config)):
            bar.update()
            reason = found.reasons[number]
            counts["read"] += 1
            if reason is None:
                held = is_heldout(row.prompt or "", config.heldout_share, config.salt)
                counts["heldout" if held else "train"] += 1
                record = {"prompt": row.prompt, "answer": row.answer, "source": row.place}
                print(json.dumps(record, ensure_ascii=False), file=heldout if held else train)
                continue
            counts[reason] += 1
            said = {"source": row.place, "reason": reason}
            if match := leaked.get(number):
                said |= {"evaluation": match.place, "words": match.words}
            print(json.dumps(said, ensure_ascii=False), file=dropped)
    return {
        "config": config.model_dump(mode="json"),
        "rows": counts,
        "tokens": {
            "prompt": _spread([prompt for prompt, _ in found.tokens.values()]),
            "answer": _spread([answer for _, answer in found.tokens.values()]),
        },
        "contaminated": [{"evaluation": match.place, "words": match.words} for match in list(leaked.values())[:20]],
    }


def _spread(values: list[int]) -> dict[str, int]:
    ordered = sorted(values) or [0]
    last = len(ordered) - 1
    return {name: ordered[round(share * last)] for name, share in _QUANTILES.items()}
