"""Where the key index keeps its entries: one ordered set of keys per hour, in LMDB or, for ephemeral stores, in memory.

The store's thread writes, the loop looks up; a lock keeps an environment from being closed under a reader.
"""

from __future__ import annotations

import logging
import shutil
import struct
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import lmdb

logger = logging.getLogger(__name__)

_MAP_BYTES = 16 * 1024**3  # of address space, not of memory or disk
_ENVIRONMENTS_MAX = 64
_APPLIED_KEY = b"applied"
_DAMAGED_MARK = "damaged"  # a file in the directory of a bucket that is to be made again
_APPLIED = struct.Struct(">16sQIQQ")

Item = tuple[bytes, bytes]


class BucketError(Exception):
    """A bucket could not be written; nothing of it was."""


class Applied(NamedTuple):
    """What a bucket's last transaction says of itself: this store's log is applied up to a physical offset of an epoch.

    previous_bucket, previous_offset: the bucket that was written before this one began, and how far it had come then.
    """

    store_uuid: bytes
    physical_offset: int
    epoch: int
    previous_bucket: int
    previous_offset: int


class Buckets(Protocol):
    """Ordered key-value sets, by bucket number."""

    def names(self) -> list[int]:
        """Buckets that are there, oldest first."""

    def applied(self, bucket: int) -> Applied | None:
        """What the bucket says of itself; None when it cannot be read."""

    def write(self, bucket: int, items: Iterable[Item], applied: Applied) -> None:
        """Adds items and says how far the log is applied, all or nothing. Raises BucketError."""

    def scan_back(self, bucket: int, low: bytes, high: bytes, count_max: int) -> list[Item]:
        """Items with low <= key < high, highest first."""

    def drop(self, bucket: int) -> None:
        """Removes a bucket, if it is there."""

    def close(self) -> None: ...


class MemoryBuckets:
    """Buckets that are gone with the process."""

    def __init__(self) -> None:
        self._buckets: dict[int, tuple[list[bytes], dict[bytes, bytes], Applied]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[int]:
        return sorted(self._buckets)

    def applied(self, bucket: int) -> Applied | None:
        return self._buckets[bucket][2] if bucket in self._buckets else None

    def write(self, bucket: int, items: Iterable[Item], applied: Applied) -> None:
        with self._lock:
            keys, values, _ = self._buckets.get(bucket, ([], {}, applied))
            for key, value in items:
                if key not in values:
                    keys.append(key)
                values[key] = value
            keys.sort()
            self._buckets[bucket] = (keys, values, applied)

    def scan_back(self, bucket: int, low: bytes, high: bytes, count_max: int) -> list[Item]:
        with self._lock:
            if bucket not in self._buckets:
                return []
            keys, values, _ = self._buckets[bucket]
            end = bisect_left(keys, high)
            start = max(bisect_right(keys, low) - 1, end - count_max, 0)
            return [(key, values[key]) for key in reversed(keys[start:end]) if key >= low]

    def drop(self, bucket: int) -> None:
        self._buckets.pop(bucket, None)

    def close(self) -> None:
        self._buckets.clear()


class LmdbBuckets:
    """One LMDB environment per bucket, in a directory named by its number."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._environments: dict[int, lmdb.Environment] = {}
        self._written_bucket = 0  # its environment stays open
        self._damaged: set[int] = set()
        self._lock = threading.Lock()

    def names(self) -> list[int]:
        if not self._root.is_dir():
            return []
        return sorted(int(path.name) for path in self._root.iterdir() if path.name.isdigit())

    def applied(self, bucket: int) -> Applied | None:
        if (self._root / str(bucket) / _DAMAGED_MARK).exists():
            return None
        with self._lock:
            try:
                with self._environment(bucket, create=False).begin() as transaction:
                    value = transaction.get(_APPLIED_KEY)
            except (lmdb.Error, OSError) as error:
                logger.warning("index bucket cannot be read, it is rebuilt: bucket=%d error=%s", bucket, error)
                return None
        return Applied._make(_APPLIED.unpack(value)) if value is not None and len(value) == _APPLIED.size else None

    def write(self, bucket: int, items: Iterable[Item], applied: Applied) -> None:
        items = list(items)
        try:
            with self._lock:
                self._root.mkdir(parents=True, exist_ok=True)
                self._written_bucket = bucket
                environment = self._environment(bucket, create=True)
            try:
                self._write(environment, items, applied)
            except lmdb.MapFullError:
                with self._lock:
                    environment.set_mapsize(environment.info()["map_size"] * 2)
                self._write(environment, items, applied)
        except (lmdb.Error, OSError) as error:
            raise BucketError(f"bucket {bucket}: {error}") from error

    def _write(self, environment: lmdb.Environment, items: Sequence[Item], applied: Applied) -> None:
        with environment.begin(write=True) as transaction:
            with transaction.cursor() as cursor:
                cursor.putmulti(items)
            transaction.put(_APPLIED_KEY, _APPLIED.pack(*applied))

    def scan_back(self, bucket: int, low: bytes, high: bytes, count_max: int) -> list[Item]:
        found: list[Item] = []
        with self._lock:
            directory = self._root / str(bucket)
            if bucket in self._damaged or not directory.is_dir():
                return found
            try:
                environment = self._environment(bucket, create=False)
                with environment.begin() as transaction, transaction.cursor() as cursor:
                    there = cursor.prev() if cursor.set_range(high) else cursor.last()
                    while there and len(found) < count_max and cursor.key() >= low:
                        found.append(cursor.item())
                        there = cursor.prev()
            except (lmdb.Error, OSError) as error:
                logger.error("index bucket damaged, the next start makes it again: path=%s error=%s", directory, error)
                self._damaged.add(bucket)
                with suppress(OSError):
                    (directory / _DAMAGED_MARK).touch()
        return found

    def drop(self, bucket: int) -> None:
        with self._lock:
            environment = self._environments.pop(bucket, None)
            if environment is not None:
                environment.close()
            self._damaged.discard(bucket)
            with suppress(FileNotFoundError):
                shutil.rmtree(self._root / str(bucket))

    def close(self) -> None:
        with self._lock:
            while self._environments:
                self._environments.popitem()[1].close()

    def _environment(self, bucket: int, *, create: bool) -> lmdb.Environment:
        """Under the lock. Raises lmdb.Error."""
        environment = self._environments.get(bucket)
        if environment is None:
            while len(self._environments) >= _ENVIRONMENTS_MAX:
                oldest = min(name for name in self._environments if name != self._written_bucket)
                self._environments.pop(oldest).close()
            # metasync off: a power loss may undo the last transaction, but damages none.
            environment = self._environments[bucket] = lmdb.open(
                str(self._root / str(bucket)), map_size=_MAP_BYTES, metasync=False, create=create, max_readers=16
            )
        return environment
