"""A bounded number of files kept open for reading, the least recently used closed first.

Not shared between threads: the loop has one, the store's thread opens and closes files of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from kitemq_server.store.disk import File


class FileCache:
    """Open files by key."""

    __slots__ = ("_capacity", "_files")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._files: OrderedDict[Hashable, File] = OrderedDict()

    def get(self, key: Hashable, open_file: Callable[[], File]) -> File:
        """The file under `key`, opened when it is not. Use it before the next call: that may close it."""
        file = self._files.get(key)
        if file is not None:
            self._files.move_to_end(key)
            return file
        while len(self._files) >= self._capacity:
            self._files.popitem(last=False)[1].close()
        file = self._files[key] = open_file()
        return file

    def drop(self, key: Hashable) -> None:
        """Closes the file under `key`, if it is open."""
        file = self._files.pop(key, None)
        if file is not None:
            file.close()

    def drop_where(self, matches: Callable[[Hashable], bool]) -> None:
        """Closes the files whose keys match."""
        for key in [key for key in self._files if matches(key)]:
            self.drop(key)

    def close(self) -> None:
        """Closes all."""
        while self._files:
            self._files.popitem()[1].close()

    def __len__(self) -> int:
        return len(self._files)
