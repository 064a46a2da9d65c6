"""The command while parts of the cluster are away, and what `kitemq doctor` says of it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from kitemq.cli.session import ExitCode
from tests.certificates import make_certificates
from tests.cli.conftest import Run, Start
from tests.cluster import Broker, Cluster, Namesrv
from tests.flaky_proxy import FlakyProxy, flaky_proxy


@pytest_asyncio.fixture
async def proxy(cluster: Cluster) -> AsyncIterator[FlakyProxy]:
    """The way to broker-b: stop it, and the broker is gone without a goodbye."""
    proxy = FlakyProxy()
    await proxy.start()
    broker = await cluster.add_broker("broker-b", advertise={"internal": proxy.address})
    proxy.target = broker.address
    yield proxy
    await proxy.stop()


async def test_one_broker_of_two_is_lost(cluster: Cluster, proxy: FlakyProxy, run: Run) -> None:
    assert (await run("topic", "create", "orders", "--queues", "1")).code == ExitCode.OK
    assert (await run("produce", "orders", stdin="a\nb\nc\nd\n")).code == ExitCode.OK
    await proxy.stop()

    listed = await run("topic", "list", "-o", "json")
    assert listed.code == ExitCode.OK
    assert [one["broker_name"] for one in listed.json[0]["brokers"]] == ["broker-a"]
    assert f"Warning: broker broker-b ({proxy.address}) does not answer" in listed.err
    created = await run("topic", "create", "more")
    assert created.code == ExitCode.UNREACHABLE
    assert "broker-b" in created.err and "done on broker-a" in created.err
    assert (await run("topic", "create", "more", "--broker", "broker-a")).code == ExitCode.OK
    assert (await run("broker", "describe", "broker-b")).code == ExitCode.UNREACHABLE
    brokers = (await run("cluster", "list", "-o", "json")).json
    assert [(one["broker_name"], one["writable"]) for one in brokers] == [("broker-a", True), ("broker-b", False)]
    assert "cannot reach it" in brokers[1]["not_writable_reason"]

    sent = await run("produce", "orders", stdin="1\n2\n3\n")
    assert sent.code == ExitCode.OK, sent.err
    tailed = await run("tail", "orders", "--last", "3")
    assert (tailed.code, sorted(tailed.out.split())) == (ExitCode.OK, ["1", "2", "3"])
    consumed = await run("consume", "orders", "--group", "g", "--from", "first", "--count", "3")
    assert consumed.code == ExitCode.OK
    assert len(consumed.out.split()) == 3


async def test_tail_goes_on_when_the_broker_is_back(
    cluster: Cluster, proxy: FlakyProxy, start: Start, run: Run
) -> None:
    await run("topic", "create", "orders", "--queues", "1", "--broker", "broker-b")
    tailing = await start("tail", "orders", "-f")
    await run("produce", "orders", stdin="before\n")
    await tailing.until(lambda: tailing.out == b"before\n")
    await proxy.stop()
    await tailing.until(lambda: b"Warning: broker broker-b cannot be read, trying again" in tailing.err)
    await proxy.start()
    await run("produce", "orders", stdin="after\n")
    await tailing.until(lambda: tailing.out == b"before\nafter\n")
    await tailing.until(lambda: b"Broker broker-b can be read again." in tailing.err)


async def test_one_namesrv_of_two_is_lost(cluster: Cluster, run: Run) -> None:
    where = {"KITEMQ_NAMESRV": f"127.0.0.1:1;{cluster.namesrv_address}"}
    assert (await run("topic", "create", "orders", **where)).code == ExitCode.OK
    assert (await run("produce", "orders", stdin="a\n", **where)).code == ExitCode.OK
    consumed = await run("consume", "orders", "--group", "g", "--from", "first", "--count", "1", **where)
    assert (consumed.code, consumed.out) == (ExitCode.OK, "a\n")
    doctor = await run("doctor", **where)
    assert doctor.code == ExitCode.FAILED
    assert "broken  namesrv 127.0.0.1:1: cannot be reached from here (connection refused)" in doctor.out


async def test_produce_says_at_once_that_there_is_no_cluster(cluster: Cluster, start: Start) -> None:
    # Nothing is ever typed.
    nobody = await (await start("produce", "orders", KITEMQ_NAMESRV="127.0.0.1:1")).end()
    assert nobody.code == ExitCode.UNREACHABLE
    assert nobody.err.startswith("Error: no namesrv answers (127.0.0.1:1: cannot reach it: connection refused)")
    await cluster.broker.stop()
    namesrv_only = await (await start("produce", "orders")).end()
    assert namesrv_only.code == ExitCode.UNREACHABLE
    assert namesrv_only.err.startswith("Error: no broker is registered with the namesrv")
    assert len(nobody.err.splitlines()) == len(namesrv_only.err.splitlines()) == 1


async def test_a_namesrv_far_away(cluster: Cluster, run: Run) -> None:
    async with flaky_proxy(cluster.namesrv_address) as far:
        far.delay_s = 0.15  # and so 0.3 s until the connection is set up
        assert (await run("cluster", "list", KITEMQ_NAMESRV=far.address)).code == ExitCode.OK


async def test_a_port_of_another_service(cluster: Cluster, run: Run) -> None:
    result = await run("topic", "list", KITEMQ_NAMESRV=cluster.broker.address)
    assert result.code == ExitCode.FAILED
    assert result.err.startswith("Error: it does not know this request: is this the port of another service")


async def test_tls_to_a_port_without_it(cluster: Cluster, run: Run) -> None:
    result = await run("--tls", "topic", "list")
    assert result.code == ExitCode.UNREACHABLE
    assert "cannot reach it: TLS handshake failed (wrong version number)" in result.err
    assert len(result.err.splitlines()) == 1


async def findings(run: Run, *words: str, **environment: str) -> tuple[ExitCode, list[dict[str, Any]]]:
    # gRPC itself says on stderr that a TLS handshake failed, unless it is told not to.
    result = await run(*words, "doctor", "-o", "json", **environment, GRPC_VERBOSITY="NONE")
    assert result.err == ""
    code = ExitCode(result.code)
    assert result.json["healthy"] == (code is ExitCode.OK)
    return code, result.json["findings"]


async def test_doctor_on_a_healthy_cluster(cluster: Cluster, run: Run) -> None:
    await cluster.add_broker("broker-b")
    code, found = await findings(run)
    assert code is ExitCode.OK
    assert {finding["level"] for finding in found} <= {"ok", "note", "warning"}  # the disk may be nearly full
    assert set(found[0]) == {"level", "subject", "address", "text", "advice", "took_ms"}
    assert (found[0]["subject"], found[0]["address"]) == ("namesrv", cluster.namesrv_address)
    assert found[0]["text"] == "answers; knows broker-a, broker-b"
    timed = [finding for finding in found if finding["took_ms"] is not None]
    assert [finding["subject"] for finding in timed] == ["namesrv", "broker broker-a", "broker broker-b"]
    table = await run("doctor")
    assert table.code == ExitCode.OK
    assert table.out.startswith(f"ok    namesrv {cluster.namesrv_address}: answers; knows broker-a, broker-b (")


async def test_doctor_on_a_disk_near_its_watermark(cluster: Cluster, run: Run, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    watermark = max(10, 100 * (usage.total - usage.free) // usage.total)
    changed = await run("broker", "config", "broker-a", "--set", f"disk_watermark_percent={watermark}")
    assert changed.code == ExitCode.OK
    code, found = await findings(run)
    assert code is ExitCode.OK
    (warning,) = (one for one in found if f"disk_watermark_percent of {watermark}:" in one["text"])
    assert (warning["level"], warning["subject"]) == ("warning", "broker broker-a")
    assert "--set disk_watermark_percent=N" in warning["advice"]


async def test_doctor_on_a_broker_that_cannot_be_reached(cluster: Cluster, proxy: FlakyProxy, run: Run) -> None:
    await proxy.stop()
    code, found = await findings(run)
    assert code is ExitCode.FAILED
    (broken,) = [finding for finding in found if finding["level"] == "broken"]
    assert (broken["subject"], broken["address"]) == ("broker broker-b", proxy.address)
    assert broken["text"] == "cannot be reached from here (connection refused)"
    assert "'advertise' setting for listener internal" in broken["advice"]


async def test_doctor_on_addresses_that_clients_cannot_use(cluster: Cluster, run: Run) -> None:
    await cluster.add_broker("broker-b", advertise={"internal": "no-such-name.invalid:10911"})
    await cluster.add_broker("broker-c", advertise={"internal": cluster.broker.address})
    code, found = await findings(run)
    assert code is ExitCode.FAILED
    broken = {finding["subject"]: finding["text"] for finding in found if finding["level"] == "broken"}
    assert broken["broker broker-b"].startswith("the name no-such-name.invalid does not resolve from here")
    assert broken["broker broker-c"] == "another broker answers there: broker-a (id 0)"


async def test_doctor_on_an_address_of_another_listener(cluster: Cluster, tmp_path: Path, run: Run) -> None:
    broker = Broker(
        "broker-b",
        tmp_path / "b",
        [cluster.namesrv_address],
        advertise={"external": "no-such-name.invalid:443"},
    )
    broker.address = "internal=127.0.0.1:0,external=127.0.0.1:0"
    await broker.start()
    try:
        code, found = await findings(run)
    finally:
        await broker.stop()
    assert code is ExitCode.OK
    (note,) = [finding for finding in found if "no-such-name" in finding["address"]]
    assert note["level"] == "note"
    assert "Only clients that come in by that listener are told this address" in note["text"]


async def test_doctor_on_namesrvs_that_disagree(cluster: Cluster, tmp_path: Path, run: Run) -> None:
    other = Namesrv(tmp_path / "other")
    await other.start()
    try:
        code, found = await findings(run, KITEMQ_NAMESRV=f"{cluster.namesrv_address};{other.address}")
        alone, nothing = await findings(run, "--namesrv", other.address)
    finally:
        await other.stop()
    assert code is ExitCode.FAILED
    (broken,) = [finding for finding in found if finding["level"] == "broken"]
    assert broken["address"] == other.address
    assert "does not know broker-a" in broken["text"]
    assert alone is ExitCode.FAILED
    assert [finding["text"] for finding in nothing if finding["level"] == "broken"] == [
        "no broker is registered: nothing can be sent or read"
    ]


async def test_doctor_on_a_port_of_something_else(cluster: Cluster, run: Run) -> None:
    code, found = await findings(run, "--namesrv", cluster.broker.address)
    assert code is ExitCode.FAILED
    assert found[0]["text"].startswith("takes connections, but is no namesrv that answers")
    assert "namesrvs listen on 9876" in found[0]["advice"]

    async def shout(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(shout, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        _, found = await findings(run, "--namesrv", f"127.0.0.1:{port}")
    assert found[0]["text"].startswith("takes connections, but does not speak gRPC")


async def test_doctor_and_tls(cluster: Cluster, tmp_path: Path, run: Run) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    namesrv = Namesrv(tmp_path / "tls", tls_cert_file=certificates.server_cert, tls_key_file=certificates.server_key)
    await namesrv.start()
    try:
        _, plain = await findings(run, "--namesrv", namesrv.address)
        _, stranger = await findings(run, "--namesrv", namesrv.address, "--tls")
        _, trusted = await findings(run, "--namesrv", namesrv.address, "--tls-ca", str(certificates.ca))
        listed = await run(
            "--namesrv", namesrv.address, "--tls-ca", str(certificates.ca), "cluster", "list", "-o", "json"
        )
    finally:
        await namesrv.stop()
    assert plain[0]["text"] == "speaks TLS, and this command speaks plaintext"
    assert "--tls" in plain[0]["advice"]
    assert stranger[0]["text"].startswith("speaks TLS, but the connection fails")
    assert trusted[0]["level"] == "ok"
    assert (listed.code, listed.json) == (ExitCode.OK, [])
    _, mixed = await findings(run, "--tls-ca", str(certificates.ca))
    assert mixed[0]["text"] == "speaks plaintext, and this command speaks TLS"
    missing = await run("--tls-ca", "/nonexistent/ca.pem", "cluster", "list")
    assert missing.code == ExitCode.USAGE
    assert "TLS file '/nonexistent/ca.pem'" in missing.err


async def test_ctrl_c_does_not_wait_for_a_broker_that_is_stuck(
    cluster: Cluster, proxy: FlakyProxy, start: Start, run: Run
) -> None:
    await run("topic", "create", "orders", "--queues", "1", "--broker", "broker-b")
    await run("produce", "orders", stdin="a\n")
    consuming = await start("consume", "orders", "--group", "g", "--from", "first")
    await consuming.until(lambda: consuming.out == b"a\n")
    proxy.drop_replies = True
    result = await consuming.interrupt()
    assert (result.code, result.err) == (ExitCode.INTERRUPTED, "Stopped without an answer from the cluster.\n")
    proxy.drop_replies = False
    proxy.cut()
    again = await run("consume", "orders", "--group", "g", "--from", "first", "--idle", "2s")
    assert again.out in ("", "a\n")  # the commit may have arrived
