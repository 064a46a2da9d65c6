"""Key values of one namesrv, kept in one JSON file that is replaced as a whole.

A change is answered once it is on disk. One task writes; what arrives while it writes goes into the next file together.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kitemq.errors import BrokerBusyError, InternalBrokerError, InvalidRequestError, NotFoundError
from kitemq_server.common.config import ConfigError
from kitemq_server.namesrv.files import replace_file

logger = logging.getLogger(__name__)

ORDER_TOPIC_CONFIG = "ORDER_TOPIC_CONFIG"

FILE_NAME = "kv.json"
NAME_CHARS_MAX = 255
VALUE_CHARS_MAX = 64 * 1024
ENTRIES_MAX = 10_000
WAITING_MAX = 256
BUSY_RETRY_MS = 200

Values = dict[str, dict[str, str]]


@dataclass(slots=True)
class _Change:
    """value: None = delete."""

    namespace: str
    key: str
    value: str | None
    done: asyncio.Future[None]


class KeyValues:
    """Values by namespace and key. Reads are of memory, which changes only once the file has."""

    def __init__(self, path: Path, values: Values) -> None:
        self._path = path
        self._values = values
        self._waiting: asyncio.Queue[_Change] = asyncio.Queue(WAITING_MAX)

    def get(self, namespace: str, key: str) -> str:
        """Raises NotFoundError."""
        try:
            return self._values[namespace][key]
        except KeyError:
            raise NotFoundError(
                f"namespace {namespace[:NAME_CHARS_MAX]!r} has no value of key {key[:NAME_CHARS_MAX]!r}"
            ) from None

    def namespace(self, namespace: str) -> Mapping[str, str]:
        """Every value of a namespace, by key."""
        return self._values.get(namespace, {})

    async def put(self, namespace: str, key: str, value: str) -> None:
        """Raises InvalidRequestError over a limit, BrokerBusyError when too many changes wait, InternalBrokerError."""
        for kind, name in (("namespace", namespace), ("key", key)):
            if not 1 <= len(name) <= NAME_CHARS_MAX:
                raise InvalidRequestError(f"the {kind} has {len(name)} characters: 1 to {NAME_CHARS_MAX}")
        if len(value) > VALUE_CHARS_MAX:
            raise InvalidRequestError(f"the value of {key!r} has {len(value)} characters: at most {VALUE_CHARS_MAX}")
        if key not in self.namespace(namespace) and sum(map(len, self._values.values())) >= ENTRIES_MAX:
            raise InvalidRequestError(f"this namesrv keeps {ENTRIES_MAX} values already: delete some first")
        await self._change(namespace, key, value)

    async def delete(self, namespace: str, key: str) -> None:
        """A key that is not there is deleted already. Raises as `put`."""
        if key in self.namespace(namespace):
            await self._change(namespace, key, None)

    async def _change(self, namespace: str, key: str, value: str | None) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait(_Change(namespace, key, value, done))
        except asyncio.QueueFull:
            raise BrokerBusyError("too many changes of key values are waiting", retry_after_ms=BUSY_RETRY_MS) from None
        await done

    async def write_forever(self) -> None:
        """The one writer."""
        while True:
            changes = [await self._waiting.get()]
            while not self._waiting.empty():
                changes.append(self._waiting.get_nowait())
            values = {namespace: dict(entries) for namespace, entries in self._values.items()}
            for change in changes:
                if change.value is None:
                    values.get(change.namespace, {}).pop(change.key, None)
                else:
                    values.setdefault(change.namespace, {})[change.key] = change.value
            try:
                await asyncio.to_thread(replace_file, self._path, _encode(values))
            except OSError as error:
                logger.error("key values cannot be written path=%s error=%s", self._path, error)
                failure = InternalBrokerError("the namesrv cannot write its key-value file, see its log")
                for change in changes:
                    if not change.done.done():
                        change.done.set_exception(failure)
                continue
            self._values = {namespace: entries for namespace, entries in values.items() if entries}
            for change in changes:
                if not change.done.done():
                    change.done.set_result(None)


@asynccontextmanager
async def open_key_values(folder: Path) -> AsyncIterator[KeyValues]:
    """Key values kept in `folder`, which this process alone uses meanwhile. The caller runs `write_forever`.

    Raises ConfigError when the folder is in use or cannot be used, or the file is damaged.
    """
    lock = _lock(folder)
    try:
        path = folder / FILE_NAME
        yield KeyValues(path, _read(path))
    finally:
        os.close(lock)


def _lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"data_dir: cannot use {folder}: {(error.strerror or str(error)).lower()}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(f"data_dir: {folder} is in use by another namesrv") from None
    return lock


def _encode(values: Values) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1, sort_keys=True).encode()


def _read(path: Path) -> Values:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} ({error}): repair it, or move it away to start without") from None
    well_formed = isinstance(values, dict) and all(
        isinstance(entries, dict) and all(isinstance(value, str) for value in entries.values())
        for entries in values.values()
    )
    if not well_formed:
        raise ConfigError(f"{path} does not hold namespaces of texts: repair it, or move it away to start without")
    return dict(values)
