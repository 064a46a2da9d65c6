"""What can stop a store from opening or end it. Never crosses the wire: texts may name paths."""


class StoreOpenError(RuntimeError):
    """The data directory cannot be served as it is; the text says why and what to do."""
