"""SigLIP with both towers: logits, losses and gradients of transformers, of packed pairs."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
import transformers
from datasets import Dataset
from laws import close
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from packpipe import PackedLoader, pack_pairs, predict
from packpipe.cli.main import app
from packpipe.hub.contrastive import image_text_model
from packpipe.hub.text_tower import class_vectors, input_ids_of
from packpipe.samples import images_folder
from packpipe.training.contrastive import sigmoid_contrastive

LENGTH = 24
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LETTERS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", ".", *map(chr, range(97, 123))]
TEXTS = {**SMALL, "vocab_size": len(LETTERS), "max_position_embeddings": LENGTH}
CLASSES = ("hill", "lake", "sea")
FILES = sorted((images_folder() / "landscape").iterdir())[:9]
CLASS_OF = dict(zip(FILES, sorted(CLASSES * 3), strict=True))
CAPTIONS = [f"a {file.stem[:12]}." for file in FILES]


@dataclass(frozen=True)
class Saved:
    """A model of transformers in a folder, its tokenizer, and what it makes of pictures."""

    folder: object
    model: object
    processor: object
    tokenizer: object

    def inputs(self, pictures, texts):
        options = {"padding": "max_length", "max_length": LENGTH, "return_tensors": "pt"}
        input_ids = self.tokenizer(texts, **options)["input_ids"]
        return {**self.processor(images=pictures, return_tensors="pt"), "input_ids": input_ids}


@pytest.fixture(scope="module", params=["siglip2 naflex", "siglip"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    if request.param == "siglip":
        vision = {**SMALL, "patch_size": 16, "image_size": 48}
        config = transformers.SiglipConfig(vision_config=vision, text_config=TEXTS)
        model = transformers.SiglipModel(config)
        processor = transformers.SiglipImageProcessorPil(size={"height": 48, "width": 48})
    else:
        vision = {**SMALL, "patch_size": 16, "num_patches": 16}
        config = transformers.Siglip2Config(vision_config=vision, text_config=TEXTS)
        model = transformers.Siglip2Model(config)
        processor = transformers.Siglip2ImageProcessorPil(max_num_patches=16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.2 if weight.ndim > 1 else 0.3))
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-0.7)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    tokenizer = transformers.Siglip2Tokenizer(vocab=vocabulary, padding_side="right")
    tokenizer.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Saved(folder, model, processor, tokenizer)


def pictures_of(files):
    return [Image.open(file).convert("RGB") for file in files]


def test_logits_loss_and_gradients_of_packed_pairs_are_the_originals(saved, tmp_path, caplog):
    model, packing = image_text_model(saved.folder)
    assert [text for name, _, text in caplog.record_tuples if name.startswith("packpipe")] == []
    assert model.texts.length == LENGTH
    options = packing.to_options() | {"seq_len": 80}
    pairs = pack_pairs(
        Dataset.from_dict(
            {
                "image": pictures_of(FILES),
                "input_ids": input_ids_of(saved.tokenizer, CAPTIONS, LENGTH),
            }
        ),
        text_seq_len=4 * LENGTH,
        max_text=LENGTH,
        num_workers=0,
        output=tmp_path / "pairs",
        progress=False,
        **options,
    )
    (batch,) = PackedLoader(pairs, len(pairs[0]), rank=0, world_size=1)
    assert batch.present.sum() == len(FILES) == 9
    assert batch.present.sum(1).max() > 2
    seen, read = (vectors.flatten(0, 1) for vectors in model(batch.images, batch.texts))
    present = batch.present.flatten()
    order = batch.images.example_index[batch.present].tolist()
    inputs = saved.inputs(*([of[n] for n in order] for of in (pictures_of(FILES), CAPTIONS)))
    saved.model.zero_grad()
    wanted = saved.model(**inputs, return_loss=True)
    found = model.logits(seen[present], read[present])
    assert close(found, wanted.logits_per_image, 1e-5)
    assert found.std(0).min() > 0.01
    assert found.std(1).min() > 0.01

    bias = model.logit_bias
    loss = sigmoid_contrastive(seen, read, model.scale, bias, present=present, chunk=4)
    assert loss.item() == pytest.approx(wanted.loss.item(), abs=1e-5)
    loss.backward()
    wanted.loss.backward()
    own, other = dict(model.named_parameters()), dict(saved.model.named_parameters())
    for name, of in {
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
        "texts.model.embeddings.token_embedding.weight": (
            "text_model.embeddings.token_embedding.weight"
        ),
        "images.blocks.0.widen.weight": "vision_model.encoder.layers.0.mlp.fc1.weight",
    }.items():
        assert close(own[name].grad, other[of].grad.view_as(own[name]), 1e-5), name
    missing = [name for name, one in own.items() if one.grad is None or not one.grad.abs().sum()]
    assert missing == [name for name in missing if "k_proj.bias" in name]


def test_pictures_of_any_size_find_the_logits_of_texts(saved):
    model, packing = image_text_model(saved.folder)
    with torch.no_grad():
        wanted = saved.model(**saved.inputs(pictures_of(FILES), CAPTIONS[:4])).logits_per_image
        input_ids = torch.tensor(input_ids_of(saved.tokenizer, CAPTIONS[:4], LENGTH))
        vectors = predict(model.images, FILES, **packing.to_options())
        assert close(model.logits(vectors, model.texts.encode(input_ids)), wanted, 1e-5)


def test_a_class_is_the_mean_of_its_texts(saved):
    model, _ = image_text_model(saved.folder)
    templates = ["a {}.", "this is {}."]
    found = class_vectors(model.texts, saved.tokenizer, ["cat", "dog"], templates)
    texts = ["a cat.", "this is cat.", "a dog.", "this is dog."]
    input_ids = torch.tensor(input_ids_of(saved.tokenizer, texts, LENGTH))
    with torch.no_grad():
        wanted = model.texts.encode(input_ids).unflatten(0, (2, 2)).mean(1)
    assert close(found, wanted / wanted.norm(dim=1, keepdim=True), 1e-6)
    assert not close(found[0], found[1], 1e-2)


@pytest.mark.parametrize("saved", ["siglip2 naflex"], indirect=True)
def test_texts_that_are_no_texts_of_the_model_are_refused(saved, tmp_path):
    model, _ = image_text_model(saved.folder)
    own, names = saved.tokenizer, ["cat", "dog"]
    # A folder without files of a tokenizer still gives one, to which all texts are unknown.
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((saved.folder / name).read_bytes())
    bare = transformers.AutoTokenizer.from_pretrained(tmp_path)
    remedy = "name each class once, and pass a folder with the model's own tokenizer"

    def other(texts, **_):
        return {"input_ids": [[5, 100 + len(text)] + [0] * (LENGTH - 2) for text in texts]}

    for error, call, message in (
        (
            ValueError,
            lambda: class_vectors(model.texts, bare, names, ["a {}."]),
            f"tokens of names[1] is 'dog', expected others than those of 'cat'; {remedy}",
        ),
        (
            ValueError,
            lambda: class_vectors(model.texts, own, ["cat", "dog", "cat"], ["a {}.", "the {}."]),
            f"tokens of names[2] is 'cat', expected others than those of 'cat'; {remedy}",
        ),
        (
            ValueError,
            lambda: class_vectors(model.texts, other, names, ["a {}."]),
            "a token of the tokenizer is 106, expected below 33, as the model has them; name each",
        ),
        (
            TypeError,
            lambda: class_vectors(model.texts, own, "cat", ["a {}."]),
            "names is 'cat', expected a list of texts; pass [text]",
        ),
        (
            TypeError,
            lambda: class_vectors(model.texts, own, names, "a {}."),
            "templates is 'a {}.', expected a list of texts; pass [text]",
        ),
        (
            TypeError,
            lambda: input_ids_of(own, "cat"),
            "texts is 'cat', expected a list of texts; pass [text]",
        ),
        (ValueError, lambda: input_ids_of(own, []), "texts is [], expected one at least; pass so"),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            call()


def told(*arguments):
    result = CliRunner().invoke(app, ["zero-shot", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The pictures as a folder of classes, and as one without."""
    folder = tmp_path_factory.mktemp("pictures")
    for file in FILES:
        for into in (folder / "classes" / CLASS_OF[file], folder / "alone"):
            into.mkdir(parents=True, exist_ok=True)
            (into / file.name).write_bytes(file.read_bytes())
    return folder


def test_zero_shot_tells_the_accuracy_of_labelled_images(saved, folders, tmp_path):
    names = ("a hill", "water", "some sea")
    options = ("--template", "a {}.", "--json", "--num-workers", 0)
    with torch.no_grad():
        for asked in (CLASSES, names):
            texts = [f"a {name}." for name in asked]
            logits = saved.model(**saved.inputs(pictures_of(FILES), texts)).logits_per_image
            right = [CLASSES[k] == CLASS_OF[file] for k, file in zip(logits.argmax(1), FILES,
                                                                      strict=True)]  # fmt: skip
            written = tmp_path / "names.txt"
            written.write_text("\n".join(asked) + "\n\n")
            given = ("--classes", written) if asked is names else ()
            code, output = told(saved.folder, folders / "classes", *options, *given)
            assert code == 0, output
            found = json.loads(output)
            assert (found["images"], found["classes"]) == (9, 3)
            assert found["accuracy"] == pytest.approx(sum(right) / 9)
    # The labels' own names in another order are taken in the labels' order.
    written.write_text("\n".join(reversed(CLASSES)))
    output = told(saved.folder, folders / "classes", *options, "--classes", written)[1]
    again = told(saved.folder, folders / "classes", *options)[1]
    assert json.loads(output)["accuracy"] == json.loads(again)["accuracy"]


def test_zero_shot_tells_the_classes_of_images_without_labels(saved, folders, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\nfish\n")
    options = ("--classes", tmp_path / "names.txt", "--template", "a {}.", "--num-workers", 0)
    code, output = told(saved.folder, folders / "alone", *options, "--top", 2, "--json")
    assert code == 0, output
    files = sorted((folders / "alone").iterdir())
    with torch.no_grad():
        inputs = saved.inputs(pictures_of(files), ["a cat.", "a dog.", "a fish."])
        shares = saved.model(**inputs).logits_per_image.sigmoid()
    found = json.loads(output)["images"]
    assert [one["image"] for one in found] == [str(file) for file in files]
    best = shares.topk(2)
    for one, values, numbers in zip(found, *best, strict=True):
        assert [c["name"] for c in one["classes"]] == [("cat", "dog", "fish")[k] for k in numbers]
        assert [c["share"] for c in one["classes"]] == pytest.approx(values.tolist(), abs=1e-5)
    code, output = told(saved.folder, folders / "alone", *options)
    assert code == 0
    assert f"{found[0]['classes'][0]['name']} {found[0]['classes'][0]['share']:.3f}" in output


def test_what_does_not_fit_is_refused(saved, folders, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    for arguments, message in (
        ((folders / "alone",), "classes is None, expected names; pass --classes FILE, a name a"),
        (
            (folders / "classes", "--classes", tmp_path / "names.txt"),
            "number of classes is 2, expected 3, as of the labels (hill, lake, sea, ...); w",
        ),
        (
            (folders / "classes", "--template", "a cat"),
            "a template is 'a cat', expected a text with {}; such as 'This is a photo of {}.'",
        ),
        (
            (folders / "classes", "--template", "a picture of nothing but {}"),
            "tokens of texts[0] is 29, expected at most 24; shorten it; nothing is cut in silence",
        ),
    ):
        code, output = told(saved.folder, *arguments)
        assert code == 2
        assert message in " ".join(output.split())


def test_texts_that_are_packed_shorter_are_refused(saved, tmp_path):
    model, _ = image_text_model(saved.folder)
    source = {"image": pictures_of(FILES[:2]), "input_ids": [[7, 8, 9], [7] * LENGTH]}
    pairs = pack_pairs(
        Dataset.from_dict(source), 256, LENGTH * 2, num_workers=0, output=tmp_path, progress=False
    )
    (batch,) = PackedLoader(pairs, len(pairs[0]), rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"^tokens of a text is 3, expected 24; pack all of `inp"):
        model.texts(batch.texts)
    none = type(batch.texts)(
        **{
            **vars(batch.texts),
            "segment_ids": torch.zeros_like(batch.texts.segment_ids),
            "seq_lens": torch.zeros_like(batch.texts.seq_lens),
        }
    )
    found = model.texts(none)
    assert found.shape == (*batch.present.shape, 32)
    assert found.abs().sum() == 0
    found.sum().backward()  # every weight is in the graph
    assert all(one.grad is not None for one in model.texts.parameters())


@pytest.mark.parametrize("saved", ["siglip2 naflex"], indirect=True)
def test_a_model_that_is_not_whole_is_refused(saved, tmp_path):
    tensors = load_file(saved.folder / "model.safetensors")
    told = json.loads((saved.folder / "config.json").read_text())
    path = tmp_path / "model.safetensors"
    head = "text_model.head.bias"
    for settings, changed, message in (
        ({"model_type": "clip"}, {}, "is 'clip', expected 'siglip2' or 'siglip'; other models of"),
        ({}, {head: tensors[head][1:]}, "text_model.head.bias is (31,), expected (32,), the shape"),
        (
            {},
            {"text_model.more": torch.ones(32)},
            "text_model.more is (32,), expected None, the sh",
        ),
        ({}, {"more": torch.ones(32)}, "tensors of .+ is 1, expected those of its family, without"),
        (
            {"text_config": {**told["text_config"], "projection_size": 16}},
            {head: tensors[head][:16], "text_model.head.weight": torch.ones(16, 32)},
            "channels of texts is 16, expected 32 (of images); take both files of one model",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**told, **settings}))
        save_file({**tensors, **changed}, path)
        pattern = re.escape(message).replace(r"\.\+", ".+")
        with pytest.raises(ValueError, match=pattern):
            image_text_model(tmp_path)
