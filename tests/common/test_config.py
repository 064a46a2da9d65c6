"""Where a value comes from, and what is said of one that cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kitemq_server.broker.config import BrokerConfig
from kitemq_server.common.config import ConfigError, load, unknown_environment, value_text
from kitemq_server.namesrv.config import NamesrvConfig


def toml(folder: Path, text: str) -> Path:
    path = folder / "broker.toml"
    path.write_text(text)
    return path


def test_defaults_are_rocketmq_s() -> None:
    config = load(BrokerConfig)
    assert value_text(config.listen) == "0.0.0.0:10911"
    assert (config.cluster_name, config.broker_id, config.flush_mode) == ("DefaultCluster", 0, "ASYNC_FLUSH")
    assert (config.default_topic_queue_count, config.permission, config.retention_hours) == (8, 6, 72)
    assert config.namesrv == ("127.0.0.1:9876",)
    assert config.metrics_listen == "0.0.0.0:5557"
    assert value_text(load(NamesrvConfig).listen) == "0.0.0.0:9876"


def test_flags_over_environment_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path, 'cluster_name = "file"\nbroker_name = "file"\nretention_hours = 1\n')
    monkeypatch.setenv("KITEMQ_BROKER_BROKER_NAME", "environment")
    monkeypatch.setenv("KITEMQ_BROKER_RETENTION_HOURS", "2")
    config = load(BrokerConfig, config_file=path, flags={"retention_hours": "3"})
    assert (config.cluster_name, config.broker_name, config.retention_hours) == ("file", "environment", 3)
    assert config.broker_id == 0


def test_texts_and_tables_mean_the_same(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        'namesrv = ["a:1", "b"]\nsegment_bytes = "64MiB"\nauto_create_topic_enable = false\n'
        '[listen]\ninternal = "0.0.0.0:1"\nexternal = "0.0.0.0:2"\n[advertise]\nexternal = "host"\n',
    )
    flags = {
        "namesrv": "a:1;b:9876",
        "segment_bytes": "67108864",
        "auto_create_topic_enable": "no",
        "listen": "internal=0.0.0.0:1,external=0.0.0.0:2",
        "advertise": "external=host",
        "flush_mode": "async_flush",
    }
    assert load(BrokerConfig, config_file=path).model_dump() == load(BrokerConfig, flags=flags).model_dump()


PROBLEMS: list[tuple[dict[str, str], str]] = [
    ({"broker_id": "-1"}, "broker_id: must be at least 0, not '-1'"),
    ({"broker_id": "first"}, "broker_id: must be a whole number, not 'first'"),
    (
        {"disk_watermark_percent": "100"},
        "disk_watermark_percent: must be at most 99, not '100'",
    ),
    ({"flush_mode": "fast"}, "flush_mode: must be ASYNC_FLUSH or SYNC_FLUSH, not 'fast'"),
    (
        {"auto_create_topic_enable": "maybe"},
        "auto_create_topic_enable: must be true or false, not 'maybe'",
    ),
    (
        {"segment_bytes": "big"},
        "segment_bytes: must be a number of bytes, as 1073741824 or 1GiB, not 'big'",
    ),
    ({"listen": "10911"}, "listen: '10911' has no port: write host:port"),
    ({"namesrv": "a:b"}, "namesrv: 'a:b' has no valid port: 0 to 65535"),
    (
        {"broker_name": "a b"},
        "broker_name: broker name 'a b' must be 1 to 127 letters, digits, '_', '-' or '.'",
    ),
    ({"advertise": "external=host"}, "advertise: there is no listener 'external' (listen has internal)"),
    ({"heartbeat_expiry_ms": "31000"}, "heartbeat_expiry_ms must be at least twice heartbeat_interval_ms"),
    ({"tls_cert_file": "/no/cert"}, "tls_cert_file and tls_key_file belong together: set both or neither"),
    ({"tls_cert_file": "/no/cert", "tls_key_file": "/no/key"}, "tls_cert_file: cannot read /no/cert"),
    ({"tls_listeners": "internal"}, "tls_client_ca_file and tls_listeners need tls_cert_file"),
    ({"metrics_listen": "5557"}, "metrics_listen: '5557' has no port: write host:port"),
    ({"log_level": "loud"}, "log_level: must be DEBUG, INFO, WARNING or ERROR, not 'loud'"),
    ({"brokr_name": "a"}, "brokr_name: no such key, did you mean broker_name?"),
]


@pytest.mark.parametrize(("flags", "text"), PROBLEMS, ids=[text.split(":")[0] for _, text in PROBLEMS])
def test_nonsense_is_named_in_plain_words(flags: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as problem:
        load(BrokerConfig, flags=flags)
    assert re.sub(r" \[--[a-z-]+\]$", "", str(problem.value)) == text


def test_every_problem_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path, "retention_byte = 3\nbroker_id = 1.5\n")
    monkeypatch.setenv("KITEMQ_BROKER_PERMISSION", "9")
    with pytest.raises(ConfigError) as problem:
        load(BrokerConfig, config_file=path, flags={"held_pull_count_max": "0"})
    assert sorted(str(problem.value).splitlines()) == [
        f"broker_id: must be a whole number, not 1.5 [{path}]",
        "held_pull_count_max: must be at least 1, not '0' [--held-pull-count-max]",
        "permission: must be at most 7, not '9' [KITEMQ_BROKER_PERMISSION]",
        f"retention_byte: no such key, did you mean retention_bytes? [{path}]",
    ]


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot read"), ("a = ", "not valid TOML"), ("\xff", "not valid TOML")]
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "broker.toml"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=words):
        load(BrokerConfig, config_file=path)


@pytest.mark.parametrize("value", ["", "0"])
def test_metrics_can_be_off(value: str) -> None:
    assert load(BrokerConfig, flags={"metrics_listen": value}).metrics_listen == ""


def test_a_configuration_does_not_change() -> None:
    config: Any = load(NamesrvConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.log_level = "DEBUG"


def test_variables_that_are_no_keys_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BROKR_NAME", "BROKER_NAME", "SERVICE_HOST", "SERVICE_PORT_GRPC", "PORT", "PORT_10911_TCP_ADDR"):
        monkeypatch.setenv(f"KITEMQ_BROKER_{name}", "x")
    assert unknown_environment(BrokerConfig) == ["KITEMQ_BROKER_BROKR_NAME"]


def test_paths_are_not_shown() -> None:
    shown = {key: value for key, value, _ in load(BrokerConfig, flags={"namesrv": "a:1,b:2"}).items()}
    assert shown["data_dir"] == ""
    assert shown["namesrv"] == "a:1,b:2"
    assert shown["segment_bytes"] == "1073741824"
    assert shown["auto_create_topic_enable"] == "true"
