"""One frozen model per service: defaults < TOML file < KITEMQ_<SERVICE>_* environment < --flags.

The environment is read nowhere else. Every problem is named by the key and the place it came from, in plain words.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from kitemq_server.common.addresses import Listener, parse_listeners, split_address, text_list

Config = TypeVar("Config", bound="ServiceConfig")


class ConfigError(Exception):
    """The configuration is unusable; the text has one line per problem and names the key."""


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _metrics_address(value: object) -> str:
    if value in (0, "0", "", None, False):
        return ""
    if not isinstance(value, str):
        raise ValueError("must be host:port, or empty for no metrics")
    split_address(value)
    return value


Listeners = Annotated[tuple[Listener, ...], BeforeValidator(parse_listeners)]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(text_list(value)))]
MetricsAddress = Annotated[str, BeforeValidator(_metrics_address)]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)]
LogFormat = Literal["text", "json"]


class ServiceConfig(BaseSettings):
    """Base of every service's model; a subclass names its environment prefix in `model_config`."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", enable_decoding=False, validate_default=False)

    # Models of the services that this one is made of: they read their own variables.
    parts: ClassVar[tuple[type[ServiceConfig], ...]] = ()

    # Why INFO: one line per change of state, none per message.
    log_level: LogLevel = Field(default="INFO", description="DEBUG, INFO, WARNING or ERROR")
    log_format: LogFormat = Field(default="text", description="text (key=value) or json, one object a line")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Where values come from, the strongest first."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def items(self) -> Iterator[tuple[str, str, str]]:
        """(key, value as text, help) of every key. Paths are left empty: they do not cross the wire."""
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            yield key, "" if isinstance(value, Path) else value_text(value), field.description or ""


class ListeningConfig(ServiceConfig):
    """What every service that takes connections has."""

    # Why several: a client outside the network needs another address than a peer inside (see `advertise`).
    listen: Listeners = Field(
        default=(Listener("internal", "0.0.0.0", 0),),
        description="host:port to listen on, or several as name=host:port,name=host:port",
    )
    # Why a list: a plaintext listener inside and TLS outside is the usual mixture.
    tls_cert_file: Path | None = Field(default=None, description="certificate chain (PEM); turns TLS on")
    tls_key_file: Path | None = Field(default=None, description="private key (PEM) of tls-cert-file")
    tls_client_ca_file: Path | None = Field(
        default=None, description="certificate authority (PEM) that every client's certificate must come from"
    )
    tls_listeners: Texts = Field(default=(), description="names of the listeners that speak TLS; empty = all")
    # Why 0.0.0.0: a scraper usually runs elsewhere, and the endpoint tells names and counts only.
    metrics_listen: MetricsAddress = Field(default="", description="host:port for Prometheus to scrape; empty = off")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file belong together: set both or neither")
        if self.tls_cert_file is None and (self.tls_client_ca_file or self.tls_listeners):
            raise ValueError("tls_client_ca_file and tls_listeners need tls_cert_file")
        names = {listener.name for listener in self.listen}
        if unknown := sorted(set(self.tls_listeners) - names):
            raise ValueError(f"tls_listeners: there is no listener {unknown[0]!r} (listen has {_words(names)})")
        for key in ("tls_cert_file", "tls_key_file", "tls_client_ca_file"):
            path = getattr(self, key)
            if path is not None and not os.access(path, os.R_OK):
                raise ValueError(f"{key}: cannot read {path}")
        return self


def load(
    model: type[Config],
    *,
    config_file: Path | None = None,
    flags: Mapping[str, object] | None = None,
) -> Config:
    """The service's configuration from its file, the environment and `flags` (by key; texts, or values as they are).

    Raises ConfigError with every problem found.
    """
    flags = flags or {}
    if config_file is not None:
        _check_file(config_file)
    # The library takes the file's path from the class.
    source = types.new_class(model.__name__, (model,), {"toml_file": config_file})
    try:
        config: Config = source(**flags)
    except ValidationError as error:
        lines = [_problem(model, dict(detail), flags, config_file) for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from None
    return config


def unknown_environment(model: type[ServiceConfig]) -> list[str]:
    """Variables with the service's prefix that are no keys: worth a warning, but Kubernetes sets such names itself."""
    prefix = str(model.model_config.get("env_prefix", ""))
    known = {f"{prefix}{key}".upper() for key in model.model_fields}
    orchestrator = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_(TCP|UDP).*)?)")
    return sorted(
        name
        for name in os.environ
        if name.upper().startswith(prefix.upper())
        and name.upper() not in known
        and not orchestrator.fullmatch(name.upper().removeprefix(prefix.upper()))
    )


def set_in_environment(model: type[ServiceConfig], keys: Iterable[str]) -> list[str]:
    """The variables that set these keys of the service, in the order of the keys."""
    prefix = str(model.model_config.get("env_prefix", ""))
    present = {name.upper() for name in os.environ}
    return [name for key in keys if (name := f"{prefix}{key}".upper()) in present]


def value_text(value: object) -> str:
    """A value as a flag or the environment would give it."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case Mapping():
            return ",".join(f"{name}={text}" for name, text in value.items())
        case tuple() | list():
            return ",".join(str(item) for item in value)
        case _:
            return str(value)


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is not valid TOML: {error}") from None


def _problem(
    model: type[ServiceConfig], detail: dict[str, Any], flags: Mapping[str, object], config_file: Path | None
) -> str:
    if not detail["loc"]:
        return _message(detail)
    key = str(detail["loc"][0])
    variable = f"{model.model_config.get('env_prefix', '')}{key}".upper()
    if key in flags:
        origin = f"--{key.replace('_', '-')}"
    elif variable in (name.upper() for name in os.environ):
        origin = variable
    else:
        origin = str(config_file)
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, model.model_fields, n=1)
        return f"{key}: no such key" + (f", did you mean {close[0]}?" if close else "") + f" [{origin}]"
    return f"{key}: {in_words(detail, given=flags.get(key, detail['input']))} [{origin}]"


def in_words(detail: Mapping[str, Any], *, given: object) -> str:
    """What the library found wrong with `given`, in words for people."""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "value_error":
            return _message(detail)
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            rule = "must be a whole number"
        case "bool_parsing" | "bool_type":
            rule = "must be true or false"
        case "greater_than_equal":
            rule = f"must be at least {context['ge']}"
        case "less_than_equal":
            rule = f"must be at most {context['le']}"
        case "literal_error":
            rule = f"must be {str(context['expected']).replace(chr(39), '')}"
        case "byte_size" | "byte_size_unit":
            rule = "must be a number of bytes, as 1073741824 or 1GiB"
        case "string_too_short":
            return "must not be empty"
        case "string_type" | "path_type":
            rule = "must be text"
        case _:
            message = _message(detail)
            rule = message[:1].lower() + message[1:]
    return f"{rule}, not {given!r}"


def _message(detail: Mapping[str, Any]) -> str:
    return str(detail["msg"]).removeprefix("Value error, ")


def _words(names: set[str]) -> str:
    return ", ".join(sorted(names))
