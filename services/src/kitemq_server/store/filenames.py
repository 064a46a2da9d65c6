"""Names of all files of a store, built and parsed in one place. Drawn in docs/format.md."""

from __future__ import annotations

from pathlib import Path

OFFSET_DIGITS = 20
SNAPSHOT_SUFFIX = ".json"


def offset_name(offset: int) -> str:
    """The name of a segment or consume queue file that begins at `offset`."""
    return f"{offset:0{OFFSET_DIGITS}d}"


def parse_offset_name(name: str) -> int | None:
    """The offset in a segment's or consume queue file's name; None for any other name."""
    return int(name) if len(name) == OFFSET_DIGITS and name.isascii() and name.isdigit() else None


def snapshot_name(physical_offset: int) -> str:
    """The name of the snapshot that is true up to `physical_offset`."""
    return offset_name(physical_offset) + SNAPSHOT_SUFFIX


def parse_snapshot_name(name: str) -> int | None:
    """The physical offset in a snapshot's name; None for any other name."""
    return parse_offset_name(name.removesuffix(SNAPSHOT_SUFFIX)) if name.endswith(SNAPSHOT_SUFFIX) else None


def topic_directory(topic: str) -> str:
    """A topic's name as one directory name. No topic is named "." or "..", nor has a slash."""
    return topic.replace("%", "%25").replace("|", "%7C")


def parse_topic_directory(name: str) -> str:
    """The topic whose directory has this name."""
    return name.replace("%7C", "|").replace("%25", "%")


class Layout:
    """Where the parts of a store lie below its root."""

    __slots__ = (
        "commit_log",
        "consume_queue",
        "damaged",
        "index",
        "lock",
        "promised_epoch",
        "reserve",
        "root",
        "snapshot",
        "store_json",
    )

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store_json = root / "store.json"
        self.lock = root / "lock"
        self.promised_epoch = root / "promised_epoch"
        self.reserve = root / "reserve"
        self.commit_log = root / "commitlog"
        self.consume_queue = root / "consumequeue"
        self.snapshot = root / "snapshot"
        self.index = root / "index"
        self.damaged = root / "damaged"

    def directories(self) -> tuple[Path, ...]:
        """All directories that a store has from its start."""
        return (self.root, self.commit_log, self.consume_queue, self.snapshot, self.index, self.damaged)

    def segment(self, base: int) -> Path:
        """The segment whose first byte has the physical offset `base`."""
        return self.commit_log / offset_name(base)

    def topic(self, topic: str) -> Path:
        """Where the consume queues of a topic lie."""
        return self.consume_queue / topic_directory(topic)

    def queue(self, topic: str, queue_id: int) -> Path:
        """Where the files of one consume queue lie."""
        return self.topic(topic) / str(queue_id)

    def snapshot_file(self, physical_offset: int) -> Path:
        """The snapshot that is true up to `physical_offset`."""
        return self.snapshot / snapshot_name(physical_offset)

    def damaged_file(self, physical_offset: int, length: int) -> Path:
        """Where bytes are set aside that should have been records."""
        return self.damaged / f"{offset_name(physical_offset)}-{length}"
