"""What a check found."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "not applicable"]


@dataclass(frozen=True, slots=True)
class Finding:
    """detail: in words, with the way out where one is needed."""

    check: str
    status: Status
    detail: str
