"""`EpochPlan`: what every pack of an epoch holds.

`plan_epoch` (plan.py) makes it. It can be printed, explained, saved, loaded and compared.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from packpipe import checks
from packpipe.durable import write_shared
from packpipe.packing.limits import Limits
from packpipe.packing.packs import Packs
from packpipe.packing.quality import Quality
from packpipe.philox import Key
from packpipe.planning.decisions import decide
from packpipe.planning.explanation import Explanation
from packpipe.planning.image_config import PackConfig

_VERSION = 1  # of the saved file and of the fingerprint
# The arrays of a plan: their dtype, and their sides after the first.
_ARRAYS: dict[str, tuple[Any, ...]] = {
    "index": (np.int64,),
    "image_hw": (np.int32, 2),
    "grid_hw": (np.int16, 2),
    "num_keep": (np.int32,),
    "order": (np.int64,),
    "offsets": (np.int64,),
}


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """What every pack of an epoch holds; ``plan[p]`` are the source rows in pack p.

    Every image is one segment, or as many as there are views (``config.num_views``): segment s is
    view ``s % views`` of image ``s // views``.

    Attributes:
        config, seed, epoch: what the plan was made from, in addition to the sizes.
        index: int64[images], row of each planned image in its source.
        image_hw: int32[images, 2], upright source size in pixels.
        grid_hw: int16[segments, 2], (rows, columns) of patches after resizing.
        num_keep: int32[segments], tokens kept.
        num_shrunk: how many segments were shrunk, having more tokens than allowed.
        num_fitted: how many segments grew to fill their pack.
        order: int64[segments], their numbers, pack by pack.
        offsets: int64[packs + 1]; pack p is ``order[offsets[p]:offsets[p + 1]]``.
    """

    config: PackConfig
    seed: int
    epoch: int
    index: NDArray[np.int64]
    image_hw: NDArray[np.int32]
    grid_hw: NDArray[np.int16]
    num_keep: NDArray[np.int32]
    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    num_shrunk: int
    num_fitted: int

    @property
    def key(self) -> Key:
        """(seed, epoch), the key of all draws."""
        return Key(self.seed, self.epoch)

    @property
    def seq_lens(self) -> NDArray[np.int32]:
        """int32[segments], what each takes of its pack: the tokens kept, and prefix tokens."""
        return self.num_keep + np.int32(self.config.prefix_tokens)

    @cached_property
    def packs(self) -> Packs:
        """The packs, of numbers of segments."""
        limits = Limits(self.config.seq_len, self.config.max_segments)
        return Packs(self.order, self.offsets, limits, None, chunks=[self.seq_lens])

    @property
    def quality(self) -> Quality:
        """The figures; the bound is that of packing all examples at once, without windows."""
        return self.packs.quality

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = self.index[self.packs[pack] // self.config.num_views]
        return rows

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[pack] for pack in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits, a hash of everything in the plan; different plans differ in it."""
        # Options are equal where their numbers are: 1 and 1.0 are the same max_upscale.
        options = json.loads(json.dumps(self.config.to_dict()), parse_int=float)
        header = {**self._header(), "config": options}
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        # Sizes and options are in the header, so the bytes of the arrays can be hashed end to end.
        for name, (dtype, *_) in _ARRAYS.items():
            digest.update(np.ascontiguousarray(getattr(self, name), dtype).data)
        return digest.hexdigest()[:32]

    def pack_of(self, example: int, view: int = 0) -> int:
        """Return the pack that holds an example, given by its row in the source.

        Args:
            example: its row in the source.
            view: which of its views.

        Raises:
            KeyError: the example, or the view, is not in the plan.
        """
        place = self._place_of[self._segment(example, view)]
        return int(np.searchsorted(self.offsets, place, "right")) - 1

    def explain(self, example: int, view: int = 0) -> Explanation:
        """Return what was decided about an example and why, by deciding it once more, alone.

        Args:
            example: its row in the source.
            view: which of its views.

        Raises:
            KeyError: the example, or the view, is not in the plan.
        """
        at = self._segment(example, view)
        image = at // self.config.num_views
        found = decide(
            self.image_hw[image : image + 1],
            self.config.law_of(at % self.config.num_views),
            self.key,
            index=self.index[image : image + 1],
            view=at % self.config.num_views,
        )
        pack = self.pack_of(example, view)
        return Explanation(
            example=int(self.index[image]),
            pack=pack,
            segment=int(self._place_of[at] - self.offsets[pack]),
            image_hw=tuple(self.image_hw[image].tolist()),
            box=None if found.box is None else tuple(found.box[0].tolist()),
            drawn=None if found.drawn is None else float(found.drawn[0]),
            drop_rate=None if found.drop_rate is None else float(found.drop_rate[0]),
            shrunk=bool(found.shrunk[0]),
            decided_grid_hw=tuple(found.grid_hw[0].tolist()),
            decided_num_keep=int(found.num_keep[0]),
            grid_hw=tuple(self.grid_hw[at].tolist()),
            num_keep=int(self.num_keep[at]),
            config=self.config,
            view=at % self.config.num_views,
        )

    def save(self, path: str | Path) -> None:
        """Write the plan to a local file, completely or not at all; `load` reads it."""
        target = checks.local_path("path", path)
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        header = json.dumps({**self._header(), "fingerprint": self.fingerprint})

        # To an open file, since np.savez would append ".npz" to a name. Several ranks may save it.
        def write(file: BinaryIO) -> None:
            np.savez(file, header=np.array(header), **arrays)

        write_shared(target, write)

    @classmethod
    def load(cls, path: str | Path) -> EpochPlan:
        """Return the plan that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no plan, of another version, or was changed since.
        """
        remedy = "pass a file that EpochPlan.save wrote, or plan again"
        try:
            # Opened here, since np.load leaves a file open if it is no archive.
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                # Arrays of another version are not looked for: they may have other names.
                version = header["version"]
                arrays = {name: file[name] for name in _ARRAYS} if version == _VERSION else {}
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged archive may make zipfile and NumPy raise anything
            what = f"unreadable ({error})"
            raise ValueError(checks.sentence(str(path), what, "a saved plan", remedy)) from error
        if version != _VERSION:
            raise ValueError(checks.sentence(f"{path} version", version, str(_VERSION), remedy))
        try:
            totals = {name: header[name] for name in ("seed", "epoch", "num_shrunk", "num_fitted")}
            plan = cls(config=PackConfig.from_dict(header["config"]), **totals, **arrays)
            expected = header["fingerprint"]
            plan._check()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"amiss ({error})"
            raise ValueError(checks.sentence(str(path), what, "a saved plan", remedy)) from error
        if plan.fingerprint != expected:
            raise ValueError(
                checks.sentence(f"{path} fingerprint", plan.fingerprint, expected, remedy)
            )
        return plan

    def _check(self) -> None:
        """Raise if the arrays cannot be a plan; kernels do not check them again.

        Raises:
            ValueError: names the array.
        """
        num_images = len(self.index)
        num_segments = num_images * self.config.num_views
        lengths = {
            "index": num_images,
            "image_hw": num_images,
            "offsets": len(self.offsets),
        }
        for name, (dtype, *sides) in _ARRAYS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != (lengths.get(name, num_segments), *sides):
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}")
        # int64 before multiplying: int16 sides may give more than int16 holds.
        tokens = self.grid_hw[:, 0].astype(np.int64) * self.grid_hw[:, 1]
        sound = {
            "order": np.array_equal(np.sort(self.order), np.arange(num_segments)),
            "offsets": self.offsets[0] == 0
            and self.offsets[-1] == num_segments
            and bool((np.diff(self.offsets) > 0).all()),
            "grid_hw": bool((self.grid_hw > 0).all()),
            "num_keep": bool(((self.num_keep >= 1) & (self.num_keep <= tokens)).all()),
        }
        for name, is_sound in sound.items():
            if not is_sound:
                raise ValueError(f"{name} is no part of a plan")

    def _header(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "config": self.config.to_dict(),
            "seed": self.seed,
            "epoch": self.epoch,
            "num_shrunk": self.num_shrunk,
            "num_fitted": self.num_fitted,
            "num_images": len(self.index),
            "num_packs": len(self),
        }

    @cached_property
    def _by_index(self) -> NDArray[np.int64]:
        return np.argsort(self.index, kind="stable")

    @cached_property
    def _place_of(self) -> NDArray[np.int64]:
        """int64[segments], where in ``order`` each one is: its inverse permutation."""
        places = np.empty(len(self.order), np.int64)
        places[self.order] = np.arange(len(self.order))
        return places

    def _segment(self, example: int, view: int) -> int:
        view, views = operator.index(view), self.config.num_views
        if not 0 <= view < views:
            remedy = "count views from zero"
            raise KeyError(checks.sentence("view", view, f"0..{views - 1}", remedy))
        return self._position(example) * views + view

    def _position(self, example: int) -> int:
        example = operator.index(example)
        # A binary search, since the index may come in any order; the sorter is made once.
        at = int(np.searchsorted(self.index, example, sorter=self._by_index))
        if at == len(self.index) or self.index[self._by_index[at]] != example:
            name, remedy = "example", "see plan.index, and the rejects"
            raise KeyError(checks.sentence(name, example, "an example of the plan", remedy))
        return int(self._by_index[at])

    def __repr__(self) -> str:
        found, views = self.quality, self.config.num_views
        each = f" of {views} views" if views > 1 else ""
        return (
            f"EpochPlan({len(self.index)} images{each}, {found.num_tokens} tokens "
            f"in {len(self)} packs "
            f"of {found.seq_len}: padding {found.padding:.2%}, gap {found.gap}; "
            f"seed {self.seed}, epoch {self.epoch})"
        )

    def _repr_html_(self) -> str:
        return self.packs._repr_html_()
