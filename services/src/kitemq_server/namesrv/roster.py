"""Who was registered when this namesrv last ran. After a restart it says nothing of routes until they are back.

Brokers register again at once when the connection comes back, but not all in the same moment: a route without one of
them would make producers fail and consumer groups share out their queues anew. A hint, not a truth: without the file,
or after the warm-up time, the namesrv answers with what it has.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from pathlib import Path

from kitemq_server.namesrv.files import replace_file

logger = logging.getLogger(__name__)

FILE_NAME = "brokers.json"


class Roster:
    """Brokers as "name/id". awaited: those of the last run that are not back yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = _read(path)
        self._dirty = asyncio.Event()
        self._writing = threading.Lock()
        self.awaited = set(self._kept)

    def note(self, registered: frozenset[str]) -> None:
        """These are registered now. Who is still awaited stays in the file."""
        self.awaited -= registered
        kept = registered | self.awaited
        if kept != self._kept:
            self._kept = kept
            self._dirty.set()

    def dismiss(self, name: str) -> None:
        """This one has said goodbye."""
        self.awaited.discard(name)

    def give_up(self, registered: frozenset[str]) -> None:
        """Wait for nobody any more."""
        self.awaited.clear()
        self.note(registered)

    async def write_forever(self) -> None:
        """Keep the file as the last `note` said; at the end too."""
        written = self._kept
        try:
            while True:
                await self._dirty.wait()
                self._dirty.clear()
                kept = self._kept
                await asyncio.to_thread(self._write)
                written = kept
        finally:
            if written != self._kept:
                self._write()

    def _write(self) -> None:
        try:
            with self._writing:  # at the end a write may still be under way in its thread
                replace_file(self._path, json.dumps(sorted(self._kept)).encode())
        except OSError as error:
            logger.warning("roster cannot be written path=%s error=%s", self._path, error)


def _read(path: Path) -> frozenset[str]:
    try:
        names = json.loads(path.read_bytes())
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return frozenset(names)
        logger.warning("roster ignored, it is no list of names path=%s", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("roster ignored path=%s error=%s", path, error)
    return frozenset()
