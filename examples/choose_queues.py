"""Choose the queue yourself: by name, or with a function that picks one.

python examples/choose_queues.py [namesrv]
"""

import asyncio
import sys
from collections.abc import Sequence

import kitemq
from kitemq.admin import AdminClient

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


def by_country(queues: Sequence[kitemq.MessageQueue], message: kitemq.Message) -> kitemq.MessageQueue:
    """Called with the queues that can be written, sorted."""
    return queues[0] if message.properties["country"] == "FR" else queues[1]


async def main() -> None:
    async with AdminClient(NAMESRV) as admin:
        await admin.create_topic("parcels", queue_count=4)
        queues = [state.queue for state in await admin.list_queues("parcels")]

    async with kitemq.Producer(NAMESRV, group="post") as producer:
        receipt = await producer.send(kitemq.Message("parcels", b"by name"), queue=queues[3])
        print(f"by name: {receipt.queue}")
        for country in ("FR", "NL"):
            message = kitemq.Message("parcels", b"by a function", properties={"country": country})
            receipt = await producer.send(message, selector=by_country)
            print(f"{country}: {receipt.queue}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
