"""Send and pull without the SDK: gRPC and server reflection only. What a client in any language does.

Needs: pip install grpcio grpcio-reflection. Usage: python without_sdk.py [namesrv address]
"""

import sys
import uuid

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class Service:
    """Calls the unary methods of a service whose definition the server tells."""

    def __init__(self, address, name):
        self.channel = grpc.insecure_channel(address)
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))
        self.service = pool.FindServiceByName(name)

    def call(self, method, **fields):
        types = self.service.methods_by_name[method]
        request = message_factory.GetMessageClass(types.input_type)
        response = message_factory.GetMessageClass(types.output_type)
        path = f"/{self.service.full_name}/{method}"
        unary = self.channel.unary_unary(path, request.SerializeToString, response.FromString)
        return unary(request(**fields), timeout=20)


def main():
    namesrv = Service(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9876", "kitemq.v1.Namesrv")
    # TBW102 is the template that new topics are made from: its route names brokers that will take them.
    route = namesrv.call("GetRoute", topic="TBW102")
    master = next(b.address for b in route.brokers[0].brokers if b.broker_id == 0)
    broker = Service(master, "kitemq.v1.Broker")
    message = {"topic": "without-sdk", "body": b"hello", "tag": "greeting", "message_id": uuid.uuid4().hex}
    sent = broker.call("SendMessage", message=message, queue_id=0)
    print(f"sent    {sent.message_id} to queue {sent.queue_id} at offset {sent.queue_offset}")
    reply = broker.call(
        "PullMessage", topic="without-sdk", queue_id=0, group="demo", queue_offset=sent.queue_offset, suspend_ms=5000
    )
    for record in reply.records:
        print(f"pulled  {record.message_id} at offset {record.queue_offset}: {record.body.decode()}")


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(f"{error.code().name}: {error.details()}. Start a server: kitemq-server standalone --ephemeral")
    except KeyboardInterrupt:
        sys.exit(130)
