"""Options as plain JSON values, and back: a law is ``{its name: {its attributes}}``."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from packpipe import checks
from packpipe.planning.crops import CenterCrop, Crop, FixedCrop
from packpipe.planning.distributions import DISTRIBUTIONS
from packpipe.planning.dropping import ByResolution, OverTraining
from packpipe.planning.resolution import Area, Budget, PixelRange, Side, Square
from packpipe.planning.views import View

# By name, so that `from_dict` can make again what `to_dict` wrote.
_LAWS = {
    law.__name__: law
    for law in (
        *(*DISTRIBUTIONS, Crop, CenterCrop, FixedCrop, Side, Area, Budget, Square, PixelRange),
        *(ByResolution, OverTraining, View),
    )
}


def plain(value: Any) -> Any:
    """Return an option as JSON has it: laws become dicts, tuples lists."""
    if is_dataclass(value):
        attributes = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        return {type(value).__name__: attributes}
    return [plain(one) for one in value] if isinstance(value, tuple) else value


def restored(value: Any, source: object) -> Any:
    """Return the option of which `plain` made a value.

    Args:
        value: of JSON, which has no tuples and no laws: lists, and dicts of one entry.
        source: where it was read, for errors.

    Raises:
        ValueError: a law or an attribute of one is unknown here, or missing.
    """
    if isinstance(value, dict):
        remedy = "it is damaged, so write it again"
        if len(value) != 1 or not isinstance(attributes := next(iter(value.values())), dict):
            expected = "its name with its attributes"
            raise ValueError(checks.sentence(f"a law in {source}", value, expected, remedy))
        (name,) = value
        checks.known_options([name], _LAWS, source)
        known = fields(_LAWS[name])
        checks.known_options(attributes, [field.name for field in known], source)
        needed = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
        for missing in [one for one in needed if one not in attributes]:
            what, expected = f"{name} in {source}", f"{missing} among its attributes"
            raise ValueError(checks.sentence(what, list(attributes), expected, remedy))
        return _LAWS[name](**{key: restored(one, source) for key, one in attributes.items()})
    return tuple(restored(one, source) for one in value) if isinstance(value, list) else value
