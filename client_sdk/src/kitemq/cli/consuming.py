"""Behind `kitemq consume`: a member of the group that prints."""

from __future__ import annotations

from datetime import UTC, datetime

from kitemq.admin import AdminClient
from kitemq.cli.messages import MessagePrinter
from kitemq.cli.options import Connection
from kitemq.cli.session import warn_unanswered
from kitemq.consumer.options import Position, Start
from kitemq.consumer.pull_consumer import PullConsumer

POLL_MESSAGES = 1000
POLL_S = 3600.0


async def consume_topic(
    connection: Connection,
    topic: str,
    *,
    group: str,
    start: str | int,
    filter_expression: str,
    count: int | None,
    idle_s: float | None,
    printer: MessagePrinter,
) -> None:
    """Print the group's messages, `count` of them or until nothing comes for idle_s; commit what was printed.

    start: "first", "last" or Unix milliseconds.
    """
    tls = connection.tls_config()
    # The consumer waits for a topic or a cluster that is not there; whoever types wants to know.
    async with AdminClient(connection.namesrv, tls=tls, on_unanswered=warn_unanswered) as admin:
        await admin.list_queues(topic)
    from_where: Start = datetime.fromtimestamp(start / 1000, UTC) if isinstance(start, int) else Position(start)
    async with PullConsumer(connection.namesrv, group=group, from_where=from_where, tls=tls) as consumer:
        await consumer.subscribe(topic, filter=filter_expression)
        while count is None or printer.count < count:
            wanted = POLL_MESSAGES if count is None else min(POLL_MESSAGES, count - printer.count)
            # What was polled before counts as done from here on: it has been written.
            messages = await consumer.poll(wanted, timeout_s=idle_s or POLL_S)
            if not messages and idle_s is not None:
                return
            for message in messages:
                printer.print(message)
            printer.flush()
