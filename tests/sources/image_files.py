"""Image files with any kind of pixels, and ICC profiles, written byte by byte: Pillow cannot write most of them."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

D50 = (0.9642, 1.0, 0.8249)  # the white of profiles
SRGB_PRIMARIES = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))  # XYZ of red, ...
P3_PRIMARIES = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))


def png_file(
    pixels: Sequence[Sequence[int]],
    bits: int,
    colour_type: int,
    transparent: Sequence[int] = (),
    palette: bytes = b"",
    profile: bytes = b"",
) -> bytes:
    """A PNG of rows of samples. `colour_type`: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def packed(row: Sequence[int]) -> bytes:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        return b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")

    width = len(pixels[0]) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(pixels), bits, colour_type, 0, 0, 0))
    if profile:
        content += chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile))
    if palette:
        content += chunk(b"PLTE", palette)
    if transparent:
        sample = "B" if colour_type == 3 else "H"
        content += chunk(b"tRNS", struct.pack(f">{len(transparent)}{sample}", *transparent))
    data = zlib.compress(b"".join(map(packed, pixels)))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IDAT", data) + chunk(b"IEND", b"")


UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK, YCBCR, CIELAB = 0, 1, 2, 5, 6, 8


def tiff_file(
    pixels: np.ndarray, photometric: int, kind: int = UNSIGNED, extra: int | None = None, orientation: int = 1
) -> bytes:
    """An uncompressed TIFF of pixels (H, W) or (H, W, channels). `extra`: what the last channel is; 1, 2: alpha.

    Arrays of int64 are written with 12 bits.
    """
    height, width, *channels = pixels.shape
    samples = channels[0] if channels else 1
    if pixels.dtype == np.int64:
        bits, rows = 12, ["".join(f"{value:012b}" for value in row) for row in pixels.reshape(height, -1)]
        data = b"".join(int(row + "0" * (-len(row) % 8), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)
    else:
        bits, data = 8 * pixels.dtype.itemsize, pixels.tobytes()
    data += b"\0" * (len(data) % 2)
    tags = {256: [width], 257: [height], 258: [bits] * samples, 259: [1], 262: [photometric], 273: [8]}
    tags |= {274: [orientation], 277: [samples], 278: [height], 279: [len(data)], 284: [1]}
    tags |= {} if extra is None else {338: [extra]}
    tags |= {339: [kind] * samples}
    after = 8 + len(data) + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, numbers in tags.items():
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        if len(packed) > 4:
            packed, values = struct.pack("<I", after + len(values)), values + packed
        entries += struct.pack("<HHI4s", tag, 3, len(numbers), packed)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return header + data + struct.pack("<H", len(tags)) + entries + bytes(4) + values


def matrix_profile(primaries: Sequence[Sequence[float]], gamma: float) -> bytes:
    """An ICC profile of RGB: these primaries, and light = level ** gamma."""
    tags = {name + b"XYZ": _xyz(value) for name, value in zip((b"r", b"g", b"b"), primaries, strict=True)}
    return _profile(b"RGB ", tags | {name + b"TRC": _curve(gamma) for name in (b"r", b"g", b"b")})


def grey_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", {b"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """An ICC profile in whose ink 0 is full and 255 is none: unlike what any other CMYK means, so that it shows."""
    grid = [(c, m, y, k) for c in (1, 0) for m in (1, 0) for y in (1, 0) for k in (1, 0)]
    table = []
    for cyan, magenta, yellow, black in grid:
        light = np.array([1 - cyan, 1 - magenta, 1 - yellow]) * (1 - black)
        xyz = light @ np.array(SRGB_PRIMARIES)
        y = xyz / D50
        f = np.where(y > (6 / 29) ** 3, np.cbrt(y), y / (3 * (6 / 29) ** 2) + 4 / 29)
        lightness, a, b = 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])
        table += [round(lightness / 100 * 255), round(a + 128), round(b + 128)]
    linear = bytes(range(256))
    identity = b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * linear + bytes(table) + 3 * linear
    return _profile(b"CMYK", {b"A2B0": lut}, pcs=b"Lab ", device=b"prtr")


def _profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", device: bytes = b"mntr") -> bytes:
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79), b"wtpt": _xyz(D50)} | tags
    table, body = b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 132 + len(table) + len(body)
    header = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02400000, device, space, pcs, b"acsp")
    header += b"".join(map(_fixed, D50)) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def _xyz(value: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, value))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))
