"""Queues as people write them: TOPIC@BROKER:ID."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from kitemq.message import MessageQueue


def parse_queue(text: str) -> MessageQueue:
    """The queue that "orders@broker-a:3" names. A usage error for anything else."""
    from kitemq.message import MessageQueue

    topic, at, rest = text.partition("@")
    broker_name, colon, queue_id = rest.rpartition(":")
    if not (topic and at and broker_name and colon and queue_id.isascii() and queue_id.isdigit()):
        raise typer.BadParameter(f"{text!r} names no queue: write TOPIC@BROKER:ID, as in orders@broker-a:3")
    return MessageQueue(topic, broker_name, int(queue_id))


def parse_position(text: str) -> tuple[MessageQueue, int]:
    """Queue and offset of "orders@broker-a:3:1042". A usage error for anything else."""
    queue, colon, offset = text.rpartition(":")
    if not (colon and offset.isascii() and offset.isdigit()):
        raise typer.BadParameter(f"{text!r} is no position: write TOPIC@BROKER:ID:OFFSET, as in orders@broker-a:3:1042")
    return parse_queue(queue), int(offset)
