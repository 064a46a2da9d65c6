"""How events.txt was made: every change of a clock that the tz database knows, as a line, in the order of time.

    python extract_events.py > events.txt

Reads the compiled tz database of this machine (Debian's package tzdata, 2025b, when events.txt was made), for the zones
of zone1970.tab, up to the end of 2024. A line: when (UTC), zone, offset from UTC before and after, abbreviation after.
"""

import struct
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

ZONEINFO = Path("/usr/share/zoneinfo")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAST_YEAR = 2024


def transitions(data: bytes) -> Iterator[tuple[int, int, int, str]]:
    """(Unix seconds, offset before, offset after, abbreviation after) from a TZif file of version 2 or later.

    Source: RFC 8536.
    """
    header = struct.Struct(">4s c 15x 6I")
    _, _, isutc, isstd, leap, times, types, chars = header.unpack_from(data)
    # The first block holds 32-bit times; the second, 64-bit ones.
    start = header.size + times * 5 + types * 6 + chars + leap * 8 + isstd + isutc
    _, _, isutc, isstd, leap, times, types, chars = header.unpack_from(data, start)
    start += header.size
    moments = struct.unpack_from(f">{times}q", data, start)
    kinds = data[start + times * 8 : start + times * 9]
    offsets = [struct.unpack_from(">ibB", data, start + times * 9 + index * 6) for index in range(types)]
    names = data[start + times * 9 + types * 6 :][:chars]
    before = 0
    for moment, kind in zip(moments, kinds, strict=True):
        after = offsets[kind]
        yield moment, offsets[before][0], after[0], names[after[2] :].split(b"\0", 1)[0].decode()
        before = kind


def offset_text(seconds: int) -> str:
    """ "+05:30", with seconds where there are any."""
    minutes, second = divmod(abs(seconds), 60)
    text = f"{'-' if seconds < 0 else '+'}{minutes // 60:02}:{minutes % 60:02}"
    return f"{text}:{second:02}" if second else text


def main() -> None:
    """Print the events."""
    zones = [line.split()[2] for line in (ZONEINFO / "zone1970.tab").read_text().splitlines() if line[0] != "#"]
    events = []
    for zone in zones:
        for moment, before, after, name in transitions((ZONEINFO / zone).read_bytes()):
            when = EPOCH + timedelta(seconds=moment) if moment > -(2**40) else None
            if when is not None and when.year <= LAST_YEAR:
                events.append((when, zone, offset_text(before), offset_text(after), name))
    for when, *words in sorted(events):
        sys.stdout.write(f"{when:%Y-%m-%dT%H:%M:%SZ} {' '.join(words)}\n")


if __name__ == "__main__":
    main()
