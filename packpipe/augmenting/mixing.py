"""Mixup and CutMix between neighbours in a row: the first segment and the second, and so on.

The two of a pair are laid over each other, centre on centre, since they may be of different sizes.
Where both have kept a token, those two tokens meet; all others stay as they are. Mixup blends the
tokens that meet, CutMix swaps those within a box, so each image of the pair becomes a mixture. What
an image then has of its own is counted in tokens, exactly, and weighs its label in the loss.

Nothing is mixed here: rows say which tokens meet and with what weight. The mixture is made of
pixels in their colours, on the model's device, in floats that no one rounds
(`packpipe.loading.colouring`).

A pair's draws are a function of (seed, epoch, and its first: example_index, view). Who is whose
neighbour the packs decide, so stored rows mix the same pairs in every epoch, in new shares; packs
that are planned anew have new pairs.

Source: Zhang et al., arXiv 1710.09412 (mixup); Yun et al., arXiv 1905.04899 (CutMix).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packpipe import checks, philox
from packpipe.augmenting.augment import Augment
from packpipe.augmenting.tokens import tokens_of
from packpipe.philox import Key
from packpipe.planning.distributions import beta_quantile
from packpipe.rows.labels import as_arrow, label_values
from packpipe.rows.rows import NO_LABEL, Rows


class Mixtures(NamedTuple):
    """What is drawn for each of n pairs.

    Attributes:
        happens: bool[n], whether it is mixed at all.
        cut: bool[n], whether by CutMix, not by mixup.
        share: float64[n], λ: what is to stay an image's own where the two lie over each other.
        corner: float64[n, 2], where CutMix's box lies, down and across, from 0 to 1.
    """

    happens: NDArray[np.bool_]
    cut: NDArray[np.bool_]
    share: NDArray[np.float64]
    corner: NDArray[np.float64]


def mixtures(augment: Augment, key: Key, index: NDArray[np.int64], view: ArrayLike = 0) -> Mixtures:
    """Return the draws of some pairs; each is a function of the key, its index and its view.

    Args:
        augment: one that mixes.
        key: (seed, epoch).
        index: int64[n], the first example of each pair.
        view: int[n], which of that example's views it is; one number for all.
    """

    def uniform(stream: int) -> NDArray[np.float64]:
        return philox.uniform(key, index=index, stream=stream, view=view)

    # Either with the same chance if both are asked for.
    cut = uniform(philox.MIX_BY_CUT) < (0.5 if augment.mixup else 1.0) * bool(augment.cutmix)
    shares = [
        beta_quantile(alpha, alpha, uniform(philox.MIX_SHARE)) if alpha else np.ones(len(index))
        for alpha in (augment.mixup, augment.cutmix)
    ]
    return Mixtures(
        happens=uniform(philox.MIX) < augment.mix_prob,
        cut=cut,
        share=np.where(cut, shares[1], shares[0]),
        corner=np.stack([uniform(stream) for stream in philox.MIX_CORNER], 1),
    )


def mixed(rows: Rows, augment: Augment, key: Key) -> Rows:
    """Return the rows with what says how neighbours are mixed; their patches stay as they are.

    Tokens gain ``mix_offset``, int32[rows, seq_len], how many places further on the token is that
    one meets, 0 if it meets none. Segments gain ``mix_weight``, float32, the weight of their own
    pixels in tokens that meet another; ``partner_labels``, int64, -100 where nothing is mixed; and
    ``label_weights``, float32, what is an image's own: 1 - (1 - mix_weight) · tokens that meet ÷
    tokens. Where images have a ``weight``, that of a mixture is of both by these shares,
    s · w + (1 - s) · w', of which its own label has s · w: an image of weight 0 teaches nothing,
    not through its partner either. Labels that are lists of numbers are mixed here instead, by
    those weights; a number that one of the two lacks is missing in the mixture. A pair of which a
    label is missing is not mixed, nor is the last of an odd number.

    Args:
        rows: of images, flipped and turned already.
        augment: one that mixes.
        key: (seed, epoch).

    Raises:
        ValueError: the rows have no labels.
        TypeError: the labels are neither numbers nor lists of them.
    """
    if "labels" not in rows.segments:
        expected, remedy = "a label an image, for mixup and cutmix", "pack with label_column"
        raise ValueError(checks.sentence("labels", "missing", expected, remedy))
    labels = label_values(rows.segments["labels"])
    is_class = labels.ndim == 1
    known = labels != NO_LABEL if is_class else ~np.isnan(labels).all(axis=1)
    shape = rows.segment_ids.shape
    starts, lens = rows.patch_places(shape[1])
    first = np.flatnonzero((rows.numbers % 2 == 0) & _has_next(rows))
    views = np.broadcast_to(rows.views, rows.example_index.shape)
    drawn = mixtures(augment, key, rows.example_index[first], views[first])
    chosen = drawn.happens & known[first] & known[first + 1]
    first, drawn = first[chosen], Mixtures(*(values[chosen] for values in drawn))
    pairs = np.stack([first, first + 1])  # [2, n]
    grids = rows.grid_hw[pairs].astype(np.int64)  # [2, n, (rows, columns)]
    common = grids.min(0)
    # Square roots, products and roundings are the same on every machine.
    cut_size = np.rint(common * np.sqrt(1 - drawn.share)[:, None])
    size = np.where(drawn.cut[:, None], cut_size, common).astype(np.int64)
    corner = np.floor((common - size + 1) * drawn.corner).astype(np.int64)
    corner[~drawn.cut] = 0
    corners = (grids - common) // 2 + corner  # in the grid of each
    places = rows.coords.reshape(-1, 2).astype(np.int64)
    sides = [
        _inside(places, starts[own], lens[own], corners[side], size)
        for side, own in enumerate(pairs)
    ]
    (tokens, keys), (others, other_keys) = sides
    found, here, there = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
    offsets = np.zeros(len(places), np.int32)
    offsets[tokens[here]] = others[there] - tokens[here]
    offsets[others[there]] = tokens[here] - others[there]
    weight, label_weights = np.ones((2, len(lens)))
    weight[pairs] = np.where(drawn.cut, 0.0, drawn.share)
    meeting = np.bincount(found >> 32, minlength=len(first))
    label_weights[pairs] = 1 - (1 - weight[pairs]) * meeting / lens[pairs]
    segments: dict[str, Any] = {"mix_weight": weight.astype(np.float32)}
    changed = label_weights[pairs] < 1
    if "weight" in rows.segments:
        image_weights = rows.segments["weight"].astype(np.float64)
        image_weights[pairs], label_weights[pairs] = _weighed(
            image_weights[pairs], label_weights[pairs]
        )
        segments["weight"] = image_weights.astype(np.float32)
    if is_class:
        partner_labels = np.full(len(lens), NO_LABEL, np.int64)
        partner_labels[pairs] = np.where(changed, labels[pairs[::-1]], NO_LABEL)
        segments["partner_labels"] = partner_labels
        segments["label_weights"] = label_weights.astype(np.float32)
    else:
        own = label_weights[pairs][..., None]
        # A number that one of the two lacks is NaN in both, unless nothing of it is mixed in.
        shares = np.where(own < 1, own * labels[pairs] + (1 - own) * labels[pairs[::-1]], 0)
        labels[pairs] = np.where(own < 1, shares, labels[pairs])
        segments["labels"] = as_arrow(labels)
    return replace(
        rows,
        segments={**rows.segments, **segments},
        tokens={**rows.tokens, "mix_offset": offsets.reshape(shape)},
    )


def _weighed(
    weights: NDArray[np.float64], shares: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how much each mixture counts in the loss, and the share that its own label has of it.

    Args:
        weights: float64[2, n], of the images of pairs.
        shares: float64[2, n], what each has of its own.
    """
    own, partner = shares * weights, (1 - shares) * weights[::-1]
    total = own + partner
    return total, np.divide(own, total, out=shares.copy(), where=total > 0)


def _has_next(rows: Rows) -> NDArray[np.bool_]:
    """Return bool[segments], whether another one of the same row follows."""
    return rows.numbers + 1 < np.repeat(rows.num_segments, rows.num_segments)


def _inside(
    places: NDArray[np.int64],
    starts: NDArray[np.int64],
    lens: NDArray[np.int64],
    corners: NDArray[np.int64],
    size: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens of segments within a box of each, and a key: (pair, y, x) in the box.

    Args:
        places: int64[tokens of all rows, 2], (y, x) in the grid.
        starts: int64[n], the first place of each segment, rows laid end to end.
        lens: int64[n], its tokens.
        corners: int64[n, 2], first row and column of the box.
        size: int64[n, 2], its rows and columns.
    """
    tokens, owner = tokens_of(starts, lens)
    within = places[tokens] - corners[owner]
    inside = ((within >= 0) & (within < size[owner])).all(1)
    down, across = within[inside].T
    return tokens[inside], (owner[inside] << 32) + (down << 16) + across
