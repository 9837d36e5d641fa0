"""DROP's score where a question wants several spans and an answer is one text: lm-eval would take it for one span."""

import re
from collections.abc import Mapping, Sequence

# between digits a comma is none: 1,500
_BETWEEN_SPANS = re.compile(r"\s*(?:;|,(?!\d))\s*(?:and\s+)?|\s+and\s+")


def better_reading(question: Mapping, answers: Sequence[str]) -> dict[str, float]:
    """em and f1 in 0..1 by lm-eval's own measure (DROP, arXiv 1903.00161, section 5) for `answers`, a single text: read
    as one span, or cut at commas, semicolons and "and", whichever scores higher. lm-eval calls it process_results."""
    from lm_eval.tasks.drop.utils import process_results

    (text,) = answers
    spans = [span for span in _BETWEEN_SPANS.split(text) if span]
    readings = [[text], spans] if len(spans) > 1 else [[text]]
    return max((process_results(question, reading) for reading in readings), key=lambda score: score["f1"])
