"""The servers under measurement: a namesrv and a broker, as `kitemq-server` runs them, each a process of its own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc

from kitemq.bench.process import BenchError, Process, free_port, running, wait_serving
from kitemq.proto.v1 import admin_pb2, admin_pb2_grpc, message_pb2
from kitemq.protocol.names import PERMISSION_READ_WRITE

CALL_TIMEOUT_S = 30.0


def server_command() -> str:
    """The `kitemq-server` beside this Python, or on the path. Raises BenchError when there is none."""
    command = shutil.which("kitemq-server", path=str(Path(sys.executable).parent)) or shutil.which("kitemq-server")
    if command is None:
        raise BenchError("there is no kitemq-server command: pip install kitemq-server")
    return command


class Cluster:
    """A running namesrv and broker. The broker can be stopped, killed and started again on its data."""

    def __init__(self, name: str, folder: Path, stack: ExitStack, *, flush_mode: str) -> None:
        self.name = name
        self._folder = folder
        self._stack = stack
        self._flush_mode = flush_mode
        self.namesrv = f"127.0.0.1:{free_port()}"
        self.broker_address = f"127.0.0.1:{free_port()}"
        self.topics: set[str] = set()
        self.broker: Process
        self._broker_stack = ExitStack()

    def start_namesrv(self) -> None:
        argv = [server_command(), "namesrv", "--listen", self.namesrv, "--metrics-listen", ""]
        argv += ["--data-dir", str(self._folder / "namesrv")]
        process = self._stack.enter_context(running(f"{self.name}-namesrv", argv, log_dir=self._folder))
        wait_serving(process, self.namesrv)
        self._stack.push(self._broker_stack)  # stopped before the namesrv is

    def start_broker(self) -> float:
        """Seconds from the start of the process until it serves."""
        argv = [server_command(), "broker", "--listen", self.broker_address, "--namesrv", self.namesrv]
        argv += ["--broker-name", self.name, "--data-dir", str(self._folder / "broker"), "--metrics-listen", ""]
        argv += ["--flush-mode", self._flush_mode]
        self.broker = self._broker_stack.enter_context(running(f"{self.name}-broker", argv, log_dir=self._folder))
        return wait_serving(self.broker, self.broker_address, timeout_s=300.0)

    def stop_broker(self) -> None:
        self._broker_stack.close()

    def kill_broker(self) -> None:
        self.broker.kill()
        self._broker_stack.close()

    def create_topic(self, topic: str, *, queue_count: int) -> None:
        """Returns when the namesrv knows it."""
        config = message_pb2.TopicConfig(
            name=topic,
            read_queue_count=queue_count,
            write_queue_count=queue_count,
            permission=PERMISSION_READ_WRITE,
        )
        with grpc.insecure_channel(self.broker_address) as channel:
            admin = admin_pb2_grpc.BrokerAdminStub(channel)
            try:
                admin.SetTopic(admin_pb2.SetTopicRequest(topic=config, create_only=True), timeout=CALL_TIMEOUT_S)
            except grpc.RpcError as error:
                raise BenchError(f"topic {topic} was not created: {error.details()}") from None
        self.topics.add(topic)


@contextmanager
def running_standalone(folder: Path) -> Iterator[tuple[Process, float]]:
    """`kitemq-server standalone` on empty data, and the seconds that it took from its start until it served."""
    broker = f"127.0.0.1:{free_port()}"
    argv = [server_command(), "standalone", "--data", str(folder / "standalone"), "--listen", broker]
    argv += ["--namesrv-listen", f"127.0.0.1:{free_port()}", "--metrics-listen", ""]
    try:
        with running("standalone", argv, log_dir=folder) as process:
            yield process, wait_serving(process, broker)
    finally:
        shutil.rmtree(folder / "standalone", ignore_errors=True)


@contextmanager
def running_cluster(name: str, folder: Path, *, flush_mode: str = "ASYNC_FLUSH") -> Iterator[Cluster]:
    """A namesrv and a broker with their data in a new `folder`/`name`, which is removed at the end."""
    home = folder / name
    home.mkdir()
    try:
        with ExitStack() as stack:
            cluster = Cluster(name, home, stack, flush_mode=flush_mode)
            cluster.start_namesrv()
            cluster.start_broker()
            yield cluster
    finally:
        shutil.rmtree(home)
