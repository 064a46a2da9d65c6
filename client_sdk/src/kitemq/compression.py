"""Body compression, flagged as RocketMQ does: bit 0 compressed, bits 8..10 the algorithm."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from enum import Enum

from kitemq.errors import CorruptRecordError, InvalidRequestError
from kitemq.protocol.names import BODY_BYTES_MAX

_COMPRESSED = 1
_TYPE_SHIFT = 8
_TYPE_MASK = 0x700


class Compression(Enum):
    """How bodies of at least `compress_from_bytes` travel and lie on disk. LZ4 and ZSTD need the extra of that name."""

    NONE = 0
    LZ4 = 1
    ZSTD = 2
    ZLIB = 3


def sys_flag(algorithm: Compression) -> int:
    """The flag bits of a body compressed with `algorithm`."""
    return _COMPRESSED | algorithm.value << _TYPE_SHIFT if algorithm is not Compression.NONE else 0


def compressor(algorithm: Compression) -> Callable[[bytes], bytes]:
    """A function that compresses. Raises InvalidRequestError when its library is not installed."""
    if algorithm is Compression.ZLIB:
        return lambda body: zlib.compress(body, 5)
    if algorithm is Compression.LZ4:
        try:
            import lz4.frame
        except ImportError:
            raise InvalidRequestError("LZ4 compression needs: pip install 'kitemq[lz4]'") from None
        return lambda body: bytes(lz4.frame.compress(body))
    if algorithm is Compression.ZSTD:
        try:
            import zstandard
        except ImportError:
            raise InvalidRequestError("ZSTD compression needs: pip install 'kitemq[zstd]'") from None
        # A compressor object is not safe in two threads at once; making one costs a microsecond.
        return lambda body: bytes(zstandard.ZstdCompressor(level=3).compress(body))
    return lambda body: body


def decompress(body: bytes, flag: int) -> bytes:
    """The body that was sent, given the record's `sys_flag`.

    Raises CorruptRecordError for bytes that do not decompress to at most 4 MiB, InvalidRequestError when the
    algorithm's library is not installed.
    """
    if not flag & _COMPRESSED:
        return body
    number = (flag & _TYPE_MASK) >> _TYPE_SHIFT
    try:
        algorithm = Compression(number) if number else Compression.ZLIB
    except ValueError:
        raise CorruptRecordError(f"body is compressed with an unknown algorithm, number {number}") from None
    try:
        return _decompress(body, algorithm)
    except (InvalidRequestError, CorruptRecordError):
        raise
    except Exception as error:  # each library has its own error type, two of them optional
        raise CorruptRecordError(f"body does not decompress as {algorithm.name}: {error}") from error


def _decompress(body: bytes, algorithm: Compression) -> bytes:
    if algorithm is Compression.ZLIB:
        stream = zlib.decompressobj()
        out = stream.decompress(body, BODY_BYTES_MAX + 1)
        whole = stream.eof
    elif algorithm is Compression.LZ4:
        try:
            import lz4.frame
        except ImportError:
            raise InvalidRequestError("this message is LZ4-compressed: pip install 'kitemq[lz4]'") from None
        frame = lz4.frame.LZ4FrameDecompressor()
        out = bytes(frame.decompress(body, BODY_BYTES_MAX + 1))
        whole = frame.eof
    else:
        try:
            import zstandard
        except ImportError:
            raise InvalidRequestError("this message is ZSTD-compressed: pip install 'kitemq[zstd]'") from None
        out = bytes(zstandard.ZstdDecompressor().decompress(body, max_output_size=BODY_BYTES_MAX + 1))
        whole = True
    if len(out) > BODY_BYTES_MAX or not whole:
        raise CorruptRecordError(f"body does not decompress to at most {BODY_BYTES_MAX} bytes")
    return out
