"""`ImageTextModel`: a SigLIP whose images are packed; and where its weights come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from packpipe import checks
from packpipe.hub.files import CONFIG, Weights, folder_of, processing_of, settings_of
from packpipe.hub.pretrained import model_of, tell_unused
from packpipe.hub.siglip import read_siglip
from packpipe.hub.text_tower import TextTower, read_text_tower
from packpipe.loading.batch import PackedBatch, TokenBatch
from packpipe.model.navit import NaViT
from packpipe.planning.image_config import PackConfig

# model_type of config.json: whether images keep their aspect ratio. SigLIP 2 of a fixed size calls
# itself siglip.
_NAFLEX = {"siglip2": True, "siglip": False}


class ImageTextModel(nn.Module):
    """Vectors of images and of texts that are near each other where the two belong together.

    A step of contrastive training, on a `PairBatch`::

        seen, read = (vectors.flatten(0, 1) for vectors in model(batch.images, batch.texts))
        present = batch.present.flatten()
        loss = sigmoid_contrastive(seen, read, model.scale, model.logit_bias, present=present)

    Args:
        images: gives vectors of length 1.
        texts: gives vectors of length 1, as wide.
        logit_scale: float[], the logarithm of what products of vectors are multiplied by.
        logit_bias: float[], what is added to them then.
    """

    def __init__(
        self, images: NaViT, texts: TextTower, logit_scale: Tensor, logit_bias: Tensor
    ) -> None:
        super().__init__()
        self.images, self.texts = images, texts
        self.logit_scale, self.logit_bias = nn.Parameter(logit_scale), nn.Parameter(logit_bias)

    def forward(self, images: PackedBatch, texts: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return the vectors of images and of texts, each [B, S, C]: pairs, place by place."""
        return self.images(images), self.texts(texts)

    @property
    def scale(self) -> Tensor:
        """float[], what products of vectors are multiplied by."""
        return self.logit_scale.exp()

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return [N, M], ``logits_per_image``, of vectors [N, C] and [M, C]."""
        return self.scale * images @ texts.T + self.logit_bias


def image_text_model(
    source: str | Path, *, attention: str = "auto", revision: str | None = None
) -> tuple[ImageTextModel, PackConfig]:
    """Return a SigLIP or SigLIP 2 with both towers, and how images are packed for it.

    The tower of texts is transformers' (``pip install 'packpipe[texts]'``), the images' is packed:
    see `from_pretrained`, whose rules of names, folders and image processors hold here, too.

    Args:
        source: a folder, or the name of a model of the Hugging Face Hub.
        attention: backend of the images' tower.
        revision: branch, tag or commit of the Hub.

    Raises:
        FileNotFoundError: there are no such files, and they cannot be downloaded.
        ModuleNotFoundError: there is no transformers.
        ValueError: it is no SigLIP with both towers, the weights are not all of it, or its towers
            have vectors of two widths.
    """
    folder = folder_of(source, revision)
    settings = settings_of(folder)
    kind = settings.get("model_type")
    if kind not in _NAFLEX:
        expected, remedy = "'siglip2' or 'siglip'", "other models of images and texts are not known"
        raise ValueError(
            checks.sentence(f"model_type in {folder / CONFIG}", kind, expected, remedy)
        )
    weights = Weights(folder)
    encoder = read_siglip(settings, processing_of(folder), weights, naflex=_NAFLEX[kind])
    encoder = replace(encoder, config=replace(encoder.config, head="unit", attention=attention))
    texts = read_text_tower(settings, weights)
    if texts.width != encoder.config.dim:
        expected, remedy = f"{encoder.config.dim} (of images)", "take both files of one model"
        raise ValueError(checks.sentence("channels of texts", texts.width, expected, remedy))
    shared = (weights.take(name).reshape(()) for name in ("logit_scale", "logit_bias"))
    model = ImageTextModel(model_of(folder, encoder), texts, *shared)
    tell_unused(source, weights.left())
    return model, encoder.packing
