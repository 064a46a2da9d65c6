"""What the `kitemq` command does, from Python: topics, lag, offsets, stored messages.

python examples/administer.py [namesrv]
"""

import asyncio
import sys

import kitemq
from kitemq.admin import AdminClient

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


async def main() -> None:
    async with AdminClient(NAMESRV) as admin:
        for change in await admin.create_topic("invoices", queue_count=2):
            print(f"{change.settings.broker_name}: {change.settings.write_queue_count} queues")

        async with kitemq.Producer(NAMESRV, group="shop") as producer:
            messages = [kitemq.Message("invoices", b"%d" % number, keys=["c-1"]) for number in range(6)]
            receipts = await producer.send_batch(messages)
        async with kitemq.PullConsumer(NAMESRV, group="printers", from_where=kitemq.Position.FIRST) as consumer:
            await consumer.subscribe("invoices")
            await consumer.poll(max_count=4)
            await consumer.commit()

        print(f"lag of printers: {(await admin.describe_group('printers')).lag_messages}")
        moves = await admin.reset_offsets("printers", "invoices", first=True)
        print(f"after a reset: {(await admin.describe_group('printers')).lag_messages}, {len(moves)} queues moved")
        (found,) = await admin.find_by_id(receipts[3].message_id)
        print(f"by id: {found.body.decode()} at offset {found.queue_offset} of {found.queue}")
        print(f"by key: {len(await admin.find_by_key('invoices', 'c-1'))} messages")
        print(f"deleted on {', '.join(await admin.delete_topic('invoices'))}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
