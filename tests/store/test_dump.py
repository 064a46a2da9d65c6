"""What `kitemq-server store dump` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from kitemq_server.store.dump import dump_segment
from tests.store.log_files import LogFiles


def written(files: LogFiles, base: int, directory: Path, *, zeros: int = 0) -> Path:
    path = directory / "commitlog" / f"{base:020d}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(files.segments[base]) + bytes(zeros))
    return path


def test_records_are_described(tmp_path: Path) -> None:
    files = LogFiles().begin_epoch().message("hello").key_value("k", continues=True).key_value("l").roll().message("x")
    lines = list(dump_segment(written(files, 0, tmp_path)))
    assert [line["kind"] for line in lines] == ["EPOCH", "MESSAGE", "METADATA", "METADATA", "ROLL"]
    assert lines[0]["system"]["epoch_started"]["epoch"] == 1
    assert (lines[1]["topic"], lines[1]["queue_id"], lines[1]["queue_offset"]) == ("orders", 0, 0)
    assert (lines[1]["body_bytes"], lines[1]["stored"]) == (5, "2023-11-14T22:13:20.000+00:00")
    assert lines[2]["group_continues"]
    second = list(dump_segment(written(files, max(files.segments), tmp_path, zeros=1000)))
    assert [line["physical_offset"] for line in second] == [files.bounds["x"][0]]


def test_damage_is_shown_and_passed_over(tmp_path: Path) -> None:
    files = LogFiles().begin_epoch().message("a").message("b").message("c")
    start, end = files.bounds["b"]
    files.segments[0][start + 20] ^= 1
    files.segments[0] += b"rest"
    lines = list(dump_segment(written(files, 0, tmp_path)))
    assert lines[2] == {"physical_offset": start, "damaged": True, "size": end - start}
    assert lines[3]["kind"] == "MESSAGE"
    assert lines[4] == {"physical_offset": files.bounds["c"][1], "damaged": True, "size": 4}


def test_a_file_must_be_named_by_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="20 digits"):
        list(dump_segment(path))
