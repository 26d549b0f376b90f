"""`push_to_hub`: a model becomes a repository of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packpipe import checks
from packpipe.durable import write_text
from packpipe.hub.card import CARD, card_of
from packpipe.hub.files import INDEX
from packpipe.hub.meaning import Meaning
from packpipe.hub.own import save_pretrained
from packpipe.model.navit import NaViT
from packpipe.planning.image_config import PackConfig


def push_to_hub(
    model: NaViT,
    packing: PackConfig,
    repo: str,
    *,
    class_names: Sequence[str] | None = None,
    label_column: str | None = None,
    loss: str | None = None,
    figures: Mapping[str, float] | None = None,
    license: str | None = None,  # noqa: A002
    source: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Upload a model with its card; `from_pretrained` reads it by the same name.

    huggingface_hub logs in as it always does (``hf auth login``), and its errors are raised as they
    are. The repository is made if it is missing; other files there stay, but for an index of
    weights in several files, which would be read instead. After a training::

        model, options = packpipe.load_model("run")
        figures = packpipe.training.run_folder.validation_figures("run")
        names = options.class_names
        packpipe.push_to_hub(
            model, options.packing, "me/pets", class_names=names, loss=options.loss, figures=figures
        )

    Args:
        model: its weights are written as they are, in their dtype.
        packing: as which images are packed for it.
        repo: such as "me/pets".
        class_names: by the number of their output; None if nobody knows them.
        label_column: name of the column of labels that was trained on.
        loss: that it was trained with.
        figures: what was measured, for the card; see `packpipe.hub.card.card_of`.
        license: of the weights, for the card.
        source: where the weights come from, for the card.
        private: whether others see a repository that is made; None for the account's usual.
        revision: branch; None for the main one.

    Returns:
        The address of the repository.

    Raises:
        ValueError: repo is no name of one, or packing or figures are wrong; nothing is uploaded.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    outputs: dict[str, Any] = {"class_names": class_names, "label_column": label_column}
    outputs["loss"] = loss
    about: dict[str, Any] = {"figures": figures, "license": license, "source": source}
    with TemporaryDirectory() as folder:
        save_pretrained(model, packing, Path(folder), name=repo, **outputs, **about)
        try:
            url = api.create_repo(repo, private=private, exist_ok=True)
        except HFValidationError as error:
            expected, remedy = "the name of a repository", "names are such as 'me/pets'"
            raise ValueError(checks.sentence("repo", repo, expected, remedy)) from error
        # A name without its owner is who is logged in; others read the model by the whole one.
        card = card_of(model, packing, url.repo_id, meaning=Meaning(**outputs), **about)
        write_text(Path(folder) / CARD, card)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload a model of packpipe",
            delete_patterns=[INDEX],
        )
    return str(url)
