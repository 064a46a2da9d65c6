"""`kitemq-server` on a disk whose fdatasync fails from the moment that the file named by FAILING_DISK is there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from kitemq_server.cli import main


def break_syncs(sign: Path) -> None:
    """As a kernel does that has lost the device: every sync fails, with or without something to write."""
    sync = os.fdatasync

    def fdatasync(fd: Any) -> None:
        if sign.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    os.fdatasync = fdatasync


if __name__ == "__main__":
    break_syncs(Path(os.environ["FAILING_DISK"]))
    main()
