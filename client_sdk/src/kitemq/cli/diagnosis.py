"""Behind `kitemq doctor`: asks everything that a client would be told, and says in words what is wrong.

What was measured is gathered first (`probe_*`); what to make of it is decided by plain functions (`judge_*`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from kitemq.admin.results import BrokerDescription, BrokerInfo
from kitemq.cli.dialling import Dialled, Protocol, dial, spoken_protocol
from kitemq.cli.output import bytes_text, span_text
from kitemq.errors import BrokerUnavailableError, KiteMQError
from kitemq.proto.v1 import admin_pb2, admin_pb2_grpc, namesrv_pb2, namesrv_pb2_grpc
from kitemq.rpc import Channels, call

ANSWER_S = 3.0
CLOCK_SKEW_MS_MAX = 1000
DISK_FREE_MIN = 0.10
DISK_FREE_BYTES_MIN = 1024**3
WATERMARK_NEAR_PERCENT = 5
HEARTBEAT_AGE_MS_MAX = 75_000  # two heartbeats of 30 s missed


class Level(StrEnum):
    """BROKEN makes doctor exit with 1."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found. advice: how to mend it; empty where nothing is wrong. took_ms: None = not timed."""

    level: Level
    subject: str
    address: str
    text: str
    advice: str = ""
    took_ms: float | None = None


@dataclass(slots=True)
class NamesrvProbe:
    """What one namesrv did. brokers: None when it gave no answer."""

    dialled: Dialled
    error: KiteMQError | None = None
    spoken: Protocol | None = None
    brokers: list[BrokerInfo] | None = None
    took_ms: float = 0.0


@dataclass(slots=True)
class BrokerProbe:
    """What one address of a broker did. listener: under which it is advertised. told: clients like us are told it."""

    broker: BrokerInfo
    listener: str
    told: bool
    dialled: Dialled
    error: KiteMQError | None = None
    spoken: Protocol | None = None
    description: BrokerDescription | None = None
    watermark_percent: int = 0  # disk_watermark_percent; 0 = off, or not known
    took_ms: float = 0.0
    skew_ms: float = 0.0

    @property
    def subject(self) -> str:
        return f"broker {self.broker.broker_name}" + (f" id {self.broker.broker_id}" if self.broker.broker_id else "")


@dataclass(slots=True)
class Diagnosis:
    """Everything that doctor found, in the order in which it should be read."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not any(one.level is Level.BROKEN for one in self.findings)


async def diagnose(addresses: Sequence[str], channels: Channels, *, tls: bool) -> Diagnosis:
    """Ask every namesrv, then every address of every broker that any of them knows."""
    namesrvs = await asyncio.gather(*(probe_namesrv(address, channels) for address in addresses))
    told: dict[tuple[str, int], BrokerInfo] = {}
    for namesrv in namesrvs:
        for broker in namesrv.brokers or ():
            known = told.get((broker.broker_name, broker.broker_id))
            if known is None or known.last_heartbeat_timestamp_ms < broker.last_heartbeat_timestamp_ms:
                told[broker.broker_name, broker.broker_id] = broker
    probes = await asyncio.gather(
        *(
            probe_broker(broker, listener, address, channels)
            for _, broker in sorted(told.items())
            for listener, address in _addresses(broker)
        )
    )
    diagnosis = Diagnosis()
    for namesrv in namesrvs:
        diagnosis.findings += judge_namesrv(namesrv, tls=tls)
    diagnosis.findings += judge_agreement(namesrvs)
    if any(namesrv.brokers is not None for namesrv in namesrvs):
        diagnosis.findings += judge_groups(told.values())
    for probe in probes:
        diagnosis.findings += judge_broker(probe, tls=tls)
    return diagnosis


def _addresses(broker: BrokerInfo) -> list[tuple[str, str]]:
    """What clients like us are told first, then what clients of other listeners are told."""
    others = [(listener, address) for listener, address in broker.addresses.items() if address != broker.address]
    own = [listener for listener, address in broker.addresses.items() if address == broker.address]
    return [(own[0] if own else "", broker.address), *others]


# ---- probing ----


async def probe_namesrv(address: str, channels: Channels) -> NamesrvProbe:
    """Resolve, dial and ask one namesrv."""
    probe = NamesrvProbe(await dial(address))
    if probe.dialled.problem:
        return probe
    stub: namesrv_pb2_grpc.NamesrvAsyncStub = namesrv_pb2_grpc.NamesrvStub(channels.get(address))
    began = time.perf_counter()
    try:
        answer = await call(stub.GetCluster, namesrv_pb2.GetClusterRequest(), timeout_s=ANSWER_S, address=address)
    except KiteMQError as error:
        probe.error = error
        probe.spoken = await spoken_protocol(address)
        return probe
    probe.took_ms = (time.perf_counter() - began) * 1000
    probe.brokers = [BrokerInfo.from_proto(one) for one in answer.brokers]
    return probe


async def probe_broker(broker: BrokerInfo, listener: str, address: str, channels: Channels) -> BrokerProbe:
    """Resolve, dial and ask one address of a broker; ask twice, so that the second answer times the way only."""
    probe = BrokerProbe(broker, listener, address == broker.address, await dial(address))
    if probe.dialled.problem:
        return probe
    stub: admin_pb2_grpc.BrokerAdminAsyncStub = admin_pb2_grpc.BrokerAdminStub(channels.get(address))
    request = admin_pb2.DescribeBrokerRequest()
    try:
        await call(stub.DescribeBroker, request, timeout_s=ANSWER_S, address=address)
        began, began_ms = time.perf_counter(), time.time() * 1000
        answer = await call(stub.DescribeBroker, request, timeout_s=ANSWER_S, address=address)
    except KiteMQError as error:
        probe.error = error
        probe.spoken = await spoken_protocol(address)
        return probe
    probe.took_ms = (time.perf_counter() - began) * 1000
    probe.description = BrokerDescription.from_proto(answer)
    # The broker's clock was read somewhere between asking and answer; the middle is off by half the way at most.
    probe.skew_ms = probe.description.broker_timestamp_ms - (began_ms + probe.took_ms / 2)
    with suppress(KiteMQError):
        config = await call(stub.GetConfig, admin_pb2.GetConfigRequest(), timeout_s=ANSWER_S, address=address)
        values = {item.key: item.value for item in config.items}
        probe.watermark_percent = int(values.get("disk_watermark_percent", "0"))
    return probe


# ---- judging ----


def judge_namesrv(probe: NamesrvProbe, *, tls: bool) -> list[Finding]:
    """What one namesrv's answer means."""
    address = probe.dialled.address
    if probe.brokers is None:
        text, advice = _unreachable(probe.dialled, probe.error, probe.spoken, tls=tls, wanted="namesrv")
        return [Finding(Level.BROKEN, "namesrv", address, text, advice)]
    names = sorted({broker.broker_name for broker in probe.brokers})
    knows = f"knows {', '.join(names)}" if names else "knows no broker"
    took = probe.took_ms
    return [Finding(Level.OK, "namesrv", address, f"{_resolved(probe.dialled)}answers; {knows}", took_ms=took)]


def judge_agreement(probes: Sequence[NamesrvProbe]) -> list[Finding]:
    """Namesrvs never talk to each other: each must hear of every broker itself."""
    answering = [probe for probe in probes if probe.brokers is not None]
    everyone = {_identity(broker) for probe in answering for broker in probe.brokers or ()}
    findings = []
    for probe in answering:
        missing = everyone - {_identity(broker) for broker in probe.brokers or ()}
        if missing:
            names = ", ".join(sorted({f"{name} (id {number}) at {address}" for name, number, address, _ in missing}))
            findings.append(
                Finding(
                    Level.BROKEN,
                    "namesrv",
                    probe.dialled.address,
                    f"disagrees with the other namesrvs: it does not know {names}",
                    f"list {probe.dialled.address} in that broker's 'namesrv' setting; if it is there, see the "
                    "broker's log for why it cannot register",
                )
            )
    return findings


def _identity(broker: BrokerInfo) -> tuple[str, int, str, str]:
    return broker.broker_name, broker.broker_id, broker.address, broker.boot_id


def judge_groups(brokers: Iterable[BrokerInfo]) -> list[Finding]:
    """Is there a broker at all, and a master in every group?"""
    groups: dict[str, list[BrokerInfo]] = {}
    for broker in brokers:
        groups.setdefault(broker.broker_name, []).append(broker)
    if not groups:
        text = "no broker is registered: nothing can be sent or read"
        advice = "start one with this namesrv in its 'namesrv' setting, or see its log for why it cannot register"
        return [Finding(Level.BROKEN, "cluster", "", text, advice)]
    findings = []
    for name, members in sorted(groups.items()):
        if not any(broker.is_master for broker in members):
            text = "has no master: what it holds can be read, nothing can be sent to it"
            findings.append(
                Finding(Level.BROKEN, f"broker {name}", "", text, "start its master (broker_id 0), or see its log")
            )
        elif not all(broker.writable for broker in members if broker.is_master):
            text = "its queues are not handed out for writing: its write permission was taken away"
            advice = f"give it back once that is done: `kitemq broker writes {name} on`"
            findings.append(Finding(Level.WARNING, f"broker {name}", "", text, advice))
    return findings


def judge_broker(probe: BrokerProbe, *, tls: bool) -> list[Finding]:
    """What one address of a broker means for clients."""
    address = probe.dialled.address
    listener = f"listener {probe.listener}: " if probe.listener and not probe.told else ""
    if probe.description is None:
        text, advice = _unreachable(probe.dialled, probe.error, probe.spoken, tls=tls, wanted="broker")
        if not probe.told:
            text = f"{listener}{text}. Only clients that come in by that listener are told this address"
            return [Finding(Level.NOTE, probe.subject, address, text)]
        heard_ms = time.time() * 1000 - probe.broker.last_heartbeat_timestamp_ms
        if heard_ms > HEARTBEAT_AGE_MS_MAX:
            advice = f"it was last heard of {span_text(heard_ms)} ago: is its process running? Else {advice}"
        else:
            advice += f" (The address is the broker's 'advertise' setting for listener {probe.listener or '?'}.)"
        return [Finding(Level.BROKEN, probe.subject, address, text, advice)]
    found = probe.description
    if (found.broker_name, found.broker_id) != (probe.broker.broker_name, probe.broker.broker_id):
        text = f"{listener}another broker answers there: {found.broker_name} (id {found.broker_id})"
        advice = f"correct the 'advertise' setting of {probe.broker.broker_name}"
        return [Finding(Level.BROKEN, probe.subject, address, text, advice)]
    text = f"{listener}{_resolved(probe.dialled)}answers; clock {probe.skew_ms:+.0f} ms, {_disk_text(found)}"
    findings = [Finding(Level.OK, probe.subject, address, text, took_ms=probe.took_ms)]
    if probe.told:
        findings += judge_description(probe, found)
    return findings


def judge_description(probe: BrokerProbe, found: BrokerDescription) -> list[Finding]:
    """What a broker says of itself, and its clock."""

    def finding(level: Level, text: str, advice: str) -> Finding:
        return Finding(level, probe.subject, probe.dialled.address, text, advice)

    findings = []
    if abs(probe.skew_ms) > CLOCK_SKEW_MS_MAX:
        ahead = "ahead of" if probe.skew_ms > 0 else "behind"
        text = f"its clock is {span_text(abs(probe.skew_ms))} {ahead} this machine's"
        advice = "run a time service (chrony, systemd-timesyncd) on both: store times, --since and retention go by it"
        findings.append(finding(Level.WARNING, text, advice))
    if not found.writable and probe.broker.is_master:
        reason = found.not_writable_reason or "it does not say why"
        findings.append(finding(Level.BROKEN, f"takes no messages: {reason}", "mend that; sends go on by themselves"))
    free = found.disk_free_bytes / found.disk_total_bytes if found.disk_total_bytes else 1.0
    if watermark := _watermark_text(probe, 100 * (1 - free)):
        advice = (
            "delete what else is on that disk, give the store a disk of its own, or keep less by choice "
            "(retention_hours, retention_bytes); to raise the mark: "
            f"`kitemq broker config {found.broker_name} --set disk_watermark_percent=N`"
        )
        findings.append(finding(Level.WARNING, watermark, advice))
    if free < DISK_FREE_MIN or found.disk_free_bytes < DISK_FREE_BYTES_MIN < found.disk_total_bytes:
        text = (
            f"its disk is nearly full: {bytes_text(found.disk_free_bytes)} of {bytes_text(found.disk_total_bytes)} free"
        )
        advice = "free some space, or lower retention_hours, retention_bytes or disk_watermark_percent"
        findings.append(finding(Level.WARNING, text, advice))
    if found.damaged_record_count:
        text = f"{found.damaged_record_count} stored records are damaged; what could be read was kept"
        findings.append(finding(Level.WARNING, text, "see its log for where, and check the disk"))
    if found.deleted_unconsumed_count:
        text = f"{found.deleted_unconsumed_count} messages were deleted, for age or space, before a group read them"
        findings.append(finding(Level.WARNING, text, "see `kitemq group list` for lag, or keep messages longer"))
    if _is_loopback(probe.dialled):
        text = "clients are told a loopback address: only those on the broker's own machine can reach it"
        findings.append(finding(Level.NOTE, text, "for others set 'advertise' to a name or address that they can dial"))
    return findings


def _watermark_text(probe: BrokerProbe, used_percent: float) -> str:
    """What the disk's watermark does, or soon will; empty when that is far away."""
    watermark = probe.watermark_percent
    if not watermark or used_percent < watermark - WATERMARK_NEAR_PERCENT:
        return ""
    used = f"its disk is {used_percent:.1f}% used"
    if used_percent > watermark:
        return f"{used}, above its disk_watermark_percent of {watermark}: it deletes the oldest messages, read or not"
    return (
        f"{used}, near its disk_watermark_percent of {watermark}: "
        "above that it deletes the oldest messages, read or not, whatever filled the disk"
    )


def _unreachable(
    dialled: Dialled, error: KiteMQError | None, spoken: Protocol | None, *, tls: bool, wanted: str
) -> tuple[str, str]:
    """What is wrong with an address, and how to mend it."""
    if dialled.problem:
        return dialled.problem, dialled.advice
    if spoken is Protocol.TLS and not tls:
        return "speaks TLS, and this command speaks plaintext", "add --tls, or --tls-ca FILE for a CA of your own"
    if spoken is Protocol.PLAINTEXT_HTTP2 and tls:
        return "speaks plaintext, and this command speaks TLS", "leave out the --tls options, or give it a certificate"
    reason = error.message if error is not None else "no answer"
    if spoken is Protocol.TLS and isinstance(error, BrokerUnavailableError):
        advice = "give the CA that signed its certificate (--tls-ca), the name in it (--tls-server-name), or, where it "
        return f"speaks TLS, but the connection fails: {reason}", advice + "asks for one, a client certificate"
    if spoken in (Protocol.PLAINTEXT_HTTP2, Protocol.TLS):
        ports = "namesrvs listen on 9876 by default, brokers on 10911"
        return f"takes connections, but is no {wanted} that answers: {reason}", f"is this the right port? {ports}"
    return (
        f"takes connections, but does not speak gRPC: {reason}",
        "is something else listening there, or a proxy between?",
    )


def _resolved(dialled: Dialled) -> str:
    shown = ", ".join(dialled.resolved)
    return f"resolves to {shown}, " if shown and shown != dialled.host else ""


def _disk_text(found: BrokerDescription) -> str:
    return (
        f"disk {found.disk_free_bytes / found.disk_total_bytes:.0%} free" if found.disk_total_bytes else "disk unknown"
    )


def _is_loopback(dialled: Dialled) -> bool:
    return bool(dialled.resolved) and all(ipaddress.ip_address(one).is_loopback for one in dialled.resolved)
