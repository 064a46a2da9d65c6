"""The version of the SDK, as told to brokers and by `--version`."""

from importlib import metadata

VERSION = metadata.version("kitemq")
