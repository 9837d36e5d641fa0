"""The installed versions against one row that belongs together: requirements-npu.txt, or requirements.txt on CPU.

Both are read from the files themselves. In requirements-npu.txt `#:` marks what pip does not install, `#?` what may be
missing, `#>` the driver, which may be newer.
"""

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from npd_ascend.doctor.device import cann_version
from npd_ascend.doctor.finding import Finding

ROOT = Path(__file__).parent.parent.parent
_LINE = re.compile(r"^(?P<mark>#[:?] )?(?P<name>[A-Za-z][\w-]*)==(?P<version>\S+)")


def read_row(path: Path) -> list[tuple[str, str, bool]]:
    """(package, version, whether it must be there) in the order of the file."""
    found = (_LINE.match(line) for line in path.read_text().splitlines())
    return [(m["name"], m["version"], m["mark"] != "#? ") for m in found if m]


def driver_of_row(file: str) -> str | None:
    """None if it names none, or is not there, as where the package alone was installed."""
    path = ROOT / file
    found = re.search(r"^#> driver==(\S+)", path.read_text(), re.MULTILINE) if path.exists() else None
    return found.group(1) if found else None


def installed(name: str) -> str | None:
    if name == "cann":  # no package of pip's
        return cann_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def version_finding(
    file: str, if_not: Literal["warning", "failed"], look_up: Callable[[str], str | None] = installed
) -> Finding:
    """The first package of the row in `file` that differs, and what to do; local versions (+cpu) do not count.

    if_not: what a difference is.
    """
    path = ROOT / file
    if not path.exists():
        return Finding("versions", "warning", f"{path}: no such file beside the package, so nothing to compare with")
    row = read_row(path)
    for name, wanted, needed in row:
        found = look_up(name)
        if found is None and not needed:
            continue
        if found is None or found.split("+")[0] != wanted:
            have = "is not installed" if found is None else f"is {found}"
            return Finding("versions", if_not, f"{name} {have}, {file} says {wanted}; install that row, whole")
    return Finding("versions", "ok", f"the row of {file}: " + ", ".join(f"{name} {v}" for name, v, _ in row[:4]))
