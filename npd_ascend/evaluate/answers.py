"""Answers that a killed evaluation had already got: a JSON line per batch, so that none is asked twice."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from npd_ascend.durable import append_line
from npd_ascend.errors import UserError


class AnswerFile:
    """Answers by kind and number of their batch.

    The batches are the same in every process, as a batch is padded together: what a kill leaves to be asked then gets
    the same bits.
    """

    def __init__(self, path: Path):
        self._path, self._batches = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        )  # a torn last line is no batch
        for line in lines:
            row = json.loads(line)
            self._batches[row["kind"], row["batch"]] = row

    def batch(self, kind: str, number: int, questions: Sequence[Any], ask: Callable[[], list]) -> list:
        """The answers to `questions` (JSON values), from the file or by `ask`, whose answers it keeps.

        UserError if the file holds answers to other questions.
        """
        digest = hashlib.sha256(json.dumps(questions).encode()).hexdigest()
        row = self._batches.get((kind, number))
        if row is None:
            answers = ask()
            append_line(
                self._path,
                json.dumps(
                    {"kind": kind, "batch": number, "questions": digest, "answers": answers}, ensure_ascii=False
                ),
            )
            return answers
        if row["questions"] != digest:
            raise UserError(
                f"{self._path}: holds answers to other questions, so the data or the task have changed; delete "
                f"{self._path.parent} or set another folder"
            )
        return row["answers"]
