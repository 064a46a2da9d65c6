"""The key index's buckets as LMDB keeps them: at some committed state; after a power loss at an older one, or gone."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from kitemq_server.store.index_buckets import Applied, BucketError, Item
from tests.crash.fault_plan import FaultPlan


class _Version(NamedTuple):
    items: dict[bytes, bytes]
    applied: Applied


class CrashBuckets:
    """Buckets in memory that outlive the store that wrote them. faults: of the disk that they share."""

    def __init__(self, faults: FaultPlan) -> None:
        self._faults = faults
        self._versions: dict[int, list[_Version]] = {}
        self._dropped: dict[int, list[_Version]] = {}

    def names(self) -> list[int]:
        return sorted(self._versions)

    def applied(self, bucket: int) -> Applied | None:
        versions = self._versions.get(bucket)
        return versions[-1].applied if versions else None

    def write(self, bucket: int, items: Iterable[Item], applied: Applied) -> None:
        if self._faults.dead:
            raise BucketError("the power is off")
        versions = self._versions.setdefault(bucket, [])
        old = versions[-1].items if versions else {}
        versions.append(_Version({**old, **dict(items)}, applied))

    def scan_back(self, bucket: int, low: bytes, high: bytes, count_max: int) -> list[Item]:
        versions = self._versions.get(bucket)
        if not versions:
            return []
        items = versions[-1].items
        return [(key, items[key]) for key in sorted(items, reverse=True) if low <= key < high][:count_max]

    def drop(self, bucket: int) -> None:
        if bucket in self._versions:
            self._dropped[bucket] = self._versions.pop(bucket)

    def close(self) -> None:
        """What was written stays."""

    def kill(self, faults: FaultPlan) -> CrashBuckets:
        """The process dies: every transaction is there."""
        other = CrashBuckets(faults)
        other._versions = {bucket: list(versions) for bucket, versions in self._versions.items()}
        return other

    def crash(self, faults: FaultPlan, rng: random.Random) -> CrashBuckets:
        """The power fails: each bucket at one of its transactions, or gone; a dropped one may be back."""
        other = self.kill(faults)
        if rng.random() < 0.5:
            for bucket, versions in self._dropped.items():
                if rng.random() < 0.5:
                    other._versions.setdefault(bucket, list(versions))
        for bucket in list(other._versions):
            fate = rng.random()
            if fate < 0.1:
                del other._versions[bucket]
            elif fate < 0.5:
                kept = rng.randint(1, len(other._versions[bucket]))
                del other._versions[bucket][kept:]
        return other
