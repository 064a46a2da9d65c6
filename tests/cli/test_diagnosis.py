"""What doctor makes of what it measured: the judgement alone, without a network."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from kitemq.admin.results import BrokerDescription, BrokerInfo
from kitemq.cli.diagnosis import (
    BrokerProbe,
    Diagnosis,
    Finding,
    Level,
    NamesrvProbe,
    judge_agreement,
    judge_broker,
    judge_groups,
    judge_namesrv,
)
from kitemq.cli.dialling import Dialled, Protocol
from kitemq.errors import BrokerUnavailableError, InternalBrokerError
from kitemq.proto.v1 import admin_pb2, namesrv_pb2

GIB = 1024**3


def broker(**changes: Any) -> BrokerInfo:
    message = namesrv_pb2.ClusterBroker(
        broker=namesrv_pb2.BrokerIdentity(
            cluster_name="c", broker_name="a", boot_id="x", addresses={"internal": "10.0.0.1:10911"}
        ),
        address="10.0.0.1:10911",
        last_heartbeat_timestamp_ms=int(time.time() * 1000),
        writable=True,
    )
    return dataclasses.replace(BrokerInfo.from_proto(message), **changes)


def description(**changes: Any) -> BrokerDescription:
    message = admin_pb2.DescribeBrokerResponse(
        broker=namesrv_pb2.BrokerIdentity(cluster_name="c", broker_name="a"),
        disk_free_bytes=60 * GIB,
        disk_total_bytes=100 * GIB,
        writable=True,
    )
    return dataclasses.replace(BrokerDescription.from_proto(message), **changes)


def dialled(**changes: Any) -> Dialled:
    values = {"address": "10.0.0.1:10911", "host": "10.0.0.1", "port": 10911, "resolved": ["10.0.0.1"]}
    return Dialled(**{**values, **changes})


def probe(**changes: Any) -> BrokerProbe:
    values: dict[str, Any] = {
        "broker": broker(),
        "listener": "internal",
        "told": True,
        "dialled": dialled(connect_ms=0.5),
        "description": description(),
        "took_ms": 1.0,
    }
    return BrokerProbe(**{**values, **changes})


def levels(findings: list[Finding]) -> list[Level]:
    return [finding.level for finding in findings]


def test_a_healthy_broker() -> None:
    findings = judge_broker(probe(skew_ms=-3), tls=False)
    assert levels(findings) == [Level.OK]
    assert findings[0].text == "answers; clock -3 ms, disk 60% free"


@pytest.mark.parametrize(
    ("changes", "level", "text", "advice"),
    [
        ({"skew_ms": 5000.0}, Level.WARNING, "its clock is 5 s ahead of this machine's", "chrony"),
        ({"skew_ms": -90_000.0}, Level.WARNING, "its clock is 90 s behind this machine's", "chrony"),
        (
            {"description": description(disk_free_bytes=5 * GIB)},
            Level.WARNING,
            "its disk is nearly full: 5 GiB of 100 GiB free",
            "retention_hours",
        ),
        (
            {"description": description(disk_free_bytes=14 * GIB), "watermark_percent": 85},
            Level.WARNING,
            "its disk is 86.0% used, above its disk_watermark_percent of 85: it deletes the oldest messages",
            "kitemq broker config a --set disk_watermark_percent=N",
        ),
        (
            {"description": description(disk_free_bytes=20 * GIB), "watermark_percent": 85},
            Level.WARNING,
            "its disk is 80.0% used, near its disk_watermark_percent of 85: above that it deletes the oldest",
            "a disk of its own",
        ),
        (
            {"description": description(writable=False, not_writable_reason="the disk is full")},
            Level.BROKEN,
            "takes no messages: the disk is full",
            "mend that",
        ),
        ({"description": description(damaged_record_count=3)}, Level.WARNING, "3 stored records are damaged", "disk"),
        ({"description": description(deleted_unconsumed_count=9)}, Level.WARNING, "9 messages were deleted", "lag"),
        (
            {"dialled": dialled(resolved=["127.0.0.1"])},
            Level.NOTE,
            "clients are told a loopback address",
            "'advertise'",
        ),
    ],
)
def test_what_is_wrong_with_a_broker_that_answers(
    changes: dict[str, Any], level: Level, text: str, advice: str
) -> None:
    findings = judge_broker(probe(**changes), tls=False)
    assert levels(findings) == [Level.OK, level]
    assert findings[1].text.startswith(text)
    assert advice in findings[1].advice


@pytest.mark.parametrize("free_and_watermark", [(21, 85), (14, 0), (40, 85)])
def test_a_disk_far_below_its_watermark_or_without_one_is_fine(free_and_watermark: tuple[int, int]) -> None:
    free, watermark = free_and_watermark
    well = probe(description=description(disk_free_bytes=free * GIB), watermark_percent=watermark)
    assert levels(judge_broker(well, tls=False)) == [Level.OK]


def test_another_broker_at_the_address() -> None:
    findings = judge_broker(probe(description=description(broker_name="b")), tls=False)
    assert levels(findings) == [Level.BROKEN]
    assert findings[0].text == "another broker answers there: b (id 0)"


UNAVAILABLE = BrokerUnavailableError("failed to connect")


@pytest.mark.parametrize(
    ("spoken", "tls", "error", "text", "advice"),
    [
        (Protocol.TLS, False, UNAVAILABLE, "speaks TLS, and this command speaks plaintext", "--tls"),
        (Protocol.PLAINTEXT_HTTP2, True, UNAVAILABLE, "speaks plaintext, and this command speaks TLS", "leave out"),
        (Protocol.TLS, True, UNAVAILABLE, "speaks TLS, but the connection fails", "--tls-ca"),
        (Protocol.PLAINTEXT_HTTP2, False, InternalBrokerError("Method not found!"), "is no broker", "right port"),
        (Protocol.OTHER, False, UNAVAILABLE, "does not speak gRPC", "something else"),
    ],
)
def test_what_is_wrong_with_an_address_that_takes_connections(
    spoken: Protocol, tls: bool, error: Any, text: str, advice: str
) -> None:
    findings = judge_broker(probe(description=None, spoken=spoken, error=error), tls=tls)
    assert levels(findings) == [Level.BROKEN]
    assert text in findings[0].text
    assert advice in findings[0].advice


def test_an_address_that_cannot_be_reached() -> None:
    lost = dialled(problem="the name web does not resolve from here", advice="add it to DNS")
    (told,) = judge_broker(probe(description=None, dialled=lost), tls=False)
    assert told.level is Level.BROKEN
    assert "'advertise' setting for listener internal" in told.advice
    (other,) = judge_broker(probe(description=None, dialled=lost, told=False, listener="external"), tls=False)
    assert other.level is Level.NOTE
    assert other.text.startswith("listener external: the name web does not resolve")
    silent = broker(last_heartbeat_timestamp_ms=int(time.time() * 1000) - 100_000)
    (old,) = judge_broker(probe(description=None, dialled=lost, broker=silent), tls=False)
    assert "last heard of 100 s ago" in old.advice


def test_groups() -> None:
    assert judge_groups([broker()]) == []
    (none,) = judge_groups([])
    assert (none.level, none.text) == (Level.BROKEN, "no broker is registered: nothing can be sent or read")
    (headless,) = judge_groups([broker(broker_id=1), broker(broker_id=2)])
    assert headless.level is Level.BROKEN and "has no master" in headless.text
    (drained,) = judge_groups([broker(writable=False), broker(broker_id=1)])
    assert drained.level is Level.WARNING and "write permission" in drained.text


def test_namesrvs_that_disagree() -> None:
    both = NamesrvProbe(dialled(address="ns1:9876"), brokers=[broker(), broker(broker_name="b")])
    one = NamesrvProbe(dialled(address="ns2:9876"), brokers=[broker()])
    down = NamesrvProbe(dialled(address="ns3:9876", problem="cannot be reached"))
    assert judge_agreement([both, both, down]) == []
    (finding,) = judge_agreement([both, one, down])
    assert finding.level is Level.BROKEN and finding.address == "ns2:9876"
    assert "does not know b (id 0)" in finding.text
    assert levels(judge_namesrv(one, tls=False)) == [Level.OK]
    assert levels(judge_namesrv(down, tls=False)) == [Level.BROKEN]


def test_a_diagnosis_is_healthy_without_broken_findings() -> None:
    assert Diagnosis([Finding(Level.WARNING, "", "", "")]).healthy
    assert not Diagnosis([Finding(Level.OK, "", "", ""), Finding(Level.BROKEN, "", "", "")]).healthy
