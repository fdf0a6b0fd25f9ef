"""Naming: the loss and its measure against plain loops, phrases of instances, and a run that others start from."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_MODEL, assert_one_line_error, command
from test_models import make_model
from test_train import metrics_of

from data_prep.engine.pipeline import Options, prepare
from data_prep.scenes.scenes_captions import ScenesCaptions
from vlabs.checkpoints.checkpoint import export_safetensors, load_checkpoint, packaged_starts, read_tensors
from vlabs.checkpoints.initialize import initialize
from vlabs.data.instances import read_instances
from vlabs.data.prepared import load_split
from vlabs.errors import UserError
from vlabs.models.heads import VQAHead
from vlabs.models.naming import WordHead
from vlabs.models.registry import build, register
from vlabs.models.topdown import AbSTopDown
from vlabs.models.variants.cross_attention import CrossAttention
from vlabs.models.variants.qa_vit import QAViT

# Two images of three patches; `<s> a b </s>`, `<s> b </s> <pad>` of the first, `<s> c </s> <pad>` of the second.
IDS = torch.tensor([[0, 4, 5, 2], [0, 5, 2, 1], [0, 6, 2, 1]])
INDEX = torch.tensor([0, 0, 1])
COVERAGE = torch.tensor([[0.5, 0.0, 0.2], [0.1, 1.0, 0.2], [0.0, 0.0, 0.9]])


def some_head(vocabulary=9):
    torch.manual_seed(0)
    return WordHead(4, vocabulary), torch.randn(2, 3, 4)


def test_loss_is_the_cross_entropy_of_patches_and_spoken_words_written_out():
    head, tokens = some_head()
    total = 0.0
    for image in range(2):
        for patch in range(3):
            for word in (4, 5, 6):
                said = [float(COVERAGE[n, patch]) for n in range(3) if INDEX[n] == image and word in IDS[n].tolist()]
                logit = head(tokens[image, patch])[word]
                total += F.binary_cross_entropy_with_logits(logit, torch.tensor(max(said, default=0.0)))
    torch.testing.assert_close(head.loss(tokens, IDS, INDEX, COVERAGE), total / 6)


def test_words_that_nobody_says_cost_nothing():
    head, tokens = some_head()
    head.loss(tokens, IDS, INDEX, COVERAGE).backward()
    changed = head.words.weight.grad.abs().sum(dim=1) > 0
    assert changed.nonzero()[:, 0].tolist() == [4, 5, 6]


def test_precision_is_the_share_of_a_texts_words_among_the_best_of_its_patch():
    head, tokens = some_head()
    with torch.no_grad():
        head.words.weight.zero_()
        head.words.bias.zero_()
        head.words.bias[[0, 1, 2]] = 9.0  # never counted: they are no words
        head.words.bias[5] = 2.0
        head.words.bias[6] = 1.0
    found = head.precision(tokens, IDS, INDEX, COVERAGE)
    assert found.tolist() == [0.5, 1.0, 0.0]
    unknown = COVERAGE.clone()
    unknown[1] = 0
    assert head.precision(tokens, IDS, INDEX, unknown).tolist() == [0.5, 0.0]


@pytest.fixture(scope="module")
def phrases(tiny_data, tmp_path_factory):
    """The prepared phrases of the tiny corpus."""
    folder = tmp_path_factory.mktemp("phrases") / "prepared"
    source = ScenesCaptions(tiny_data.parent / "raw", phrases=True)
    prepare(source, folder, Options())
    return folder


def test_every_instance_is_a_phrase_with_its_mask(phrases, tiny_data):
    annotations = tiny_data.parent / "raw/annotations.zip"
    rows = load_split(phrases, "val")
    ids = [n for row in rows for n in row["caption_id"]]
    found = read_instances(annotations, ids)
    by_image = {}
    for instance in found.values():
        by_image.setdefault(instance.image_id, set()).add(instance.annotation_id)
    assert {row["image_id"]: set(row["caption_id"]) for row in rows} == by_image
    for row in rows:
        assert row["target_instances"] == [[n] for n in row["caption_id"]]
        assert all(row["region"])
        assert all(len(text.split()) == 4 for text in row["caption"])
    manifest = json.loads((phrases / "manifest.json").read_text())
    assert manifest["options"]["phrases"] is True


def test_an_instance_of_coco_is_its_category_and_a_crowd_is_none(tiny_data, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for path in (tiny_data.parent / "raw").iterdir():
        if path.name != "annotations.zip":
            (raw / path.name).symlink_to(path)
    crowds, names = set(), {}
    with (
        zipfile.ZipFile(tiny_data.parent / "raw/annotations.zip") as archive,
        zipfile.ZipFile(raw / "annotations.zip", "w") as changed,
    ):
        for member in archive.namelist():
            content = json.loads(archive.read(member))
            by_id = {category["id"]: category["name"] for category in content["categories"]}
            for n, entry in enumerate(content["annotations"]):
                del entry["attributes"]
                names[entry["id"]] = by_id[entry["category_id"]]
                if n % 3 == 0:
                    entry["iscrowd"] = 1
                    crowds.add(entry["id"])
            changed.writestr(member, json.dumps(content))
    source = ScenesCaptions(raw, phrases=True)
    prepare(source, tmp_path / "out", Options())
    said = {
        n: text
        for row in load_split(tmp_path / "out", "val")
        for n, text in zip(row["caption_id"], row["caption"], strict=True)
    }
    assert said == {n: names[n] for n in said}
    of_val = {n for n in names if n // 100 // 1_000_000 == 1}
    assert set(said) == of_val - crowds


def test_phrases_without_instances_are_one_line(tiny_data, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for path in (tiny_data.parent / "raw").iterdir():
        if path.name != "annotations.zip":
            (raw / path.name).symlink_to(path)
    result = command(
        "data_prep.scenes_captions", "--raw-dir", raw, "--out-dir", tmp_path / "out", "--phrases", cwd=tmp_path
    )
    assert_one_line_error(result, "--phrases needs COCO's instances", str(raw))
    assert not (tmp_path / "out").exists()


def options_of(phrases):
    return [
        "task=naming", "data.size=tiny", f"data.dir={phrases}", "data.image_size=32", "data.num_workers=0",
        "data.batch_size=64", "trainer.enable_progress_bar=false", "logger=csv", *TINY_MODEL,
    ]  # fmt: skip


def test_naming_learns_words_trains_the_vit_alone_and_is_a_start_for_questions(phrases, tiny_options, tmp_path):
    rate = "task.recipe.lr={vision: 1.0e-2, head: 1.0e-2}"
    result = command(
        "vlabs.train", *options_of(phrases), "trainer.max_epochs=25", rate, "hydra.run.dir=run", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    metrics = metrics_of(tmp_path / "run")
    precision = [row["val/word_precision"] for row in metrics if row.get("val/word_precision")]
    assert float(precision[-1]) > float(precision[0]) + 20

    untrained = command(
        "vlabs.train", *options_of(phrases), "trainer.max_epochs=1", "task.recipe.lr={vision: 0.0, head: 0.0}",
        "hydra.run.dir=still", cwd=tmp_path,
    )  # fmt: skip
    assert untrained.returncode == 0, untrained.stderr
    before, after = (load_checkpoint(tmp_path / run).model.state_dict() for run in ("still", "run"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("vision.vit.") for name in changed)

    # Questions keep their own tokens: the text encoder has not learned those of the phrases.
    options = [*tiny_options, "logger=csv", "trainer.max_epochs=1", "init=run", "hydra.run.dir=answers"]
    started = command("vlabs.train", *options, cwd=tmp_path)
    assert started.returncode == 0, started.stderr
    header = read_tensors(tmp_path / "answers/checkpoints/best.ckpt")["vlabs"]
    own = (next(tmp_path.glob("answers")) / "config.yaml").read_text()
    assert "tokenizer: null" in own
    assert header["preprocessing"]["tokenizer"] != read_tensors(tmp_path / "run/checkpoints/best.ckpt")["vlabs"][
        "preprocessing"]["tokenizer"]  # fmt: skip
    assert [entry["task"] for entry in header["data"]["history"]] == ["naming"]


def test_naming_refuses_data_that_do_not_say_what_is_where(phrases, tmp_path, in_process):
    manifest = json.loads((phrases / "manifest.json").read_text())
    for counts in manifest["splits"].values():
        counts["captions_with_region"] = 0
    blind = tmp_path / "blind"
    blind.mkdir()
    for path in phrases.iterdir():
        if path.name != "manifest.json":
            (blind / path.name).symlink_to(path)
    (blind / "manifest.json").write_text(json.dumps(manifest))
    result = in_process("vlabs.train", [*options_of(blind), "hydra.run.dir=run"], tmp_path)
    assert_one_line_error(result, "task=naming", "--phrases")


def saved(model, answers, path, data=None):
    """A checkpoint of a model with a VQA head over some answers."""
    from vlabs.checkpoints.checkpoint import header_of
    from vlabs.data.preprocessing import Preprocessing

    preprocessing = Preprocessing(image_size=32, tokenizer="", names=answers)
    header = header_of(model, preprocessing, "vqa", data or {})
    torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}, "vlabs": header}, path)
    return path


def test_what_a_head_knows_of_an_answer_follows_the_answer(tmp_path):
    source, target = make_model(None), make_model(None)
    known, wanted = ("red", "two", "star"), ("star", "blue", "red", "green")
    source.head, target.head = (
        VQAHead(source.head.classifier[0].in_features, 3),
        VQAHead(source.head.classifier[0].in_features, 4),
    )
    source.spec = replace_head(source.spec, 3)
    fresh = target.head.classifier[3].weight.detach().clone()
    result = initialize(target, saved(source, known, tmp_path / "a.ckpt"), wanted)
    rows, old = target.head.classifier[3].weight, source.head.classifier[3].weight
    assert torch.equal(rows[0], old[2])
    assert torch.equal(rows[2], old[0])
    assert torch.equal(rows[[1, 3]], fresh[[1, 3]])
    assert torch.equal(target.head.classifier[3].bias[[0, 2]], source.head.classifier[3].bias[[2, 0]])
    assert "2 answers that both have" in result.report()
    # The same number of answers in another order is no reason to take them as they stand.
    same_size = make_model(None)
    same_size.head = VQAHead(source.head.classifier[0].in_features, 3)
    initialize(same_size, tmp_path / "a.ckpt", ("two", "star", "red"))
    assert torch.equal(same_size.head.classifier[3].weight, old[[1, 2, 0]])


@pytest.mark.parametrize("theirs", [True, False])
def test_decoders_come_with_the_arithmetic_that_they_were_trained_in(tmp_path, theirs):
    source, target = make_model(AbSTopDown(bias_again=theirs)), make_model(AbSTopDown(bias_again=False))
    if theirs:
        del source.spec["vision"]["topdown"]["bias_again"]  # a checkpoint of before
    result = initialize(target, saved(source, (), tmp_path / "a.ckpt"))
    assert target.vision.topdown.bias_again == build(target.spec).vision.topdown.bias_again == theirs
    assert ("bias_again=true" in result.report()) == theirs
    images, ids = torch.randn(2, 3, 16, 16), torch.randint(5, 30, (2, 6))
    same = (model(images, ids, torch.ones_like(ids)).logits for model in (source, target))
    torch.testing.assert_close(*same)
    plain = make_model(AbSTopDown(bias_again=False))
    initialize(plain, saved(make_model(None), (), tmp_path / "plain.ckpt"))
    assert not plain.vision.topdown.bias_again


@register
class OnceForAll(AbSTopDown):
    """A variant of a user, whose `bias_again` is no argument and so is not in its spec."""

    bias_again = False

    def __init__(self, alpha: float = 10.0) -> None:
        super().__init__(alpha, bias_again=False)


def test_the_arithmetic_of_a_variant_that_does_not_name_it_is_that_of_its_class(tmp_path):
    path = saved(make_model(OnceForAll()), (), tmp_path / "own.ckpt")
    for again in (False, True):
        target = make_model(AbSTopDown(bias_again=again))
        result = initialize(target, path)
        assert not target.vision.topdown.bias_again
        assert ("keeps its own arithmetic, model.vision.topdown.bias_again=false" in result.report()) == again
    result = initialize(make_model(OnceForAll()), saved(make_model(AbSTopDown()), (), tmp_path / "again.ckpt"))
    assert "bias_again=true, and is now read in another arithmetic" in result.report()


@pytest.mark.parametrize("architecture", [[1], "x", {"vision": 7}, {"vision": {"topdown": 5}}, {"class": ["x"]}])
def test_an_architecture_that_was_tampered_with_is_no_traceback(architecture, tmp_path):
    model = make_model(AbSTopDown())
    content = torch.load(saved(model, (), tmp_path / "a.ckpt"), weights_only=True)
    content["vlabs"]["architecture"] = architecture
    torch.save(content, tmp_path / "b.ckpt")
    assert initialize(make_model(AbSTopDown()), tmp_path / "b.ckpt").loaded


def replace_head(spec, answers):
    return spec | {"head": spec["head"] | {"num_answers": answers}}


def test_a_model_that_comes_with_vlabs_is_found_by_name_unless_a_folder_has_it(tmp_path, monkeypatch):
    assert set(packaged_starts()) == {"scenes", "scenes_search", "scenes_vit"}
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("scenes").task == "vqa"
    (tmp_path / "scenes").mkdir()
    with pytest.raises(UserError, match="no checkpoints/best.ckpt"):
        load_checkpoint("scenes")


def test_an_export_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    folder = tmp_path / "data/mine"
    data = {"dir": str(folder), "history": [{"task": "naming", "data": {"sets": [{"name": "a", "dir": str(folder)}]}}]}
    checkpoint = saved(make_model(None), tuple("abcde"), tmp_path / "a.ckpt", data)
    monkeypatch.chdir(tmp_path)
    header = read_tensors(export_safetensors(checkpoint, tmp_path / "a.safetensors"))["vlabs"]
    assert header["data"]["dir"] == "data/mine"
    assert header["data"]["history"][0]["data"]["sets"][0]["dir"] == "data/mine"
    monkeypatch.chdir("/")  # it is not in the current folder then
    header = read_tensors(export_safetensors(checkpoint, tmp_path / "b.safetensors"))["vlabs"]
    assert (Path("/") / header["data"]["dir"]) == folder


def test_what_comes_with_vlabs_is_small_has_a_card_and_saw_no_shipped_corpus():
    assert sum(path.stat().st_size for path in packaged_starts().values()) < 8_000_000
    for name, path in packaged_starts().items():
        card = path.with_suffix(".md").read_text()
        assert f"init={name}" in card or f"ckpt={name}" in card
        content = read_tensors(path)["vlabs"]
        folders = [content["data"]["dir"]]
        for entry in content["data"]["history"]:
            folders += [one["dir"] for one in entry["data"].get("sets", [entry["data"]])]
        # Neither what vlabs renders by itself, which is of seed 0, nor a path of the machine that it was made on.
        if name == "scenes_search":  # nothing is to start from it, and its card says what it saw
            assert folders.pop(0) == "data/scenes_captions-small"
            assert "30,000 captions of the embedded corpus" in card
        assert all(folder.startswith("data/start") for folder in folders)


def test_the_start_answers_points_and_continues_with_another_variant_and_other_answers(tiny_data, tmp_path):
    """The shipped weights are worth what their card says, on scenes that they were not trained on."""
    result = command(
        "vlabs.evaluate", "ckpt=scenes", f"data.dir={tiny_data}", "split=val", "hydra.run.dir=a", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "a/metrics.json").read_text())["not_yes_no"] > 85
    result = command(
        "vlabs.evaluate", "task=grounding", "ckpt=scenes", f"data.dir={tiny_data}", "split=val", "task.maps=[weights]",
        "hydra.run.dir=b", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "b/metrics.json").read_text())
    assert found["weights/energy"] > 3 * found["area"]
    assert found["weights/pointing"] > 60
    result = command(
        "vlabs.train", "experiment=scenes_vqa", "init=scenes", "model/topdown=none", f"data.dir={tiny_data}",
        "trainer.max_epochs=1", "trainer.limit_train_batches=1", "callbacks.grounding.every_n_validations=0",
        "callbacks.predictions.every_n_validations=0", "logger=csv", "hydra.run.dir=c", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "starts/scenes.safetensors" in result.stdout
    assert "  new (" not in result.stdout
    assert "the rows of the 17 answers that both have" in result.stdout
    # One step at a rate that is still warming up changes little: it continues from what it knew.
    assert json.loads((tmp_path / "c/summary.json").read_text())["metrics"]["val/vqa_accuracy/other"] > 20


def test_layers_of_a_variant_start_those_of_the_same_variant_alone(tmp_path):
    source = make_model(QAViT())
    for layer in source.vision.topdown.layers:
        layer.gate.data.fill_(0.5)
    path = saved(source, (), tmp_path / "a.ckpt")
    for topdown in (QAViT(), CrossAttention(num_heads=2)):  # whose gates have the same names
        target = make_model(topdown)
        fresh = {name: float(value) for name, value in target.state_dict().items() if name.endswith(".gate")}
        result = initialize(target, path)
        is_same = isinstance(topdown, QAViT)
        wanted = dict.fromkeys(fresh, 0.5) if is_same else fresh
        assert {name: float(target.state_dict()[name]) for name in fresh} == wanted != {}
        assert (fresh.keys() <= {*result.loaded}) == is_same
