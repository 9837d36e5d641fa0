"""At which addresses processes wait for connections, read from /proc."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# as /proc/net has them: 127.0.0.1, ::1, and the former written as an address of the latter kind
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def listening(pids: Iterable[int]) -> set[str]:
    address_of = {
        line.split()[9]: line.split()[1].split(":")[0]
        for kind in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    sockets = set()
    for pid in pids:
        with suppress(OSError):  # it may be gone
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    sockets.add(os.readlink(f"/proc/{pid}/fd/{descriptor}").removeprefix("socket:[").removesuffix("]"))
    return {address for inode, address in address_of.items() if inode in sockets}
