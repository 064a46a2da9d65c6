"""What one file holds: as a process sees it, as the disk has it, and the changes between the two.

A change is *unsynced* until a sync of its file. After a power loss each unsynced change is there, gone, cut, partly
there by sectors, zeroed or garbled, in any combination: no order among them is promised. A sync that fails leaves its
changes visible and never writes them again, as Linux does ("fsyncgate").
"""

from __future__ import annotations

import random
from typing import NamedTuple

SECTOR_BYTES = 512


class Write(NamedTuple):
    """Bytes at a position. time: place among all changes of the disk."""

    time: int
    position: int
    data: bytes


class Resize(NamedTuple):
    """The file gets this size: cut, or grown with zeros."""

    time: int
    size: int


class Grow(NamedTuple):
    """The file gets at least this size."""

    time: int
    size: int


Change = Write | Resize | Grow


class Content:
    """Bytes of one file. live: what reads see. durable: what surely survives."""

    __slots__ = ("durable", "live", "lost", "unsynced")

    def __init__(self, data: bytes = b"") -> None:
        self.live = bytearray(data)
        self.durable = bytearray(data)
        self.unsynced: list[Change] = []
        self.lost = False  # a sync has failed: live may show what no sync will ever write

    def change(self, change: Change) -> None:
        """Applies it to what reads see."""
        apply(self.live, change)
        self.unsynced.append(change)

    def sync(self) -> None:
        """The unsynced changes are durable now."""
        for change in self.unsynced:
            apply(self.durable, change)
        self.unsynced.clear()

    def fail_sync(self, rng: random.Random) -> None:
        """A sync has failed: some of the changes got through, the others are forgotten by all later syncs."""
        for change in self.unsynced:
            damage(self.durable, change, rng)
        self.unsynced.clear()
        self.lost = True

    def evict(self) -> None:
        """The page cache drops its clean pages: what a failed sync lost is not seen any more."""
        self.live = bytearray(self.durable)
        for change in self.unsynced:
            apply(self.live, change)
        self.lost = False

    def copy(self) -> Content:
        """A second file with the same past."""
        other = Content()
        other.live = bytearray(self.live)
        other.durable = bytearray(self.durable)
        other.unsynced = list(self.unsynced)
        other.lost = self.lost
        return other

    def survive(self, loss: Loss, rng: random.Random) -> Content:
        """What a power loss leaves."""
        data = bytearray(self.durable)
        for change in self.unsynced:
            if loss.keeps(change.time, rng):
                apply(data, change)
            elif loss.damages(change.time, rng):
                damage(data, change, rng)
        return Content(bytes(data))


class Loss:
    """How much of the unsynced a power loss takes, for the whole disk, so that all files lose in the same manner.

    style "none": everything unsynced is gone. "all": nothing is. "prefix": changes before one moment are there, that of
    the moment is damaged. "any": each change by itself.
    """

    STYLES = ("none", "all", "prefix", "any", "any")

    def __init__(self, rng: random.Random, last_time: int, first_time: int = 0) -> None:
        self.style = rng.choice(self.STYLES)
        self.moment = rng.randint(first_time, last_time + 1)
        self.share = rng.choice((0.2, 0.5, 0.9))

    def keeps(self, time: int, rng: random.Random) -> bool:
        """The change is there as a whole."""
        if self.style == "any":
            return rng.random() < self.share
        return self.style == "all" or (self.style == "prefix" and time < self.moment)

    def damages(self, time: int, rng: random.Random) -> bool:
        """A change that is not there as a whole has left traces."""
        return (self.style == "any" and rng.random() < 0.7) or (self.style == "prefix" and time == self.moment)


def apply(data: bytearray, change: Change) -> None:
    """Makes the change to `data`."""
    match change:
        case Write(_, position, written):
            if written and position > len(data):
                data.extend(bytes(position - len(data)))
            data[position : position + len(written)] = written
        case Resize(_, size):
            if size <= len(data):
                del data[size:]
            else:
                data.extend(bytes(size - len(data)))
        case Grow(_, size):
            data.extend(bytes(max(0, size - len(data))))


def damage(data: bytearray, change: Change, rng: random.Random) -> None:
    """Makes part of the change. Bytes that are the same before and after it are safe: sectors are written whole."""
    if not isinstance(change, Write):
        if rng.random() < 0.5:
            apply(data, change)
        return
    time, position, written = change
    how = rng.choice(("gone", "cut", "cut at a sector", "sectors", "zeroed", "garbled"))
    if how == "cut":
        apply(data, Write(time, position, written[: rng.randint(0, len(written))]))
    elif how == "cut at a sector":
        end = (position + rng.randint(0, len(written))) // SECTOR_BYTES * SECTOR_BYTES
        apply(data, Write(time, position, written[: max(0, end - position)]))
    elif how == "sectors":
        for start, piece in _sectors(position, written):
            if rng.random() < 0.5:
                apply(data, Write(time, start, piece))
    elif how in ("zeroed", "garbled"):
        apply(data, Grow(time, position + len(written)))
        for start, piece in _sectors(position, written):
            before = data[start : start + len(piece)]
            noise = bytes(len(piece)) if how == "zeroed" else rng.randbytes(len(piece))
            data[start : start + len(piece)] = bytes(
                old if old == new else bad for old, new, bad in zip(before, piece, noise, strict=True)
            )


def _sectors(position: int, written: bytes) -> list[tuple[int, bytes]]:
    pieces = []
    at = position
    end = position + len(written)
    while at < end:
        stop = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
        pieces.append((at, written[at - position : stop - position]))
        at = stop
    return pieces
