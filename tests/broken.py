"""Trainings on images of which some are cut in their scan, alone or as two ranks.

A broken image fills a pack of its own, so the rank that has it takes a step without a token.
"""

import json
import sys
from pathlib import Path

import packed
import pictures
import torch
from two_ranks import one_of_two_ranks

from packpipe import EpochPacks, PackedLoader
from packpipe.loading.ranks import rank_of_world
from packpipe.training.loop import TrainConfig, train

# By name: packs of an epoch, and the options of the loader and the model. The last step of an epoch
# has a place without a pack, or the last pack has no step; or a rank never has a pack.
RUNS = {
    "drop": (21, {"tail": "drop"}, {}),
    "pad": (21, {"tail": "pad"}, {}),
    "error": (20, {"tail": "error"}, {}),
    "one pack": (1, {"tail": "pad"}, {"pooling": "first"}),
}


def packs_of(num_packs):
    """Packs of one image or of two; every tenth one is broken, or the second of them."""
    images = []
    for number in range(num_packs):
        is_broken = number % 10 == 1
        full = is_broken or number % 2 == 0
        for height in (16,) if full else (8, 8):
            image = pictures.encoded_image(height, 16, len(images), "JPEG")
            images.append(image[:-100] if is_broken else image)
    dataset = pictures.dataset_of(images, [row % 5 for row in range(len(images))], "abcde")
    return EpochPacks(
        dataset,
        64,
        patch_size=packed.PATCH_SIZE,
        max_segments=4,
        num_workers=1,
        max_bad_fraction=1.0,
    )


def trained(name, steps, batch_size):
    """Losses and empty batches of each step, and the weights at the end."""
    num_packs, options, shape = RUNS[name]
    packs = packs_of(num_packs)
    assert packs.num_packs((0, 0)) == num_packs
    model = packed.model_of("auto", torch.float64, **shape)
    loader = PackedLoader(packs, batch_size, **options)
    config = TrainConfig(steps=steps, learning_rate=1e-3, log_every=1)
    records = list(train(model, loader, config))
    weights = torch.cat([value.detach().flatten() for value in model.parameters()])
    losses = [record.loss for record in records]
    return losses, sum(record.fill == 0 for record in records), weights.tolist()


def main(folder, steps):
    """Train every run as one of two ranks, and write what came of it."""
    rank, _ = rank_of_world()
    found = {name: trained(name, int(steps), 1) for name in RUNS}
    (Path(folder) / f"broken-{rank}.json").write_text(json.dumps(found))


def compared(folder, steps):
    """For every run: steps that a rank took without a token, and the largest differences.

    Yields:
        name, empty steps of both ranks, of a loss and of a weight from those of one process.
    """
    ranks = [json.loads((Path(folder) / f"broken-{rank}.json").read_text()) for rank in range(2)]
    for name in RUNS:
        losses, _, weights = trained(name, steps, 2)
        assert len(losses) == steps
        (first, empty, first_weights), (second, also_empty, second_weights) = (
            found[name] for found in ranks
        )
        mean = (torch.tensor([first, second], dtype=torch.float64)).mean(0)
        wanted = torch.tensor(weights, dtype=torch.float64)
        both = torch.tensor([first_weights, second_weights], dtype=torch.float64)
        of_losses = (mean - torch.tensor(losses, dtype=torch.float64)).abs().max()
        yield name, empty + also_empty, float(of_losses), float((both - wanted).abs().max())


if __name__ == "__main__":
    with one_of_two_ranks():
        main(*sys.argv[1:])
