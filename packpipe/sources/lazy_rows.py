"""`LazyRows`: computes rows when they are read, for ``pack(..., materialize=False)``."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from packpipe.philox import Key
from packpipe.planning.image_config import PackConfig
from packpipe.rows.computed import computed_columns
from packpipe.rows.digests import hexdigest
from packpipe.rows.fill_images import fill_rows
from packpipe.rows.from_arrow import table_segments
from packpipe.rows.rejects import bad_example, one_each
from packpipe.rows.rows import Rows
from packpipe.sources.features import packed_features
from packpipe.sources.image_source import ImageSource
from packpipe.sources.sizes import forgetting_wrong_sizes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LazyRows:
    """Computes packed rows from stored segment columns and the source's images.

    A transform of a `datasets.Dataset`: called with a batch of stored rows, returns whole rows.

    Attributes:
        source: the images.
        config, key: the options and (seed, epoch) the plan was made with.
        label: feature of the label column, or None.
        on_error: for images that cannot be decoded: ``"raise"`` raises a ValueError,
            ``"quarantine"`` leaves them out of their row and logs them.
        weighted: whether the rows have weights.
    """

    source: ImageSource
    config: PackConfig
    key: Key
    label: Any
    on_error: str
    weighted: bool = False

    def rows(self, plans: pa.Table) -> Rows:
        """Return the rows of stored segment columns, equal to those `pack` would have written."""
        planned = table_segments(plans)
        with forgetting_wrong_sizes(self.source, self.config.max_pixels):
            rows, rejects, _ = fill_rows(planned, self.source, self.config, self.key)
        for reject in one_each(rejects):
            if self.on_error == "raise":
                raise ValueError(bad_example(reject))
            log.warning("example %d left out: %s", reject.example_index, reject.exception)
        return rows

    def contents(self) -> dict[str, str]:
        """Return digests of what decides the pixels: the images, and the options."""
        options = json.dumps([self.config.to_dict(), *self.key], sort_keys=True)
        return {"images": self.source.contents_digest(), "options": hexdigest(options.encode())}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of packed rows: a NumPy array a row, its dtype kept."""
        features = partial(packed_features, self.config, self.label, weighted=self.weighted)
        stored, whole = features(tokens=False).arrow_schema, features().arrow_schema
        return computed_columns(batch, stored, whole, self.rows)
