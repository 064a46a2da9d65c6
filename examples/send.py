"""Send messages: one, a batch, and one without waiting.

python examples/send.py [namesrv]
"""

import asyncio
import sys

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="shop") as producer:
        message = kitemq.Message("orders", b'{"order": 1}', tag="paid", keys=["order-1"], properties={"source": "web"})
        receipt = await producer.send(message)
        print(f"{receipt.status.name}: {receipt.message_id} is at offset {receipt.queue_offset} of {receipt.queue}")

        batch = [kitemq.Message("orders", f'{{"order": {number}}}'.encode()) for number in range(2, 6)]
        receipts = await producer.send_batch(batch)
        print(f"a batch of {len(receipts)} lies in {receipts[0].queue}")

        producer.send_oneway(kitemq.Message("orders", b'{"order": 6}'))
        await producer.flush()
        print("what was sent without waiting has left")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except kitemq.BrokerUnavailableError as error:
        sys.exit(error.message)
    except KeyboardInterrupt:
        sys.exit(130)
