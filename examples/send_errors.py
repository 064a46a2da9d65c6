"""What a send may raise. All of it is a kitemq.KiteMQError, and says what, where and what to do.

python examples/send_errors.py [namesrv]
"""

import asyncio
import sys

import kitemq

NAMESRV = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876"


async def main() -> None:
    async with kitemq.Producer(NAMESRV, group="shop") as producer:
        for message in (kitemq.Message("orders", b""), kitemq.Message("no spaces", b"x")):
            try:
                await producer.send(message)
            except kitemq.InvalidRequestError as error:  # a bug in the program: nothing was sent
                print(f"not a message: {error.message}")

    # Nobody listens at this address. The SDK tries for delivery_timeout_s before it gives up.
    async with kitemq.Producer("127.0.0.1:1", group="shop", request_timeout_s=0.5, delivery_timeout_s=1.0) as producer:
        try:
            await producer.send(kitemq.Message("orders", b"hello"))
        except (kitemq.BrokerUnavailableError, kitemq.RequestTimeoutError) as error:
            # Try again later, or keep the message elsewhere. RequestTimeoutError: it may be stored all the same.
            print(f"no cluster: {type(error).__name__}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
