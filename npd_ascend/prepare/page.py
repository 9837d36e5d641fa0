"""report.html of prepared data: what was read, left out and why, how long the rest is."""

from collections.abc import Mapping
from pathlib import Path

from npd_ascend.report.template import load_template


def write_page(file: Path, folder: Path, statistics: Mapping, reasons: Mapping[str, str]) -> None:
    """statistics: as in statistics.json. reasons: name -> what it means."""
    page = load_template("prepare.html.j2").render(folder=str(folder), statistics=statistics, reasons=reasons)
    file.write_text(page, encoding="utf-8")
