"""A cluster that speaks TLS: give the CA that signed its certificates. For mutual TLS also a certificate and its key.

python examples/over_tls.py namesrv ca.pem [server name]
"""

import asyncio
import sys

import kitemq


async def main(namesrv: str, ca_file: str, server_name: str | None = None) -> None:
    tls = kitemq.TlsConfig(ca_file=ca_file, server_name=server_name)
    async with kitemq.Producer(namesrv, group="shop", tls=tls) as producer:
        receipt = await producer.send(kitemq.Message("secrets", b"hello"))
        print(f"{receipt.status.name} over TLS")
    async with kitemq.PullConsumer(namesrv, group="spies", from_where=kitemq.Position.FIRST, tls=tls) as consumer:
        await consumer.subscribe("secrets")
        (message,) = await consumer.poll()
        print(message.body.decode())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        asyncio.run(main(*sys.argv[1:]))
    except kitemq.BrokerUnavailableError as error:
        sys.exit(f"{error.message} (with TLS: docs/operations.md)")
    except KeyboardInterrupt:
        sys.exit(130)
