"""The README's program does what it says."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from pathlib import Path

from tests.cluster import Cluster

README = Path(__file__).parent.parent.parent / "README.md"


async def test_the_readmes_program_sends_and_handles(cluster: Cluster, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    program = tmp_path / "program.py"
    program.write_text(block.replace("127.0.0.1:9876", cluster.namesrv_address))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-u", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            sent = (await process.stdout.readline()).decode()
            handled = (await process.stdout.readline()).decode()
        assert re.fullmatch(r"orders@broker-a:\d 0\n", sent)
        assert handled == "paid b'book'\n"
    finally:
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")
