"""Converts colours to sRGB, by what a file says that its numbers mean.

The first of these that an image has, and that can be used, decides:

1. code points: the cICP chunk of a PNG file;
2. an ICC profile;
3. the sRGB chunk of a PNG file: its numbers are sRGB's;
4. its gAMA and cHRM chunks; of one without the other, sRGB's primaries or curve are taken. A gAMA
   within 5 % of 1/2.2, libpng's own tolerance, stands for sRGB's curve, as the PNG specification
   tells writers to use it;
5. code points of an AVIF file (nclx), or those that `pillow-heif` reports.

An image with none of them is taken for sRGB. So is one whose profile cannot be used: it is cut,
larger than `MAX_PROFILE_BYTES`, of no device, or for another kind of colours than the image has. A
grey image may have a grey or an RGB profile, an RGB image or a palette an RGB one, CMYK a CMYK one;
LAB needs none. `Conversion.broken` tells.

The intent is perceptual, with black point compensation: a profile's black becomes black. PQ and
HLG, told by code points or by those in a profile, have no place in 8 bits of sRGB: such an image is
refused. What Pillow does not report is not seen: profiles in GIF, JPEG 2000 and BMP files, colours
that only EXIF names, and high dynamic range that only the video stream of an AVIF file tells.

A profile of a matrix and curves costs 10 ms the first time, then 20 ns a pixel; one that moves no
colour by more than a level is left out. Without a profile it takes some microseconds an image.

Source: PNG, third edition, 4.3 and 11.3.2; ICC.1:2022; ITU-T H.273.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from packpipe.images.modes import laid_on

MAX_PROFILE_BYTES = 4 * 2**20  # the largest in use have 3 MB
_KEPT = 32  # profiles whose conversions are kept
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_DEVICES = ("scnr", "mntr", "prtr", "spac")
_MODES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}  # of pixels in each space of a profile
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)

# Curves as ICC writes them: an exponent g, or (g, a, b, c, d) of (a·x + b)**g from d on, c·x below.
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
# By H.273's numbers. 2 says nothing, and those that are not listed have no rule here. The curves of
# video (1, 6, 14, 15) are those of a camera, not of a screen; browsers show them by sRGB's.
_CURVES: dict[int, tuple[float, ...]] = {
    **dict.fromkeys((1, 6, 13, 14, 15), _SRGB_CURVE),
    4: (2.2,),
    5: (2.8,),
    8: (1.0,),
}
_HIGH_DYNAMIC_RANGE = {16: "PQ", 18: "HLG"}
_UNSAID = 2
_D65 = (0.3127, 0.3290)
_SRGB_PRIMARIES = (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
# White, red, green and blue as (x, y), as a cHRM chunk has them.
_PRIMARIES = {
    1: _SRGB_PRIMARIES,
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}


class HighDynamicRange(ValueError):
    """Raised for an image whose levels mean light beyond the range of sRGB."""


class Conversion(NamedTuple):
    """How the colours of an image become sRGB.

    Attributes:
        transform: converts pixels of its ``input_mode``; None if they are sRGB as they are.
        broken: whether the image has a profile that could not be used.
    """

    transform: ImageCms.ImageCmsTransform | None
    broken: bool


def conversion_of(image: Image.Image, *, of_file: bool) -> Conversion:
    """Return how an image's colours become sRGB; none of its pixels is decoded.

    Args:
        image: opened, and not loaded yet if it is of a file.
        of_file: whether its file may be read; it is left at the same place.

    Raises:
        HighDynamicRange: the image is one of PQ or HLG.
    """
    if image.mode == "LAB":  # the mode itself says what its numbers mean
        return Conversion(None, False)
    return conversion_by(_profiles(image, of_file), image.mode)


def conversion_by(profiles: Iterable[bytes | None], mode: str) -> Conversion:
    """Return how colours of a mode become sRGB by the first of some ICC profiles that can be used.

    Args:
        profiles: by rank; None for a broken one.
        mode: of the pixels.

    Raises:
        HighDynamicRange: a profile is one of PQ or HLG.
    """
    broken = False
    for profile in profiles:
        found = None
        if profile is not None and len(profile) <= MAX_PROFILE_BYTES:
            found = _transform(profile, _spaces(mode))
        if found is not None:
            return Conversion(found.transform, broken)
        broken = True
    return Conversion(None, broken)


def to_srgb(
    pixels: Image.Image, transform: ImageCms.ImageCmsTransform, background: tuple[int, int, int]
) -> Image.Image:
    """Return pixels as RGB in sRGB, transparent ones laid on the background, which is sRGB too.

    Args:
        pixels: in mode L, RGB, RGBA or CMYK.
        transform: of their `Conversion`.
        background: (red, green, blue).
    """
    mode = transform.input_mode
    rgb = transform.apply(pixels if pixels.mode == mode else pixels.convert(mode))
    if pixels.mode != "RGBA":
        return rgb
    rgb.putalpha(pixels.getchannel("A"))
    return laid_on(background, rgb)


def _profiles(image: Image.Image, of_file: bool) -> Iterator[bytes | None]:
    """Yield what an image says of its colours as ICC profiles, by rank; None for a broken one."""
    info = image.info
    file: Any = getattr(image, "fp", None) if of_file else None
    if image.format == "PNG" and file is not None:
        cicp = _cicp(file)
        if cicp is not None:
            primaries, transfer, _, full_range = cicp.ljust(4, b"\0")[:4]
            yield from _coded(primaries, transfer, full_range=full_range == 1)
    if "icc_profile" in info:  # None if its parts do not fit together
        profile = info["icc_profile"]
        yield profile if isinstance(profile, bytes) else None
    if "srgb" in info:
        yield _matrix_profile(_SRGB_PRIMARIES, _SRGB_CURVE)
    if "gamma" in info or "chromaticity" in info:
        yield _profile_of_chunks(info.get("gamma"), info.get("chromaticity"))
    if image.format == "AVIF" and file is not None:
        yield from _coded(*_nclx(file))
    reported = info.get("nclx_profile")
    if isinstance(reported, dict):
        names = ("color_primaries", "transfer_characteristics")
        yield from _coded(*(reported.get(name, _UNSAID) for name in names))


def _coded(primaries: Any, transfer: Any, *, full_range: bool = True) -> Iterator[bytes | None]:
    """Yield the profile of two code points, None if they have no rule; nothing if unspecified.

    Args:
        primaries: number of H.273.
        transfer: number of H.273.
        full_range: whether colours use all levels; of the range of video there is no rule.
    """
    _refuse_high_dynamic_range(transfer)
    if _UNSAID in (primaries, transfer):
        return
    known = full_range and primaries in _PRIMARIES and transfer in _CURVES
    yield _matrix_profile(_PRIMARIES[primaries], _CURVES[transfer]) if known else None


def _refuse_high_dynamic_range(transfer: Any) -> None:
    name = _HIGH_DYNAMIC_RANGE.get(transfer)
    if name is not None:
        raise HighDynamicRange(
            f"the transfer is {name}, expected a standard dynamic range; "
            "profiles='ignore' takes its numbers for sRGB's"
        )


def _cicp(file: Any) -> bytes | None:
    """Return what the cICP chunk of a PNG file holds, None if there is none before its pixels."""
    place = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == b"IDAT":
                break
            if name == b"cICP":
                found: bytes = file.read(min(length, 4))
                return found
            file.seek(length + 4, os.SEEK_CUR)
        return None
    finally:
        file.seek(place)


def _nclx(file: Any) -> tuple[int, int]:
    """Return primaries and transfer of an AVIF file, as far as its header tells."""
    place = file.tell()
    try:
        file.seek(0)
        head = file.read(2**14).partition(b"mdat")[0]
        points = head.partition(b"colrnclx")[2][:4]
        primaries, transfer = struct.unpack(">HH", points.ljust(4, b"\0"))
        return primaries or _UNSAID, transfer or _UNSAID
    finally:
        file.seek(place)


def _profile_of_chunks(gamma: Any, chromaticity: Any) -> bytes | None:
    """Return the profile of gAMA and cHRM, either of which may be None; None if one is broken."""
    curve: tuple[float, ...] = _SRGB_CURVE
    if gamma is not None and not 0.95 <= gamma * 2.2 <= 1.05:
        if not 0.1 <= gamma <= 10:
            return None
        curve = (1 / gamma,)
    primaries = _SRGB_PRIMARIES if chromaticity is None else chromaticity
    return _matrix_profile(tuple(primaries), curve) if len(primaries) == 8 else None


@lru_cache(_KEPT)
def _matrix_profile(primaries: tuple[float, ...], curve: tuple[float, ...]) -> bytes | None:
    """Return an ICC profile of RGB, None if the primaries span no colours.

    Args:
        primaries: x and y of white, red, green and blue.
        curve: parameters of all channels.
    """
    try:
        colorants = _colorants(np.array(primaries).reshape(4, 2)).T
        xyz = [struct.pack(">4s4x3i", b"XYZ ", *_fixed(one)) for one in (*colorants, _D50)]
    except (ValueError, ArithmeticError, np.linalg.LinAlgError, struct.error):
        return None
    kind = 0 if len(curve) == 1 else 3
    para = struct.pack(f">4s4xHH{len(curve)}i", b"para", kind, 0, *_fixed(np.array(curve)))
    names = [b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt", b"rTRC", b"gTRC", b"bTRC"]
    start, table = 128 + 4 + 12 * len(names), b""
    for place, name in enumerate(names):  # the curve once, for all three channels
        at, size = start + 20 * min(place, 4), len(para) if place > 3 else 20
        table += struct.pack(">4sII", name, at, size)
    body = struct.pack(">I", len(names)) + table + b"".join(xyz) + para
    header = struct.pack(
        ">I4xI4s4s4s6H4s28x3i48x",
        *(128 + len(body), 0x04300000, b"mntr", b"RGB ", b"XYZ ", 2000, 1, 1, 0, 0, 0, b"acsp"),
        *_fixed(_D50),
    )
    return header + body


def _colorants(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return float[3, 3], XYZ of red, green and blue in columns, adapted to the white of ICC."""
    x, y = points.T
    if not ((y > 0) & (x >= 0) & (x + y <= 1)).all():
        raise ValueError("no colour is there")
    white, *colours = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
    mixed = np.array(colours).T
    shares = np.linalg.solve(mixed, white)
    if not (shares > 0).all():
        raise ValueError("white lies outside of the primaries")
    scale = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    adapted: NDArray[np.float64] = np.linalg.inv(_BRADFORD) @ (scale[:, None] * _BRADFORD) @ mixed
    return adapted * shares


def _fixed(values: NDArray[np.float64]) -> list[int]:
    """Return numbers as ICC writes them, in units of 1/65536."""
    return [int(value) for value in np.rint(values * 65536)]


def _spaces(mode: str) -> tuple[str, ...]:
    """Return the spaces of profiles that fit an image of a mode."""
    if mode == "CMYK":
        return ("CMYK",)
    is_grey = mode.startswith(("1", "L", "I", "F"))
    return ("GRAY", "RGB ") if is_grey else ("RGB ",)


@lru_cache(_KEPT)
def _transform(profile: bytes, spaces: tuple[str, ...]) -> Conversion | None:
    """Return the conversion of a profile; None if it cannot be used.

    Raises:
        HighDynamicRange: it is one of PQ or HLG.
    """
    _refuse_high_dynamic_range(_transfer_of(profile))
    try:
        opened = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = opened.profile.xcolor_space
        if space not in spaces or opened.profile.device_class not in _DEVICES:
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        found = ImageCms.ImageCmsTransform(opened, srgb, _MODES[space], "RGB", flags=_FLAGS)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
    return Conversion(None if _keeps(found) else found, False)


def _transfer_of(profile: bytes) -> int | None:
    """Return the transfer that a profile's cicp tag names; None without one."""
    try:
        (number,) = struct.unpack_from(">I", profile, 128)
        for tag in range(min(number, 100)):
            name, at = struct.unpack_from(">4sI", profile, 132 + 12 * tag)
            if name == b"cicp":
                transfer: int = profile[at + 9]
                return transfer
    except (struct.error, IndexError):  # cut short
        pass
    return None


def _keeps(transform: ImageCms.ImageCmsTransform) -> bool:
    """Return whether a transform moves no colour by more than a level, and few by one."""
    mode = transform.input_mode
    if mode == "CMYK":
        return False
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    steps = np.rint(np.linspace(0, 255, 17)).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    some = greys if mode == "L" else np.concatenate([greys, colours])
    image = Image.fromarray(some[None]).convert(mode)
    apart = np.abs(np.asarray(transform.apply(image))[0].astype(int) - some)
    return bool(apart.max() <= 1 and apart.mean() < 0.25)
