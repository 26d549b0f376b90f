from __future__ import annotations

import json
import math
import re
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import strategies
from hypothesis import given

from packpipe.planning.crops import CenterCrop, Crop, FixedCrop
from packpipe.planning.distributions import Beta, Choice, Constant, TruncatedNormal, Uniform
from packpipe.planning.dropping import ByResolution, OverTraining
from packpipe.planning.image_config import PackConfig, config_from
from packpipe.planning.image_options import MAX_IMAGE_SEQ_LEN, MOST_PIXELS, PackOptions
from packpipe.planning.resolution import Area, Budget, PixelRange, Side, Square

FIELDS = [field.name for field in fields(PackConfig)]
COLOUR = "white is (255, 255, 255)"
LAWS = (
    "expected one of 'native', 'budget'; or pass Side(...), Area(...), Budget(...), Square(...) or "
    "PixelRange(...)"
)
RATES = "expected rates in [0, 1); it is the share that is dropped, and one token has to stay"
SCALE = "1.0 is the size, or the share, itself"
FALLING = OverTraining(0.2, 0.8, 2 / 3, -0.2)

BAD = [
    (
        {"seq_len": 0},
        ValueError,
        (
            "seq_len is 0, expected an integer in 1..32767; "
            "coordinates are int16, so choose a shorter row"
        ),
    ),
    (
        {"seq_len": 32768},
        ValueError,
        (
            "seq_len is 32768, expected an integer in 1..32767; "
            "coordinates are int16, so choose a shorter row"
        ),
    ),
    (
        {"seq_len": 1024.0},
        TypeError,
        (
            "seq_len is 1024.0, expected an integer in 1..32767; "
            "coordinates are int16, so choose a shorter row"
        ),
    ),
    (
        {"seq_len": True},
        TypeError,
        (
            "seq_len is True, expected an integer in 1..32767; "
            "coordinates are int16, so choose a shorter row"
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
        {"crop": (0, 0, 8, 8)},
        TypeError,
        (
            "crop is (0, 0, 8, 8), expected None or a crop; "
            "pass Crop(...), CenterCrop(...) or FixedCrop(...)"
        ),
    ),
    (
        {"resolution": "naflex"},
        ValueError,
        f"resolution is 'naflex', {LAWS}",
    ),
    (
        {"resolution": None},
        ValueError,
        f"resolution is None, {LAWS}",
    ),
    (
        {"resolution": Uniform(64, 256)},
        ValueError,
        f"resolution is Uniform(low=64, high=256), {LAWS}",
    ),
    (
        {"views": 0},
        ValueError,
        "views is 0, expected an integer in 1..65536; 1 is one segment an image",
    ),
    (
        {"views": "2"},
        TypeError,
        "views is '2', expected an integer in 1..65536; 1 is one segment an image",
    ),
    (
        {"views_together": 1},
        TypeError,
        "views_together is 1, expected True or False; pass a bool",
    ),
    (
        {"views_together": True},
        ValueError,
        "views_together is True, expected False with one view; pass views=2",
    ),
    (
        {"views": 3, "views_together": True},
        ValueError,
        (
            "max_tokens is None, expected at most 341 (seq_len ÷ 3 views), for views_together; "
            "lower it, or raise seq_len"
        ),
    ),
    (
        {"views": 3, "views_together": True, "max_tokens": 342},
        ValueError,
        (
            "max_tokens is 342, expected at most 341 (seq_len ÷ 3 views), for views_together; "
            "lower it, or raise seq_len"
        ),
    ),
    (
        {"views": 3, "views_together": True, "max_tokens": 341, "max_segments": 2},
        ValueError,
        (
            "max_segments is 2, expected at least 3 (views), for views_together; "
            "a row holds all views of an image"
        ),
    ),
    ({"max_upscale": 0}, ValueError, f"max_upscale is 0, expected a number above 0; {SCALE}"),
    (
        {"max_upscale": -0.5},
        ValueError,
        f"max_upscale is -0.5, expected a number above 0; {SCALE}",
    ),
    ({"max_upscale": "2"}, TypeError, f"max_upscale is '2', expected a number; {SCALE}"),
    (
        {"max_upscale": float("inf")},
        ValueError,
        f"max_upscale is inf, expected a finite number; {SCALE}",
    ),
    (
        {"max_upscale": 1.5, "resolution": PixelRange()},
        ValueError,
        "max_upscale is 1.5, expected None, for PixelRange; min_pixels says what is enlarged",
    ),
    (
        {"fit_last": "resolution", "resolution": PixelRange()},
        ValueError,
        (
            "fit_last is 'resolution', expected None or 'drop_rate', for PixelRange; sizes are "
            "the law's"
        ),
    ),
    (
        {"max_tokens": 8, "resolution": PixelRange(grid_multiple=3)},
        ValueError,
        "max_tokens is 8, expected at least 9 (grid_multiple²); an image has a block",
    ),
    (
        {"seq_len": 3, "resolution": PixelRange()},
        ValueError,
        "seq_len is 3, expected at least 4 (grid_multiple²); an image has a block",
    ),
    (
        {"seq_len": 5, "prefix_tokens": 2, "drop_rate": 0.1, "resolution": PixelRange()},
        ValueError,
        (
            "seq_len, less prefix_tokens is 3, expected at least 4 (grid_multiple²); an image has "
            "a block"
        ),
    ),
    (
        {"max_upscale": 1.5, "resolution": Square(224)},
        ValueError,
        (
            "max_upscale is 1.5, expected None, for Square; "
            "a square is as large whatever the image, so leave it out or use Side"
        ),
    ),
    ({"drop_rate": 1}, ValueError, f"drop_rate is 1, {RATES}"),
    ({"drop_rate": -0.5}, ValueError, f"drop_rate is -0.5, {RATES}"),
    ({"drop_rate": Uniform(0, 1)}, ValueError, f"drop_rate is Uniform(low=0, high=1), {RATES}"),
    (
        {"drop_rate": None},
        TypeError,
        ("drop_rate is None, expected a number; or pass a distribution, such as Uniform(64, 256)"),
    ),
    (
        {"drop_rate": True},
        TypeError,
        ("drop_rate is True, expected a number; or pass a distribution, such as Uniform(64, 256)"),
    ),
    ({"epochs": 0}, ValueError, f"epochs is 0, expected a number above 0; {SCALE}"),
    ({"epochs": [3]}, TypeError, f"epochs is [3], expected a number; {SCALE}"),
    (
        {"drop_rate": FALLING, "epochs": None},
        ValueError,
        (
            "epochs is None, expected a number, for OverTraining; "
            "pass the number of epochs of the training"
        ),
    ),
    (
        {"fit_last": "size"},
        ValueError,
        "fit_last is 'size', expected one of 'drop_rate', 'resolution'; or None for padding",
    ),
    (
        {"fit_last": True},
        ValueError,
        "fit_last is True, expected one of 'drop_rate', 'resolution'; or None for padding",
    ),
    ({"fit_limit": 0.0}, ValueError, f"fit_limit is 0.0, expected a number above 0; {SCALE}"),
    ({"fit_limit": None}, TypeError, f"fit_limit is None, expected a number; {SCALE}"),
    (
        {"fit_limit": float("nan")},
        ValueError,
        f"fit_limit is nan, expected a finite number; {SCALE}",
    ),
    (
        {"drop_rate": 0.5, "max_tokens": 32768},
        ValueError,
        (
            "max_tokens is 32768, expected an integer in 1..32767; "
            "an image must fit into a row, so raise seq_len or lower max_tokens"
        ),
    ),
    (
        {"seq_len": 64, "max_tokens": 65},
        ValueError,
        (
            "max_tokens is 65, expected an integer in 1..64; "
            "an image must fit into a row, so raise seq_len or lower max_tokens"
        ),
    ),
    (
        {"seq_len": 64, "max_tokens": 0},
        ValueError,
        (
            "max_tokens is 0, expected an integer in 1..64; "
            "an image must fit into a row, so raise seq_len or lower max_tokens"
        ),
    ),
    (
        {"max_segments": 0},
        ValueError,
        (
            f"max_segments is 0, expected an integer in 1..{2**31 - 1}; "
            "a row must be allowed to hold an image"
        ),
    ),
    (
        {"max_segments": None},
        TypeError,
        (
            f"max_segments is None, expected an integer in 1..{2**31 - 1}; "
            "a row must be allowed to hold an image"
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
        {"reducing_gap": 0.5},
        ValueError,
        "reducing_gap is 0.5, expected 1.0 or more; None decodes in full and resizes in one step",
    ),
    (
        {"reducing_gap": "2"},
        TypeError,
        "reducing_gap is '2', expected a number; None decodes in full and resizes in one step",
    ),
    *(
        (
            {name: "cubic"},
            ValueError,
            (
                f"{name} is 'cubic', expected one of 'bicubic', 'lanczos', 'hamming', 'bilinear', "
                "'box', 'nearest'; choose a resampling filter"
            ),
        )
        for name in ("downscale_filter", "upscale_filter")
    ),
    (
        {"damaged_scans": "mend"},
        ValueError,
        (
            "damaged_scans is 'mend', expected one of 'reject', 'strict', 'keep'; "
            "choose what becomes of them"
        ),
    ),
    (
        {"max_pixels": 0},
        ValueError,
        f"max_pixels is 0, expected an integer in 1..{MOST_PIXELS}; a JPEG has no more pixels",
    ),
    (
        {"max_pixels": MOST_PIXELS + 1},
        ValueError,
        (
            f"max_pixels is {MOST_PIXELS + 1}, expected an integer in 1..{MOST_PIXELS}; "
            "a JPEG has no more pixels"
        ),
    ),
    (
        {"prefix_tokens": 1024},
        ValueError,
        "prefix_tokens is 1024, expected an integer in 0..1023; an image needs a token of its own",
    ),
    (
        {"prefix_tokens": 5, "max_tokens": 1020},
        ValueError,
        (
            "max_tokens is 1020, expected an integer in 1..1019; an image must fit into a row, so "
            "raise seq_len or lower max_tokens"
        ),
    ),
    (
        {"prefix_tokens": 5, "max_tokens": 508, "views": 2, "views_together": True},
        ValueError,
        (
            "max_tokens is 508, expected at most 507 (seq_len ÷ 2 views, less prefix_tokens), for "
            "views_together; lower it, or raise seq_len"
        ),
    ),
    (
        {"jpeg_edges": "soft"},
        ValueError,
        "jpeg_edges is 'soft', expected one of 'clean', 'padded'; choose what becomes of them",
    ),
    (
        {"pixels": "opencv"},
        ValueError,
        "pixels is 'opencv', expected one of 'pillow', 'turbo'; choose what decodes and resizes",
    ),
    (
        {"profiles": "icc"},
        ValueError,
        "profiles is 'icc', expected one of 'srgb', 'ignore'; choose what colour profiles do",
    ),
    *(
        (
            {"value_range": value},
            ValueError,
            (
                f"value_range is {value!r}, expected (low, high), low below high, both finite; "
                "values of low become black, of high white"
            ),
        )
        for value in (
            *(1, (0,), (0, 1, 2), "01", (0, "1"), (1, 1), (2, 1)),
            *((0, math.inf), (math.nan, 1), (-1.7e308, 1.7e308)),
        )
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
        "option is 'patchsize', expected one of seq_len, patch_size, crop, resolution, max_tokens, "
        "max_upscale, drop_rate, epochs, fit_last, fit_limit, max_segments, strategy, window, "
        "background, reducing_gap, downscale_filter, upscale_filter, max_pixels, profiles, "
        "damaged_scans, value_range, views, views_together, jpeg_edges, "
        "prefix_tokens, pixels; check its spelling"
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


@pytest.mark.parametrize("options", [{"drop_rate": np.float32(0.25)}, {"drop_rate": [0.25, 0.5]}])
def test_a_drop_rate_becomes_plain_and_hashable(options):
    found = PackConfig(**options)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert hash(found) == hash(PackConfig.from_dict(found.to_dict()))


def test_derived_figures():
    found = PackConfig(seq_len=100, patch_size=4, max_tokens=30)
    assert found.token_limit == 30
    assert PackConfig(seq_len=100).token_limit == 100
    assert PackConfig(seq_len=100, drop_rate=0.5).token_limit == MAX_IMAGE_SEQ_LEN == 32767
    assert PackConfig(seq_len=100, drop_rate=0.5, max_tokens=300).token_limit == 300
    assert found.patch_bytes == 48
    assert found.row_bytes == 4800


@pytest.mark.parametrize(
    ("options", "drops", "draws", "uses_progress"),
    [
        ({}, False, False, False),
        ({"resolution": "budget", "fit_last": "resolution"}, False, False, False),
        ({"drop_rate": 0}, False, False, False),
        ({"drop_rate": 0.5}, True, True, False),
        ({"drop_rate": Uniform(0, 0.5)}, True, True, False),
        ({"resolution": Side(224)}, False, True, False),
        ({"resolution": PixelRange()}, False, False, False),
        ({"resolution": Budget([64, 256])}, False, True, False),
        ({"resolution": Square(224), "fit_last": "resolution"}, False, True, False),
        ({"drop_rate": FALLING, "epochs": 3}, True, True, True),
        ({"epochs": 3}, False, False, False),
    ],
)
def test_a_configuration_knows_what_its_decisions_depend_on(options, drops, draws, uses_progress):
    found = PackConfig(**options)
    assert (found.drops, found.draws, found.uses_progress) == (drops, draws, uses_progress)


def test_every_field_is_written_and_read_back():
    config = PackConfig(
        seq_len=100,
        crop=Crop(),
        background=(1, 2, 3),
        max_tokens=7,
        strategy="next_fit",
        views=2,
        views_together=True,
        value_range=(0, 1),
        prefix_tokens=5,
        pixels="turbo",
    )
    assert list(config.to_dict()) == FIELDS
    assert PackConfig.from_dict(config.to_dict()) == config


def read_back(config):
    """The configuration from the JSON text of its options."""
    return PackConfig.from_dict(json.loads(json.dumps(config.to_dict())))


EVERY_RESOLUTION = [
    "native",
    "budget",
    Side(224),
    Side(Uniform(64, 256), "floor"),
    Side(TruncatedNormal(144, 160, 64, 384)),
    Area(Choice((4096, 65536), (1, 2.5)), "ceil"),
    Area(Constant(50176.5)),
    Budget([128, 256, 576]),
    Square(224),
    Square(Choice((160, 224)), "floor"),
    PixelRange(),
    PixelRange(100, 5000, 4),
]
EVERY_CROP = [
    None,
    Crop(),
    Crop(0.5, (1, 1), "square"),
    Crop(TruncatedNormal(0.6, 0.2, 0.1, 1), (0.5, 2)),
    CenterCrop(),
    CenterCrop(0.5, "square"),
    FixedCrop(0, 0.25, 1, 0.5),
]
EVERY_DROP_RATE = [
    0.0,
    0.5,
    Uniform(0.1, 0.6),
    TruncatedNormal(0.5, 0.1, 0.2, 0.8),
    Beta(0.25, 0.7),
    Choice((0.1, 0.5)),
    ByResolution(16, 0.25, 576, 0.75),
    FALLING,
    OverTraining(Beta(0.1, 0.7), ByResolution(16, 0.25, 576, 0.75, 0), 0.5, 0.1),
    OverTraining(Choice((0.1, 0.2), (1, 3)), Uniform(0.5, 0.9), 0.5, 0.1),
]


@pytest.mark.parametrize(
    "options",
    [{"resolution": law} for law in EVERY_RESOLUTION]
    + [{"crop": law} for law in EVERY_CROP]
    + [{"drop_rate": law, "epochs": 2.5} for law in EVERY_DROP_RATE]
    + [{"max_upscale": 1.5, "fit_last": "resolution", "fit_limit": 2, "background": (1, 2, 3)}],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_every_law_survives_json(options):
    config = PackConfig(**options)
    again = read_back(config)
    assert again == config
    assert hash(again) == hash(config)
    assert repr(again) == repr(config)
    for name in options:
        assert type(getattr(again, name)) is type(getattr(config, name))
        assert getattr(config, name) == options[name]


@given(strategies.configs())
def test_every_configuration_survives_json(config):
    assert read_back(config) == config
    assert repr(read_back(config)) == repr(config)


def test_a_law_is_written_as_its_name_and_attributes():
    config = PackConfig(
        resolution=Side(Uniform(64, 256)), drop_rate=ByResolution(16, 0.25, 576, 0.75)
    )
    found = config.to_dict()
    assert found["resolution"] == {
        "Side": {"pixels": {"Uniform": {"low": 64, "high": 256}}, "rounding": "nearest"}
    }
    assert found["drop_rate"] == {
        "ByResolution": {
            "min_tokens": 16,
            "min_rate": 0.25,
            "max_tokens": 576,
            "max_rate": 0.75,
            "deviation": 0.02,
        }
    }
    assert found["background"] == [255, 255, 255]


def test_a_configuration_is_frozen_and_hashable():
    config = PackConfig(background=[0, 0, 0])
    assert hash(config) == hash(PackConfig(background=(0, 0, 0)))
    with pytest.raises(FrozenInstanceError):
        config.seq_len = 3


def test_what_was_described_before_profiles_were_an_option_ignores_them():
    config = PackConfig(seq_len=64, profiles="ignore")
    assert "profiles" not in config.to_dict()
    assert "profiles" not in repr(config)
    assert PackConfig.from_dict(config.to_dict()) == config != PackConfig(seq_len=64)
    assert PackConfig(seq_len=64).to_dict()["profiles"] == "srgb"
    assert repr(PackConfig(seq_len=64)).endswith("damaged_scans='reject', jpeg_edges='clean')")


def test_without_a_crop_a_configuration_is_told_as_before_there_were_any():
    assert "crop" not in PackConfig().to_dict()
    assert "crop" not in repr(PackConfig())
    assert PackConfig.from_dict(PackConfig().to_dict()).crop is None
    cropped = PackConfig(crop=CenterCrop())
    assert cropped.to_dict()["crop"] == {"CenterCrop": {"area": 0.765625, "shape": "image"}}
    assert "crop=CenterCrop(area=0.765625, shape='image'), resolution=" in repr(cropped)


def test_with_one_view_a_configuration_is_told_as_before_there_were_several():
    one = PackConfig(views=1, views_together=False)
    assert "view" not in f"{one!r} {one.to_dict()}"
    assert one == PackConfig() == PackConfig.from_dict(one.to_dict())
    two = PackConfig(views=2, views_together=True, max_tokens=512)
    assert {"views": 2, "views_together": True}.items() <= two.to_dict().items()
    assert PackConfig.from_dict(two.to_dict()) == two
    assert repr(two).endswith("views=2, views_together=True, jpeg_edges='clean')")


def test_only_a_random_crop_draws():
    assert PackConfig(crop=Crop()).draws
    assert not PackConfig(crop=CenterCrop()).draws
    assert not PackConfig(crop=FixedCrop(0, 0, 1, 1)).draws


def test_options_are_passed_by_name():
    with pytest.raises(TypeError, match="positional"):
        PackConfig(1024)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"crop": {}}, "a law in here is {}, expected its name with its attributes; it is damaged"),
        ({"crop": {"Crop": []}}, "a law in here is {'Crop': []}, expected its name with its attri"),
        ({"crop": {"Crop": {}, "Side": {}}}, "a law in here is {'Crop': {}, 'Side': {}}, exp"),
        ({"resolution": {"Side": {}}}, "Side in here is [], expected pixels among its attributes;"),
    ],
)
def test_a_law_that_is_damaged_is_a_sentence(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PackConfig.from_dict({"seq_len": 64, **option}, "here")
