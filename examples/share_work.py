"""The members of a group share the queues of a topic. Whoever joins or leaves changes the shares within a second.

python examples/share_work.py [namesrv]
"""

import asyncio
import sys

import kitemq
from kitemq.admin import AdminClient

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


async def shares(consumers: list[kitemq.PullConsumer]) -> list[int]:
    """Wait until all 6 queues have an owner again and the shares differ by one at most."""
    while True:
        counts = [len(consumer.held_queues()) for consumer in consumers]
        if sum(counts) == 6 and max(counts) - min(counts) <= 1:
            return counts
        await asyncio.sleep(0.05)


async def main() -> None:
    async with AdminClient(NAMESRV) as admin:
        await admin.create_topic("work", queue_count=6)

    def member() -> kitemq.PullConsumer:
        return kitemq.PullConsumer(NAMESRV, group="crew")

    async with member() as first, member() as second:
        await first.subscribe("work")
        await second.subscribe("work")
        print(f"two members: {await shares([first, second])}")
        async with member() as third:
            await third.subscribe("work")
            print(f"a third joins: {await shares([first, second, third])}")
        print(f"it leaves: {await shares([first, second])}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
