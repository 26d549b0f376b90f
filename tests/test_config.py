from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from packpipe.config import MAX_PIXELS, PackConfig, PackOptions, config_from

FIELDS = [field.name for field in fields(PackConfig)]
COLOUR = "white is (255, 255, 255)"

BAD = [
    (
        {"seq_len": 0},
        ValueError,
        (
            "seq_len is 0, expected an integer in 1..32767; "
            "coordinates are int16, so choose a shorter pack"
        ),
    ),
    (
        {"seq_len": 32768},
        ValueError,
        (
            "seq_len is 32768, expected an integer in 1..32767; "
            "coordinates are int16, so choose a shorter pack"
        ),
    ),
    (
        {"seq_len": 1024.0},
        TypeError,
        (
            "seq_len is 1024.0, expected an integer in 1..32767; "
            "coordinates are int16, so choose a shorter pack"
        ),
    ),
    (
        {"seq_len": True},
        TypeError,
        (
            "seq_len is True, expected an integer in 1..32767; "
            "coordinates are int16, so choose a shorter pack"
        ),
    ),
    (
        {"patch_size": 0},
        ValueError,
        "patch_size is 0, expected an integer in 1..128; patches of 8 to 32 pixels are usual",
    ),
    (
        {"patch_size": 129},
        ValueError,
        "patch_size is 129, expected an integer in 1..128; patches of 8 to 32 pixels are usual",
    ),
    (
        {"patch_size": "16"},
        TypeError,
        "patch_size is '16', expected an integer in 1..128; patches of 8 to 32 pixels are usual",
    ),
    (
        {"resolution": "naflex"},
        ValueError,
        "resolution is 'naflex', expected one of 'native', 'budget'; choose how images are sized",
    ),
    (
        {"resolution": None},
        ValueError,
        "resolution is None, expected one of 'native', 'budget'; choose how images are sized",
    ),
    (
        {"seq_len": 64, "max_tokens": 65},
        ValueError,
        (
            "max_tokens is 65, expected an integer in 1..64; "
            "an image must fit into a pack, so raise seq_len or lower max_tokens"
        ),
    ),
    (
        {"seq_len": 64, "max_tokens": 0},
        ValueError,
        (
            "max_tokens is 0, expected an integer in 1..64; "
            "an image must fit into a pack, so raise seq_len or lower max_tokens"
        ),
    ),
    (
        {"max_segments": 0},
        ValueError,
        (
            f"max_segments is 0, expected an integer in 1..{2**31 - 1}; "
            "a pack must be allowed to hold an image"
        ),
    ),
    (
        {"max_segments": None},
        TypeError,
        (
            f"max_segments is None, expected an integer in 1..{2**31 - 1}; "
            "a pack must be allowed to hold an image"
        ),
    ),
    (
        {"strategy": "optimal"},
        ValueError,
        (
            "strategy is 'optimal', expected one of 'ffd', 'bfd', 'spfhp', 'balanced', 'next_fit', "
            "'first_fit', 'best_fit'; choose a packing rule"
        ),
    ),
    (
        {"window": 0},
        ValueError,
        f"window is 0, expected an integer in 1..{2**62}; 1024 or more keeps padding low",
    ),
    (
        {"background": "white"},
        ValueError,
        f"background is 'white', expected (red, green, blue) in 0..255; {COLOUR}",
    ),
    (
        {"background": 255},
        ValueError,
        f"background is 255, expected (red, green, blue) in 0..255; {COLOUR}",
    ),
    (
        {"background": (0, 0)},
        ValueError,
        f"background is (0, 0), expected (red, green, blue) in 0..255; {COLOUR}",
    ),
    (
        {"background": (256, 0, 0)},
        ValueError,
        f"background[0] is 256, expected an integer in 0..255; {COLOUR}",
    ),
    (
        {"background": (0, -1, 0)},
        ValueError,
        f"background[1] is -1, expected an integer in 0..255; {COLOUR}",
    ),
    (
        {"background": (0, 0, 0.5)},
        TypeError,
        f"background[2] is 0.5, expected an integer in 0..255; {COLOUR}",
    ),
    (
        {"max_pixels": 0},
        ValueError,
        f"max_pixels is 0, expected an integer in 1..{MAX_PIXELS}; Pillow opens no larger image",
    ),
    (
        {"max_pixels": MAX_PIXELS + 1},
        ValueError,
        (
            f"max_pixels is {MAX_PIXELS + 1}, expected an integer in 1..{MAX_PIXELS}; "
            "Pillow opens no larger image"
        ),
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_a_bad_option_is_named(options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        PackConfig(**options)


def test_every_field_has_a_bad_value_here():
    assert {name for options, _, _ in BAD for name in options} == set(FIELDS)


def test_pack_options_are_the_fields_besides_seq_len():
    assert list(PackOptions.__annotations__) == [name for name in FIELDS if name != "seq_len"]
    assert PackOptions.__total__ is False


def test_an_unknown_option_is_refused():
    message = (
        "option is 'patchsize', expected one of seq_len, patch_size, resolution, max_tokens, "
        "max_segments, strategy, window, background, max_pixels; check its spelling"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        config_from(64, {"patch_size": 8, "patchsize": 8})


def test_options_reach_the_configuration():
    found = config_from(64, {"patch_size": 8, "background": [1, 2, 3]})
    assert found == PackConfig(seq_len=64, patch_size=8, background=(1, 2, 3))
    assert found != PackConfig(seq_len=64, patch_size=8)


def test_numpy_values_become_plain_ones():
    found = PackConfig(
        seq_len=np.int64(64),
        patch_size=np.uint8(8),
        max_tokens=np.int16(32),
        background=np.array([1, 2, 3], np.uint8),
    )
    assert found == PackConfig(seq_len=64, patch_size=8, max_tokens=32, background=(1, 2, 3))
    assert {type(value) for value in (found.seq_len, found.patch_size, *found.background)} == {int}
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_derived_figures():
    found = PackConfig(seq_len=100, patch_size=4, max_tokens=30)
    assert found.token_limit == 30
    assert PackConfig(seq_len=100).token_limit == 100
    assert found.patch_bytes == 48
    assert found.row_bytes == 4800


def test_every_field_is_written_and_read_back():
    config = PackConfig(seq_len=100, background=(1, 2, 3), max_tokens=7, strategy="next_fit")
    assert list(config.to_dict()) == FIELDS
    assert PackConfig(**config.to_dict()) == config


def test_a_configuration_is_frozen_and_hashable():
    config = PackConfig(background=[0, 0, 0])
    assert hash(config) == hash(PackConfig(background=(0, 0, 0)))
    with pytest.raises(FrozenInstanceError):
        config.seq_len = 3


def test_options_are_passed_by_name():
    with pytest.raises(TypeError, match="positional"):
        PackConfig(1024)
