"""Queues as people write them: TOPIC@BROKER:ID."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from kitemq.message import MessageQueue


_QUEUE = r"(?P<topic>[^@]+)@(?P<broker>.+):(?P<id>[0-9]{1,9})"
_POSITION = _QUEUE + r":(?P<offset>[0-9]{1,18})"


def parse_queue(text: str) -> MessageQueue:
    """The queue that "orders@broker-a:3" names. A usage error for anything else."""
    from kitemq.message import MessageQueue

    match = re.fullmatch(_QUEUE, text)
    if match is None:
        raise typer.BadParameter(f"{text!r} names no queue: write TOPIC@BROKER:ID, as in orders@broker-a:3")
    return MessageQueue(match["topic"], match["broker"], int(match["id"]))


def parse_position(text: str) -> tuple[MessageQueue, int]:
    """Queue and offset of "orders@broker-a:3:1042". A usage error for anything else."""
    from kitemq.message import MessageQueue

    match = re.fullmatch(_POSITION, text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no position: write TOPIC@BROKER:ID:OFFSET, as in orders@broker-a:3:1042")
    return MessageQueue(match["topic"], match["broker"], int(match["id"])), int(match["offset"])
