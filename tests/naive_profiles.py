"""ICC profiles in plain NumPy: made from their numbers, and applied by the formulas of ICC.1.

Knows profiles of a matrix and curves, and of one curve of grey; no lookup tables.
"""

from __future__ import annotations

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# XYZ of red, green and blue in rows, at D50, as published (brucelindbloom.com).
SRGB = np.array(
    [
        [0.4360747, 0.2225045, 0.0139322],
        [0.3850649, 0.7168786, 0.0971045],
        [0.1430804, 0.0606169, 0.7141733],
    ]
)
ADOBE = np.array(
    [
        [0.6097559, 0.3111242, 0.0194811],
        [0.2052401, 0.6256560, 0.0608902],
        [0.1492240, 0.0632197, 0.7448387],
    ]
)
P3 = np.array([[0.5151, 0.2412, -0.0011], [0.2920, 0.6922, 0.0419], [0.1571, 0.0666, 0.7841]])


def decoded(values, curve=None):
    """Light of values in 0..1, by sRGB's curve or an exponent."""
    values = np.asarray(values, float)
    if curve is None:
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return values**curve


def encoded(light):
    """Levels in 0..255, not rounded, of light in 0..1, by sRGB's curve."""
    light = np.clip(light, 0, 1)
    levels = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return 255 * levels


def srgb_of(pixels, rows, curve=None):
    """float[..., 3] levels in sRGB of uint8[..., 3], by XYZ of the primaries and a curve."""
    return encoded(decoded(pixels / 255, curve) @ rows @ np.linalg.inv(SRGB))


def srgb_by(pixels, profile):
    """float[..., 3] levels in sRGB of uint8[..., 3], by a profile of a matrix and curves."""
    tags = tags_of(profile)
    rows = np.array(
        [
            np.array(struct.unpack(">3i", tags[name][8:20])) / 65536
            for name in (b"rXYZ", b"gXYZ", b"bXYZ")
        ]
    )
    light = np.stack(
        [
            curve_of(tags[name])(pixels[..., channel] / 255)
            for channel, name in enumerate((b"rTRC", b"gTRC", b"bTRC"))
        ],
        axis=-1,
    )
    return encoded(light @ rows @ np.linalg.inv(SRGB))


def tags_of(profile):
    (number,) = struct.unpack(">I", profile[128:132])
    entries = (struct.unpack(">4sII", profile[132 + 12 * n :][:12]) for n in range(number))
    return {name: profile[start : start + size] for name, start, size in entries}


def curve_of(tag):
    """The function of a curve: a table, an exponent, or a formula with parameters."""
    if tag[:4] == b"curv":
        (number,) = struct.unpack(">I", tag[8:12])
        table = np.frombuffer(tag[12 : 12 + 2 * number], ">u2")
        if number == 0:
            return lambda x: x
        if number == 1:
            return lambda x: x ** (table[0] / 256)
        return lambda x: np.interp(x, np.linspace(0, 1, number), table / 65535)
    (kind,) = struct.unpack(">H", tag[8:10])
    g, *rest = (value / 65536 for value in struct.unpack(f">{(len(tag) - 12) // 4}i", tag[12:]))
    if kind == 0:
        return lambda x: x**g
    assert kind == 3
    a, b, c, d = rest[:4]
    return lambda x: np.where(x >= d, (a * x + b) ** g, c * x)


def profile_of(tags, space=b"RGB ", device=b"mntr", pcs=b"XYZ ", version=0x02100000):
    """A profile of {name: bytes}."""
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    head = struct.pack(">4xI4s4s4s", version, device, space, pcs)
    head = (struct.pack(">I", start + len(body)) + head + bytes(12) + b"acsp").ljust(68, b"\0")
    head = (head + xyz(D50)[8:]).ljust(128, b"\0")
    return head + struct.pack(">I", len(tags)) + table + body


def xyz(values):
    return struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in values))


def gamma(exponent):
    return struct.pack(">4s4xIH", b"curv", 1, round(exponent * 256))


def rgb_profile(rows, exponent, **more):
    """A profile of XYZ of the primaries and one exponent."""
    colours = {name: xyz(row) for name, row in zip((b"rXYZ", b"gXYZ", b"bXYZ"), rows, strict=True)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(exponent))
    others = {name.encode(): tag for name, tag in more.items()}
    return profile_of({**colours, b"wtpt": xyz(D50), **curves, **others})


def grey_profile(exponent):
    return profile_of({b"wtpt": xyz(D50), b"kTRC": gamma(exponent)}, space=b"GRAY")


def cmyk_profile():
    """A profile whose inks darken: L* is 100 · (1 - K) times the share of the lightest ink.

    A lookup table of two steps an ink, so that between them it is linear in each ink.
    """
    corners = []
    for corner in np.ndindex(2, 2, 2, 2):
        *colours, black = corner
        # Neutral, so that only L* counts: a third less for each ink.
        corners.append([round(255 * (1 - black) * (3 - sum(colours)) / 3), 128, 128])
    ramp = bytes(range(256))
    identity = [1 << 16 if row == column else 0 for row in range(3) for column in range(3)]
    lut = struct.pack(">4s4x4B9i", b"mft1", 4, 3, 2, 0, *identity)
    lut += ramp * 4 + bytes(np.array(corners, np.uint8).reshape(-1)) + ramp * 3
    return profile_of({b"A2B0": lut, b"wtpt": xyz(D50)}, space=b"CMYK", device=b"prtr", pcs=b"Lab ")


def grey_of_lightness(lightness):
    """Level in 0..255 of a neutral colour of L* in 0..100, in sRGB."""
    f = (np.asarray(lightness, float) + 16) / 116
    light = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return encoded(light)
