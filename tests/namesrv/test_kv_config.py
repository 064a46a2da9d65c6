"""Key values: on disk before they are answered, whole after a crash, bounded."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest

from kitemq.errors import BrokerBusyError, InternalBrokerError, InvalidRequestError, NotFoundError
from kitemq_server.common.config import ConfigError
from kitemq_server.common.tasks import running
from kitemq_server.namesrv import kv_config
from kitemq_server.namesrv.files import replace_file
from kitemq_server.namesrv.kv_config import KeyValues, open_key_values


async def test_values_survive_a_restart(tmp_path: Path) -> None:
    async with open_key_values(tmp_path) as values, running(values.write_forever()):
        await values.put("n", "k", "één")
        await values.put("n", "gone", "v")
        await values.delete("n", "gone")
        await values.delete("n", "never there")
        assert json.loads((tmp_path / "kv.json").read_text()) == {"n": {"k": "één"}}
    async with open_key_values(tmp_path) as values:
        assert values.get("n", "k") == "één"
        assert values.namespace("other") == {}
        with pytest.raises(NotFoundError, match="no value of key 'gone'"):
            values.get("n", "gone")


async def test_changes_that_wait_go_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(kv_config, "replace_file", lambda path, data: written.append(data))
    async with open_key_values(tmp_path) as values, running(values.write_forever()):
        await asyncio.gather(*(values.put("n", f"k{i}", "v") for i in range(100)))
        assert len(values.namespace("n")) == 100
    assert len(written) < 10


async def test_too_many_waiting_changes_are_refused(tmp_path: Path) -> None:
    async with open_key_values(tmp_path) as values:  # nobody writes
        waiting = [asyncio.ensure_future(values.put("n", f"k{i}", "v")) for i in range(kv_config.WAITING_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(BrokerBusyError) as refusal:
            await values.put("n", "one more", "v")
        assert refusal.value.retry_after_ms > 0
        for put in waiting:
            put.cancel()


async def test_a_full_disk_changes_nothing_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_key_values(tmp_path) as values, running(values.write_forever()):
        await values.put("n", "k", "old")
        with monkeypatch.context() as patch:

            def no_space(fd: int) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "fsync", no_space)
            with pytest.raises(InternalBrokerError) as refusal:
                await values.put("n", "k", "new")
            assert str(tmp_path) not in str(refusal.value)
        assert values.get("n", "k") == "old"
        assert json.loads((tmp_path / "kv.json").read_text()) == {"n": {"k": "old"}}
        await values.put("n", "k", "new")
        assert values.get("n", "k") == "new"


async def test_a_crash_between_write_and_rename_keeps_the_old_file(tmp_path: Path) -> None:
    async with open_key_values(tmp_path) as values, running(values.write_forever()):
        await values.put("n", "k", "old")
    (tmp_path / "kv.tmp").write_bytes(b'{"n": {"k": "ha')
    async with open_key_values(tmp_path) as values:
        assert values.get("n", "k") == "old"


async def test_both_file_and_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").resolve().name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    replace_file(tmp_path / "kv.json", b"{}")
    assert synced == ["kv.tmp", tmp_path.name]


@pytest.mark.parametrize("content", ["{", "[]", '{"n": 1}', '{"n": {"k": 1}}', "\xff"])
async def test_a_damaged_file_stops_the_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "kv.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="move it away to start without"):
        async with open_key_values(tmp_path):
            pass


async def test_one_namesrv_per_folder(tmp_path: Path) -> None:
    async with open_key_values(tmp_path):
        with pytest.raises(ConfigError, match="in use by another namesrv"):
            async with open_key_values(tmp_path):
                pass
    async with open_key_values(tmp_path):
        pass


async def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_config, "ENTRIES_MAX", 2)
    async with open_key_values(tmp_path) as values, running(values.write_forever()):
        for bad in (
            ("", "k", "v"),
            ("n", "", "v"),
            ("n" * 256, "k", "v"),
            ("n", "k" * 256, "v"),
            ("n", "k", "v" * 65537),
        ):
            with pytest.raises(InvalidRequestError, match="characters"):
                await values.put(*bad)
        await values.put("n", "1", "v")
        await values.put("m", "2", "v")
        with pytest.raises(InvalidRequestError, match="delete some"):
            await values.put("n", "3", "v")
        await values.put("m", "2", "changed")


async def test_a_caller_that_leaves_does_not_stop_the_writer(tmp_path: Path) -> None:
    async with open_key_values(tmp_path) as values, running(values.write_forever()):
        leaving = asyncio.ensure_future(values.put("n", "k", "v"))
        await asyncio.sleep(0)
        leaving.cancel()
        await values.put("n", "l", "w")
        assert isinstance(values, KeyValues)
        assert values.get("n", "l") == "w"
