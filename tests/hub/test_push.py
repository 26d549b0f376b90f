"""A model becomes a repository: what the Hub's own client sends, and the card a reader sees."""

import base64
import json
import re
from dataclasses import replace
from importlib import import_module

import huggingface_hub
import numpy as np
import packed
import pytest
import torch

from packpipe import (
    Constant,
    Crop,
    PackConfig,
    Side,
    Uniform,
    from_pretrained,
    push_to_hub,
    save_pretrained,
)
from packpipe.hub.card import card_of
from packpipe.hub.meaning import LOSSES, Meaning, meaning_of
from packpipe.training.losses import LOSSES as TRAINED_LOSSES

# The client's library has one name or another, by the version of huggingface_hub.
httpx = import_module(type(huggingface_hub.get_session()).__module__.split(".")[0])
PACKING = PackConfig(patch_size=packed.PATCH_SIZE, resolution="budget", max_tokens=9)
FIGURES = {"step": 40, "images": 1234, "loss": 0.69314718, "accuracy": 0.75}


class Hub:
    """Answers the client as the Hub does, and keeps what is committed, by repository and path."""

    def __init__(self):
        self.files, self.made, self.commits = {}, [], []

    def __call__(self, request):
        path, asked = request.url.path, request.content
        if path == "/api/repos/create":
            self.made.append(json.loads(asked))
            return httpx.Response(200, json={"url": f"{request.url.copy_with(path='/me/pets')}"})
        if "/preupload/" in path:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            named = [{"path": one["path"], **modes} for one in json.loads(asked)["files"]]
            return httpx.Response(200, json={"files": named})
        if "/commit/" in path:
            self.commit(path, [json.loads(line) for line in asked.splitlines()])
            found = {"commitUrl": str(request.url.copy_with(path="/me/pets/commit/1"))}
            return httpx.Response(200, json={**found, "commitOid": "1"})
        if path == "/api/validate-yaml":
            return httpx.Response(200, json={"errors": [], "warnings": []})
        if "/tree/" in path:
            listed = [{"type": "file", "path": n, "size": 1, "oid": "0"} for n in self.files]
            return httpx.Response(200, json=listed)
        return httpx.Response(404, json={"error": path})

    def commit(self, path, lines):
        self.commits.append((path, lines[0]["value"]["summary"]))
        for line in lines[1:]:
            name = line["value"]["path"]
            if line["key"] == "deletedFile":
                del self.files[name]
            else:
                self.files[name] = base64.b64decode(line["value"]["content"])


@pytest.fixture
def hub():
    """A Hub without a network; the client's code is its own."""
    hub = Hub()
    transport = httpx.MockTransport(hub)
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=transport))
    yield hub
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def test_what_is_pushed_is_what_comes_back(hub, tmp_path):
    model = packed.model_of(dtype=torch.float32)
    hub.files = {"model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    told = {"figures": FIGURES, "license": "cc-by-4.0", "source": "Trained on *pets*."}
    names = ("dark", 'a, "b"', "hündin", "d", "e")
    told |= {"class_names": names, "label_column": "kind", "loss": "softmax"}
    url = push_to_hub(model, PACKING, "me/pets", private=True, **told)
    assert url.endswith("/me/pets")
    (created,) = hub.made
    assert (created["organization"], created["name"]) == ("me", "pets")
    assert created["visibility"] == "private"
    ((path, summary),) = hub.commits
    assert path == "/api/models/me/pets/commit/main"
    assert summary == "Upload a model of packpipe"
    kept = ["README.md", "config.json", "model.safetensors", "notes.txt"]
    assert sorted(hub.files) == kept
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    again, packing = from_pretrained(tmp_path)
    assert packing == PACKING
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert "| images | 1234 |\n| loss | 0.693147 |\n| accuracy | 0.75 |" in card.text
    assert meaning_of(tmp_path) == Meaning(class_names=names, label_column="kind", loss="softmax")
    settings = json.loads(hub.files["config.json"])
    assert settings["id2label"] == dict(zip("01234", names, strict=True))
    assert settings["label2id"] == {name: k for k, name in enumerate(names)}
    quoted = '"dark", "a, \\"b\\"", "hündin", "d", "e"'
    assert f"## Outputs\n\nIn their order, they are of: {quoted}.\n" in card.text
    assert (
        "\n\nTrained with the loss `softmax`: their softmax gives the probability of" in card.text
    )
    assert '\n\nThe labels were the column "kind".\n' in card.text
    assert 'from_pretrained("me/pets")' in card.text.replace("'", '"')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo": "me/pets/cats"}, "repo is 'me/pets/cats', expected the name of a repository; na"),
        ({"repo": "no blanks"}, "repo is 'no blanks', expected the name of a repository; names ar"),
        ({"packing": PackConfig()}, "patch_size is 16, expected 2 (the model's); pass the model's"),
        (
            {"figures": {"loss": 1.0}},
            "figures is ['loss'], expected 'images' among them; say on how many images they were",
        ),
        (
            {"figures": {"images": 2, "loss": float("nan")}},
            "figures['loss'] is nan, expected a finite number; give what was measured",
        ),
        (
            {"figures": {"images": 0}},
            f"figures['images'] is 0, expected an integer in 1..{2**63 - 1}; give what was measu",
        ),
        (
            {"figures": {"images": 2, "accuracy": 75}},
            "figures['accuracy'] is 75, expected a share in 0..1; give what was measured",
        ),
        (
            {"figures": {"images": 2, "a|b": 1}},
            "a figure is 'a|b', expected a name on one line, without |; rename it",
        ),
        ({"figures": {"images": 2, "a\nb": 1}}, "a figure is 'a\\nb', expected a name on one lin"),
        (
            {"packing": replace(PACKING, drop_rate=0.5)},
            "drop_rate is 0.5, expected 0.0; pass packpipe.planning.evaluation.evaluation_of(pack",
        ),
        ({"class_names": ["a", "b"]}, "len(class_names) is 2, expected 5 (num_classes); give the"),
        ({"class_names": ["a", "b", "a"]}, "class_names[2] is 'a', expected a name of its own; gi"),
        ({"loss": "hinge"}, "loss is 'hinge', expected one of 'softmax', 'sigmoid', 'mse', 'l1'"),
        ({"packing": replace(PACKING, views=2)}, "views is 2, expected 1; pass packpipe.planning."),
        ({"packing": replace(PACKING, crop=Crop())}, "crop is Crop("),
        (
            {"packing": replace(PACKING, resolution=Side(Uniform(8, 16)), max_tokens=None)},
            "resolution is Side(pixels=Uniform(low=8, high=16), rounding='nearest'), expected 'bud",
        ),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_sent(arguments, message, hub):
    given = {"packing": PACKING, "repo": "me/pets", **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        push_to_hub(packed.model_of(), **given)
    assert hub.made == hub.commits == []


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ([("images", 3)], "figures is 'list', expected numbers by their names; give what was meas"),
        ({"images": 1.5}, "figures['images'] is 1.5, expected an integer in 1.."),
        ({"images": True}, "figures['images'] is True, expected an integer in 1.."),
    ],
)
def test_figures_that_are_no_numbers_are_refused(figures, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        card_of(packed.model_of(), PACKING, "mine", figures=figures)


def test_counts_are_printed_whole_and_options_of_every_packing_left_out():
    figures = {"images": np.int64(1234567), "loss": np.float32(0.5)}
    text = card_of(packed.model_of(), PackConfig(patch_size=2), "mine", figures=figures)
    assert "| images | 1234567 |\n| loss | 0.5 |" in text
    assert text.endswith("## Packing\n\nAs packpipe has it by default.\n")


def test_a_card_has_the_owner_of_a_repository_that_was_named_without(hub):
    push_to_hub(packed.model_of(), PACKING, "pets")
    text = hub.files["README.md"].decode()
    assert "# me/pets\n" in text
    assert "from_pretrained('me/pets')" in text


def test_a_resolution_that_is_one_is_no_draw(tmp_path):
    one = replace(PACKING, resolution=Side(Constant(8)), max_tokens=None)
    save_pretrained(packed.model_of(), one, tmp_path)
    assert from_pretrained(tmp_path)[1] == one


def test_a_folder_is_called_by_its_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretrained(packed.model_of(), PACKING, ".")
    assert f"# {tmp_path.name}\n" in (tmp_path / "README.md").read_text()
    message = "folder is 'README.md', expected a folder, or a new name; it is a file: choose anot"
    with pytest.raises(NotADirectoryError, match=re.escape(message)):
        save_pretrained(packed.model_of(), PACKING, "README.md")


def test_what_was_saved_before_stays_until_all_is_written(tmp_path, monkeypatch):
    model = packed.model_of(dtype=torch.float32)
    save_pretrained(model, PACKING, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(packed.model_of(seed=2), PACKING, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    again, _ = from_pretrained(tmp_path)
    assert torch.equal(again.norm.weight, model.norm.weight)


@pytest.mark.parametrize("part", ["model", "packing"])
def test_a_part_that_a_configuration_lacks_is_named(part, tmp_path):
    save_pretrained(packed.model_of(), PACKING, tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    del told[part]
    path.write_text(json.dumps(told))
    message = f"{part} in {path} is None, expected its options; it is cut or damaged, so write it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        from_pretrained(tmp_path)


def test_a_card_claims_nothing_that_was_not_told(tmp_path):
    model = packed.model_of(num_classes=None, pooling="none")
    save_pretrained(model, PACKING, tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    assert text == card_of(model, PACKING, "mine")
    assert "Nothing was measured." in text
    assert "Nothing was said of where the weights come from." in text
    assert "license" not in text
    weights = sum(weight.numel() for weight in model.parameters())
    assert f"{weights:,} weights, patches of 2 pixels, 2 blocks of width 16; features" in text
    assert "of each token." in text
    assert "| max_tokens | `9` |" in text
    data = huggingface_hub.ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("packpipe", "image-feature-extraction")
    labelled = huggingface_hub.ModelCard(card_of(packed.model_of(), PACKING, "a: b # c")).data
    assert labelled.pipeline_tag is None


def test_what_outputs_mean_is_told_or_not(tmp_path):
    assert LOSSES.keys() == TRAINED_LOSSES.keys()
    model = packed.model_of(dtype=torch.float32)
    save_pretrained(model, PACKING, tmp_path / "plain")
    assert meaning_of(tmp_path / "plain") == Meaning()
    assert "## Outputs" not in (tmp_path / "plain" / "README.md").read_text()
    (tmp_path / "config.json").write_text('{"model_type": "vit", "id2label": {"0": "cat"}}')
    assert meaning_of(tmp_path) == Meaning()  # its head is not read
    many = {str(number): f"class {number}" for number in range(12)}
    settings = {"model_type": "packpipe", "id2label": many}
    (tmp_path / "config.json").write_text(json.dumps(settings, sort_keys=True))  # "10" before "2"
    assert meaning_of(tmp_path) == Meaning(class_names=tuple(many.values()))
    for names in ({"1": "b", "2": "a"}, {"0": "a", "01": "b"}, ["a", "b"], "ab"):
        settings = {"model_type": "packpipe", "id2label": names}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        message = f"id2label in {tmp_path / 'config.json'} is {names!r}, expected the names of"
        with pytest.raises(ValueError, match=re.escape(message)):
            meaning_of(tmp_path)
    for wrong in ("ab", [1], {"a", "b"}):
        with pytest.raises(TypeError, match=re.escape("class_names")):
            Meaning(class_names=wrong)
    with pytest.raises(TypeError, match="label_column is 1, expected a name, or None"):
        Meaning(label_column=1)
