"""Ways to damage a file, each drawn from a random.Random: bytes, headers of tars, images and JSON that are traps."""

import json
import random
import struct
import zlib
from copy import deepcopy
from functools import cache

from tests.data.inputs import picture

# ---- mutations of bytes


def flip(rng: random.Random, data: bytes) -> bytes:
    """A few bits turned over."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(rng: random.Random, data: bytes) -> bytes:
    """The end is missing."""
    return data[: rng.randrange(len(data))]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """A stretch of zeros, ones or noise."""
    at, length = rng.randrange(len(data)), rng.choice((1, 4, 30, 512, 3000))
    filling = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
    return (data[:at] + filling + data[at + length :])[: len(data)]


def move(rng: random.Random, data: bytes) -> bytes:
    """Bytes inserted, removed or repeated: everything behind them is elsewhere."""
    at, length = rng.randrange(len(data)), rng.choice((1, 100, 512, 1024))
    start, rest = data[:at], data[at:]
    return rng.choice((start + rng.randbytes(length) + rest, start + rest[length:], start + rest[:length] + rest))


BYTES = (flip, truncate, overwrite, move)


def header(rng: random.Random, data: bytes) -> bytes:
    """A tar header with an impossible field and a checksum that fits."""
    headers = [at for at in range(0, len(data) - 512, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(headers)
    block = bytearray(data[at : at + 512])
    where, length = rng.choice(((124, 12), (156, 1), (0, 100), (345, 155), (100, 8), (157, 100)))
    number = rng.choice((-1, -512, 0, 1, 1 << 20, 1 << 40, -(1 << 40)))
    sign = b"\xff" * 4 if number < 0 else b"\x80" + bytes(3)
    values = (
        sign + struct.pack(">q", number),
        b"77777777777\0",
        rng.choice((b"0", b"1", b"2", b"3", b"5", b"6", b"x", b"g", b"L", b"K", b"S", b"\0")),
        rng.choice((b"../../etc/x", b"/etc/x.json", b"a/../../b.txt", b"\xff\xfe.jpg", b"", b".", b"caption.json")),
        rng.randbytes(length),
    )
    block[where : where + length] = rng.choice(values)[:length].ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return data[:at] + bytes(block) + data[at + 512 :]


# ---- hostile members


@cache
def long_comment() -> bytes:
    """A PNG chunk of 64 MiB of text in 64 KiB."""
    chunk = b"zTXt" + b"k\0\0" + zlib.compress(bytes(64 << 20), 9)
    return len(chunk[4:]).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")


def bomb(rng: random.Random, _: bytes) -> bytes:
    """An image that claims to be far larger than its file, or holds far more than it says."""
    data = bytearray(picture(form="PNG"))
    side = rng.choice((5000, 60_000, 0, 0x7FFFFFFF, 0xFFFFFFFF))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    if rng.random() < 0.5:
        good = picture(form="PNG")
        return good[:33] + long_comment() + good[33:]
    return bytes(data)


def odd_json(rng: random.Random, data: bytes) -> bytes:
    """JSON that no writer of ours makes."""
    fields = json.loads(data)
    if rng.random() < 0.3:
        return rng.choice(
            (
                b"[" * 100_000,
                b'{"kind": ' * 50_000,
                b'{"kind": "text", "texts": [' + b"9" * 10_000 + b'], "images": [null]}',
                b"",
                b"null",
                b"\xff\xfe{}",
                b'{"kind": "text", "texts": ["\\ud800 lone"], "images": [null]}',
                b'{"kind": NaN}',
                b'"' + b"x" * 100_000,
            )
        )
    odd = (
        None,
        0,
        -1,
        1e400,
        "",
        "json",
        "../x",
        [],
        {},
        [None],
        [[]],
        ["a", "b"],
        {"a": 1},
        True,
        "\ud800",
        "x" * 3000,
    )
    name = rng.choice([*fields, "kind", "texts", "images", "turns"])
    fields[name] = deepcopy(rng.choice(odd))
    if isinstance(fields.get("turns"), list) and rng.random() < 0.5:
        fields["turns"] = [rng.choice((*odd, {"role": rng.choice(odd), "text": rng.choice(odd)})) for _ in range(2)]
    if isinstance(fields.get("texts"), list) and fields["texts"] and rng.random() < 0.5:
        fields["texts"][0] = rng.choice(odd)
    return json.dumps(fields).encode()
