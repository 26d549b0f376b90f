"""Refuses to resume a loader on other data than its saved state belongs to."""

from __future__ import annotations

import logging
from typing import Any

from packpipe import checks

log = logging.getLogger(__name__)

# What to do about contents that are others than those of a state, by their names.
_REMEDIES = {
    "max_segments": "pass it as max_segments, else batches have another shape",
    "labels": "the labels are others: use the data of the state",
    "weights": "the weights are others: use the data of the state",
    "values": "the labels or other numbers are others: use the data of the state",
    "rows": "pixels or tokens are others, of 16 MB that are compared: use the data of the state",
    "targets": "class maps are others, of 16 MB that are compared: use the data of the state",
    "files": "the files hold others: use the folder of the state, or a copy of it",
    "masks": "the masks, or the target_stride, are others: use the data of the state",
    "images": "the images are others, in length or in 16 MB of them: use the data of the state",
    "decoders": "pixels may be others: use the versions of the state for the same",
    "options": "the rows are computed in another way: use the options of the state",
}
# What is told of, and not refused.
_TOLD = ("decoders",)


def check_contents(own: dict[str, Any], known: Any) -> None:
    """Raise ValueError if a state was saved with other contents, of those that it names.

    Versions of what decodes are warned of.

    States of earlier versions say nothing, and rows in other files may be known by other names.

    Args:
        own: digests of what the batches show now, by name.
        known: those of the state.
    """
    if not isinstance(known, dict):
        remedy = "pass what state_dict returned"
        raise ValueError(checks.sentence("state['contents']", known, "a dict", remedy))
    for name in [name for name in own if name in known]:
        if known[name] != own[name]:
            where, expected = f"state['contents'][{name!r}]", repr(own[name])
            remedy = _REMEDIES.get(name, "use the data of the state")
            said = checks.sentence(where, known[name], expected, remedy)
            if name not in _TOLD:
                raise ValueError(said)
            log.warning("%s", said)
    data = own.keys() - {"max_segments", "labels", "weights", "values"}
    if data and not data & known.keys():
        log.warning(
            "the state does not say which %s it belongs to: use those of before, since others "
            "of the same sizes would go unnoticed",
            " and ".join(sorted(data)),
        )
