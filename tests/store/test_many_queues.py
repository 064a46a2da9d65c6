"""Ten thousand queues: opened, written, closed and opened again, with few files open at a time."""

from __future__ import annotations

from pathlib import Path

from kitemq_server.store.config import MIB
from kitemq_server.store.disk import RealDisk
from tests.store.helpers import batch, bodies, opened, queue_of, small

TOPICS = 100
QUEUES = 100


async def test_ten_thousand_queues(tmp_path: Path) -> None:
    config = small(segment_bytes=16 * MIB, open_files_max=50)
    async with opened(RealDisk(), config, root=tmp_path) as store:
        for number in range(TOPICS):
            store.append([batch(1, topic=f"t{number}", queue_id=queue_id, body=b"q") for queue_id in range(QUEUES)])
        assert store.queue_count == TOPICS * QUEUES
    assert sum(1 for _ in (tmp_path / "consumequeue").rglob("0" * 20)) == TOPICS * QUEUES
    async with opened(RealDisk(), config, root=tmp_path) as store:
        assert store.recovery.records == 0
        assert store.queue_count == TOPICS * QUEUES
        for number in range(0, TOPICS, 7):
            assert [bodies(store, queue_id, f"t{number}") for queue_id in range(0, QUEUES, 9)] == [[b"q"]] * 12
        assert len(store._state.queues.files._cache) <= 50
        assert queue_of(store, 99, "t99").max_offset == 1
