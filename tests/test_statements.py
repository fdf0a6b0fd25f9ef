"""Statements with a label: SNLI-VE and NLVR2 from their raw layouts, the embedded ones, two images a sentence."""

import io
import json
import tarfile
import zipfile
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, areas_by_hand, assert_one_line_error, command
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from data_prep.engine.pipeline import Options, prepare
from data_prep.readers.nlvr2 import NLVR2
from data_prep.readers.snli_ve import SNLIVE
from data_prep.scenes.corpus import make_scenes
from data_prep.scenes.render import SIZES
from vlabs.attention.maps import look
from vlabs.attention.pictures import questions_figure
from vlabs.checkpoints.checkpoint import Checkpoint, header_of, load_checkpoint
from vlabs.checkpoints.initialize import initialize
from vlabs.data.images import decode_region
from vlabs.data.module import Wants
from vlabs.data.prepared import load_split, read_labels, read_manifest
from vlabs.data.preprocessing import decode_image
from vlabs.data.statements import StatementDataModule
from vlabs.errors import UserError
from vlabs.evaluation.faithfulness import FaithfulnessEvaluation
from vlabs.evaluation.results import Results, Setting
from vlabs.metrics.statements import consistency
from vlabs.prediction.predictor import Predictor
from vlabs.runs.groups import config_dir
from vlabs.training.build import build_task

TINY = [*TINY_MODEL, "data.size=tiny", "data.image_size=32", "data.num_workers=0", "trainer.enable_progress_bar=false"]


def jpeg(shade, size=(40, 30)):
    content = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 255 - shade)).save(content, "JPEG")
    return content.getvalue()


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def nlvr2_line(identifier, sentence, label, **more):
    """A line as in nlvr2/data of the dataset's repository."""
    line = {"validation": {"77": label}, "sentence": sentence, "left_url": "https://a/1.jpg", "writer": "103"}
    line |= {"label": label, "right_url": "https://a/2.jpg", "synset": "beer bottle", "query": "some beer bottles2"}
    return line | {"identifier": identifier, "extra_validations": {"56": label}} | more


def add_to_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for shade, name in names.items():
            archive.writestr(name, jpeg(shade))


def add_to_tar(path, names):
    with tarfile.open(path, "w") as archive:
        for shade, name in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(jpeg(shade))
            archive.addfile(member, io.BytesIO(jpeg(shade)))


@pytest.fixture
def nlvr2_raw(tmp_path):
    """Training images in folders, dev's in a zip file as they are downloaded, test1's in a tar file."""
    raw = tmp_path / "nlvr2-raw"
    of_train = [nlvr2_line("train-7-0-0", "A dog.", "True", directory=3), nlvr2_line("train-7-1-0", "A dog.", "False")]
    write_lines(raw / "train.json", of_train)
    of_dev = [
        nlvr2_line("dev-850-1-0", "Two dogs are out.", "False"),
        nlvr2_line("dev-850-0-0", "Two dogs are out.", "True"),
        nlvr2_line("dev-850-0-1", "One dog is in.", "False"),
    ]
    write_lines(raw / "dev.json", of_dev)
    write_lines(raw / "balanced/balanced_dev.json", of_dev[:1])
    write_lines(
        raw / "test1.json", [{k: v for k, v in nlvr2_line("test1-1-3-1", "A cat.", "").items() if k != "label"}]
    )
    folder = raw / "images/train/3"
    folder.mkdir(parents=True)
    for pair in (0, 1):
        for side in (0, 1):
            (folder / f"train-7-{pair}-img{side}.png").write_bytes(jpeg(10 + 2 * pair + side))
    add_to_zip(raw / "dev_img.zip", {20 + 2 * p + s: f"dev/dev-850-{p}-img{s}.png" for p in (0, 1) for s in (0, 1)})
    add_to_tar(raw / "test1_img.tar", {30 + s: f"test1/test1-1-3-img{s}.png" for s in (0, 1)})
    return raw


def test_nlvr2_is_read_as_it_is_downloaded(nlvr2_raw, tmp_path):
    prepare(NLVR2(nlvr2_raw), tmp_path / "out", Options(vocab_size=300))
    assert read_labels(tmp_path / "out") == ["False", "True"]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["pictures"] == 2
    assert set(manifest["splits"]) == {"train", "dev", "test1", "balanced_dev"}
    first, second = load_split(tmp_path / "out", "dev")  # pairs in the order in which they appear, each once
    assert (first["image"], first["image_2"]) == (jpeg(22), jpeg(23))
    assert (second["image"], second["image_2"]) == (jpeg(20), jpeg(21))
    assert second["key"] == ["dev-850-0-0", "dev-850-0-1"]
    assert second["statement"] == ["Two dogs are out.", "One dog is in."]
    assert second["label"] == [1, 0]
    train = load_split(tmp_path / "out", "train")
    assert [row["image_2"] for row in train] == [jpeg(11), jpeg(13)]
    (test,) = load_split(tmp_path / "out", "test1")
    assert (test["image"], test["label"]) == (jpeg(30), [-1])


def test_a_pair_that_lacks_an_image_is_named_and_can_be_left_out(nlvr2_raw, tmp_path):
    (nlvr2_raw / "images/train/3/train-7-1-img1.png").unlink()
    with pytest.raises(UserError, match=r"missing image: 1.*train-7-1-img1.png \(image_2\)"):
        prepare(NLVR2(nlvr2_raw), tmp_path / "out", Options(vocab_size=0))
    assert not (tmp_path / "out").exists()
    prepare(NLVR2(nlvr2_raw), tmp_path / "out", Options(vocab_size=0, on_bad="skip"))
    assert read_manifest(tmp_path / "out")["splits"]["train"]["statements"] == 1


def test_a_second_image_that_was_mended_is_read_again(nlvr2_raw, tmp_path):
    whole = nlvr2_raw / "images/train/3/train-7-1-img1.png"
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"unreadable image: 1.*train-7-1-img1.png"):
        prepare(NLVR2(nlvr2_raw), tmp_path / "out", Options(vocab_size=0))
    whole.write_bytes(content)
    prepare(NLVR2(nlvr2_raw), tmp_path / "out", Options(vocab_size=0))
    assert load_split(tmp_path / "out", "train")[1]["image_2"] == content


def snli_ve_line(pair_id, picture, hypothesis, label):
    """A line as in snli_ve_train.jsonl."""
    return {
        "annotator_labels": [label, label],
        "captionID": pair_id.split("r")[0],
        "gold_label": label,
        "pairID": pair_id,
        "sentence1": "Two women are embracing.",
        "sentence1_binary_parse": "( ( Two women ) . )",
        "sentence2": hypothesis,
        "Flickr30K_ID": picture,
    }


@pytest.fixture
def snli_ve_raw(tmp_path):
    raw = tmp_path / "snli_ve-raw"
    lines = [
        snli_ve_line("4705552913.jpg#2r1n", "4705552913", "The sisters are hugging.", "neutral"),
        snli_ve_line("4705552913.jpg#2r1e", "4705552913", "Two women hold each other.", "entailment"),
        snli_ve_line("36979.jpg#0r1c", "36979", "The men are fighting.", "contradiction"),
    ]
    write_lines(raw / "snli_ve_train.jsonl", lines)
    write_lines(raw / "snli_ve_dev.jsonl", lines[:2])
    names = {40: "flickr30k-images/4705552913.jpg", 41: "flickr30k-images/36979.jpg"}
    add_to_tar(raw / "flickr30k-images.tar", names)
    return raw


def test_snli_ve_is_read_as_it_is_downloaded(snli_ve_raw, tmp_path):
    prepare(SNLIVE(snli_ve_raw), tmp_path / "out", Options(vocab_size=0))
    assert read_labels(tmp_path / "out") == ["contradiction", "neutral", "entailment"]
    first, second = load_split(tmp_path / "out", "train")
    assert (first["image"], second["image"]) == (jpeg(40), jpeg(41))
    assert first["statement"] == ["The sisters are hugging.", "Two women hold each other."]
    assert first["label"] == [1, 2]
    assert first["key"] == ["4705552913.jpg#2r1n", "4705552913.jpg#2r1e"]
    assert second["label"] == [0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"gold_label": "-"},
            r"unknown label: 1.*36979.jpg#0r1c \('-', not one of contradiction, neutral, entailment\)",
        ),
        ({"pairID": "4705552913.jpg#2r1n"}, "duplicate statement id"),
        ({"sentence2": " "}, "empty statement"),
        ({"Flickr30K_ID": "1"}, "missing image: 1.*1.jpg"),
        ({"sentence2": 3}, "line 3: 'statement' must be text, not 3"),
        ({"Flickr30K_ID": 36979}, "line 3: 'Flickr30K_ID' must be text"),
    ],
)
def test_bad_statements_are_named(snli_ve_raw, tmp_path, change, says):
    lines = [json.loads(line) for line in (snli_ve_raw / "snli_ve_train.jsonl").read_text().splitlines()]
    write_lines(snli_ve_raw / "snli_ve_train.jsonl", [*lines[:2], lines[2] | change])
    with pytest.raises(UserError, match=says):
        prepare(SNLIVE(snli_ve_raw), tmp_path / "out", Options(vocab_size=0))
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read_are_named(snli_ve_raw, nlvr2_raw, tmp_path):
    (snli_ve_raw / "snli_ve_dev.jsonl").write_text('{"pairID": "1"\n')
    with pytest.raises(UserError, match=r"snli_ve_dev.jsonl, line 1 is not JSON"):
        prepare(SNLIVE(snli_ve_raw), tmp_path / "out", Options(vocab_size=0))
    (snli_ve_raw / "flickr30k-images.tar").rename(snli_ve_raw / "flickr30k-images.tar.gz")
    with pytest.raises(UserError, match=r"flickr30k-images.tar.gz is compressed.*gunzip"):
        prepare(SNLIVE(snli_ve_raw), tmp_path / "out", Options(vocab_size=0))
    write_lines(nlvr2_raw / "dev.json", [nlvr2_line("dev-850", "Two dogs.", "True")])
    with pytest.raises(UserError, match=r"dev.json, line 1: 'identifier' must be like dev-850-0-1"):
        prepare(NLVR2(nlvr2_raw), tmp_path / "out", Options(vocab_size=0))
    (tmp_path / "out").mkdir()
    for raw_class, named in ((SNLIVE, "snli_ve_train.jsonl"), (NLVR2, "train.json")):
        with pytest.raises(UserError, match=named):
            raw_class(tmp_path / "out")


# --- the embedded layouts --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Both layouts, raw and prepared, of 60 training images."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, raw_class in (("snli_ve", SNLIVE), ("nlvr2", NLVR2)):
        make_scenes("tiny", folder / f"{name}-raw", num_workers=1, train_images=60, layout=name)
        prepare(raw_class(folder / f"{name}-raw"), folder / name, Options(vocab_size=400))
    return folder


def attributes_of(raw):
    """What the objects of every image are, and where, read back from the instances."""
    found = defaultdict(dict)
    with zipfile.ZipFile(raw / "annotations.zip") as archive:
        for name in archive.namelist():
            for instance in json.loads(archive.read(name))["annotations"]:
                x, y, width, height = instance["bbox"]
                place = {"x": x + width / 2, "y": y + height / 2}
                found[instance["image_id"]][instance["id"]] = instance["attributes"] | place
    return found


def matches(item, noun):
    return all(word == "object" or word in item.values() for word in noun.split())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_hypotheses_are_as_labelled_and_their_words_tell_nothing(layouts):
    raw = layouts / "snli_ve-raw"
    objects = attributes_of(raw)
    size = SIZES["tiny"]
    for split in ("train", "dev", "test"):
        labels = defaultdict(Counter)
        for line in lines_of(raw / f"snli_ve_{split}.jsonl"):
            text = line["sentence2"]
            labels[text][line["gold_label"]] += 1
            subject, said = text.removeprefix("The ").removesuffix(".").split(" is ")
            there = [item for item in objects[int(line["Flickr30K_ID"])].values() if matches(item, subject)]
            relation = next((r for r in ("left of", "right of", "above", "below") if said.startswith(r)), None)
            if relation:
                anchor = said.removeprefix(f"{relation} the ")
                anchors = [item for item in objects[int(line["Flickr30K_ID"])].values() if matches(item, anchor)]
                axis, sign = ("x" if "of" in relation else "y"), (1 if relation in ("right of", "below") else -1)
                true = [sign * (a[axis] - b[axis]) > 0 for a in there for b in anchors]
            else:
                true = [said.split()[-1] in item.values() for item in there]
            expected = "neutral" if not true else "entailment" if all(true) else "contradiction"
            assert line["gold_label"] == expected, text
            assert expected != "contradiction" or not any(true), text
            assert not any(pair in text for pair in (f"{c} {s} " for c, s in size.held_out))
            assert bool(line["target_instances"]) >= (expected != "neutral")
        assert all(len(set(counts.values())) == 1 and len(counts) == 3 for counts in labels.values())
    assert json.loads((raw / "scenes.json").read_text())["statement_only_accuracy"]["dev"] <= 34


def holds(sentence, left, right):
    """Whether a sentence is true of a pair, worked out from its words alone."""
    words = sentence.removesuffix(".").split()

    def count(items, noun):
        return sum(matches(item, noun) for item in items.values())

    def noun_after(word):
        return " ".join(words[words.index(word) + 1 :])

    if words[0] == "There":
        article = "an" if "an" in words else "a"
        noun = noun_after(article).removesuffix(" in the left picture").removesuffix(" in the right picture")
        return count(left if "left" in words else right, noun) > 0
    if words[0] in ("Both", "Exactly", "Neither"):
        noun = noun_after("an" if "an" in words else "a")
        shown = (count(left, noun) > 0) + (count(right, noun) > 0)
        return shown == {"Both": 2, "Exactly": 1, "Neither": 0}[words[0]]

    def singular(noun):
        return noun.removesuffix("es") if noun.endswith("crosses") else noun.removesuffix("s")

    if words[:2] == ["The", "pictures"]:
        number, noun = words[3], " ".join(words[4:-2])
        n = ("no", "one", "two", "three", "four").index(number)
        noun = noun if n == 1 else singular(noun)
        return count(left, noun) + count(right, noun) == n
    noun = singular(" ".join(words[words.index("more") + 1 : words.index("than")]))
    more, less = (left, right) if words[1] == "left" else (right, left)
    return count(more, noun) > count(less, noun)


def test_sentences_about_pairs_are_as_labelled_and_true_of_half(layouts):
    raw = layouts / "nlvr2-raw"
    objects = attributes_of(raw)
    for split in ("train", "dev", "test1"):
        truths = defaultdict(list)
        kinds = Counter()
        for line in lines_of(raw / f"{split}.json"):
            left, right = (objects[int(line[f"{side}_url"].split("/")[1])] for side in ("left", "right"))
            assert (line["label"] == "True") == holds(line["sentence"], left, right), line["sentence"]
            _, number, _, sentence = line["identifier"].split("-")
            truths[number, sentence].append(line["label"])
            kinds[" ".join(line["sentence"].split()[:2])] += 1
            assert set(line["target_instances"]) <= set(left)
            assert set(line["target_instances_right"]) <= set(right)
        assert all(Counter(labels) == {"True": 2, "False": 2} for labels in truths.values())
    assert len(kinds) >= 4


def test_a_layout_is_a_function_of_size_seed_and_images(layouts, tmp_path):
    make_scenes("tiny", tmp_path / "again", num_workers=2, train_images=60, layout="nlvr2")
    for path in (layouts / "nlvr2-raw").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="another size, seed, layout"):
        make_scenes("tiny", tmp_path / "again", num_workers=1, train_images=60, layout="snli_ve")
    with pytest.raises(UserError, match="--layout is 'gqa', and has to be one of vqa, nlvr2, snli_ve"):
        make_scenes("tiny", tmp_path / "other", layout="gqa")


def test_each_image_of_a_pair_has_its_own_region(layouts):
    boxes = {}
    with zipfile.ZipFile(layouts / "nlvr2-raw/annotations.zip") as archive:
        for instance in json.loads(archive.read("annotations/instances_dev.json"))["annotations"]:
            boxes[instance["id"]] = instance["bbox"]
    lines = {line["identifier"]: line for line in lines_of(layouts / "nlvr2-raw/dev.json")}
    seen = set()
    for row in load_split(layouts / "nlvr2", "dev"):
        for position, key in enumerate(row["key"]):
            for column, named in (("region", "target_instances"), ("region_2", "target_instances_right")):
                targets = lines[key][named]
                assert bool(row[column][position]) == bool(targets)
                if len(targets) == 1:
                    rows, columns = np.nonzero(decode_region(row[column][position], "it"))
                    x, y, width, height = boxes[targets[0]]
                    assert (columns.min(), rows.min()) == (x, y)
                    assert (columns.max() + 1 - x, rows.max() + 1 - y) == (width, height)
                    seen.add(column)
    assert seen == {"region", "region_2"}


# --- the model -------------------------------------------------------------------------------------------------------


def build(task, folder, *overrides):
    with initialize_config_dir(config_dir(), version_base="1.3"):
        options = [f"task={task}", f"data.dir={folder}", "data.statements_per_image=2", "model.fusion.dropout=0"]
        return build_task(compose("train", [*options, *TINY, *overrides]))


def test_two_images_are_two_passes_under_one_prior_joined_before_the_head(layouts):
    task, data = build("nlvr2", layouts / "nlvr2")
    model = task.model.eval()
    with torch.no_grad():
        model.fusion.token_type.weight[2] += 0.3  # as training would
    batch = next(iter(data.val_dataloader()))
    assert batch.image_index.shape == (len(batch.keys), 2)
    assert batch.image_index.unique().numel() < batch.image_index.numel()  # sentences share their pairs
    output = task(batch)
    one = model(batch.images, batch.input_ids[:1], batch.attention_mask[:1], batch.image_index[:1])
    assert torch.allclose(one.logits, output.logits[:1], atol=1e-5)
    pooled = []
    for side in (0, 1):
        images = batch.images[batch.image_index[:, side]]  # an image a sentence, nothing shared
        text = model.text(batch.input_ids, batch.attention_mask)
        seen = model.vision.attend(
            model.vision.encode(images), model.prior_of(text, batch.input_ids, batch.attention_mask)
        )
        types = model.fusion.token_type.weight.detach().clone()
        with torch.no_grad():
            model.fusion.token_type.weight[1] = types[1 + side]
        pooled.append(model.fusion(text, batch.attention_mask, seen.tokens).pooled)
        with torch.no_grad():
            model.fusion.token_type.weight[1] = types[1]
    assert torch.allclose(output.logits, model.head(torch.cat(pooled, dim=1)), atol=1e-5)
    assert output.pooled_features.shape == (len(batch.keys), 4 * model.fusion.width)


def test_the_images_of_a_statement_are_no_wrong_choices_for_its_prior(layouts):
    task, data = build("nlvr2", layouts / "nlvr2", "task.prior_weight=1.0")
    task.train()
    batch = next(iter(data.train_dataloader()))
    seen = {}
    task.prior_loss.forward = lambda prior, state, ids: seen.update(prior=prior, ids=ids) or prior.sum()
    task.losses(batch)
    assert torch.equal(seen["ids"], batch.image_ids.repeat_interleave(2))
    assert torch.equal(seen["prior"][::2], seen["prior"][1::2])


def test_regions_of_both_images_are_learnt(layouts):
    task, data = build("nlvr2", layouts / "nlvr2")
    task.train()
    data.wants = Wants(task.model.vision.grid_size)
    batch = next(iter(data.train_dataloader()))
    assert batch.coverage.shape == (2 * len(batch.keys), 16)
    losses = task.losses(batch)
    assert set(losses.others) == {"reconstruction", "prior", "region_prior", "alive_prior"}
    known = torch.tensor([batch.coverage[n].sum() for n in range(len(batch.coverage))]) > 0
    assert known[::2].any()
    assert known[1::2].any()
    expected = task.region_prior_loss(  # of each image under its statement's prior, one at a time
        seen := task(batch).prior,
        task.model.vision.encode(batch.images).tokens[:, 1:],
        batch.image_index.flatten(),
        batch.coverage,
    )
    assert len(seen) == 2 * len(batch.keys)
    assert torch.allclose(losses.others["region_prior"], expected, atol=1e-5)


def test_patches_of_both_images_are_taken_away_together(layouts, tmp_path):
    task, data = build("nlvr2", layouts / "nlvr2")
    checkpoint = Checkpoint(task.model.eval(), data.preprocessing, "nlvr2", {}, tmp_path)
    trainer = OmegaConf.create({"accelerator": "cpu", "enable_progress_bar": False})
    results = Results("faithfulness", checkpoint, Setting("dev", tmp_path, trainer))
    FaithfulnessEvaluation(["norm", "relevance"], num_texts=3, batch_size=6).measure(checkpoint, data, results)
    for record in results.rows:
        row = next(row for row in load_split(layouts / "nlvr2", "dev") if record["id"] in row["statement_id"])
        label = row["label"][row["statement_id"].index(record["id"])]
        images = torch.stack([data.preprocessing.image(decode_image(row[one], "")) for one in ("image", "image_2")])
        ids, mask = data.preprocessing.pad(data.preprocessing.token_ids([record["text"]]))
        values = look(task.model, images, ids, mask, ["norm"])[1]["norm"]
        assert values.shape == (2, 4, 4)

        def score(taken):
            left = images.clone()  # noqa: B023
            for patch in taken:
                top, start = 8 * (patch % 16 // 4), 8 * (patch % 4)
                left[patch // 16, :, top : top + 8, start : start + 8] = 0
            best = task.model(left, ids, mask, torch.tensor([[0, 1]])).logits.argmax()  # noqa: B023
            return 100.0 * (int(best) == label)  # noqa: B023

        deletion, insertion = areas_by_hand(values.flatten().argsort(descending=True).tolist(), score)
        assert record["norm"]["deletion"] == pytest.approx(deletion)
        assert record["norm"]["insertion"] == pytest.approx(insertion)
    assert "norm/relevance" in results.rows[0]["agreement"]
    assert results.metrics["words by relevance/deletion"] >= 0
    hypotheses = build("snli_ve", layouts / "snli_ve")[1]
    with pytest.raises(UserError, match="holds statements with a label"):
        FaithfulnessEvaluation(["norm"]).measure(checkpoint, hypotheses, results)


def test_a_second_image_starts_as_the_first(layouts, tiny_run, tmp_path):
    fresh, _ = build("nlvr2", layouts / "nlvr2")
    types = fresh.model.fusion.token_type.weight
    assert torch.equal(types[1], types[2])
    source = load_checkpoint(tiny_run[0]).model
    found = initialize(fresh.model, tiny_run[0])
    assert torch.equal(fresh.model.fusion.token_type.weight[:2], source.fusion.token_type.weight)
    assert torch.equal(fresh.model.fusion.token_type.weight[2], source.fusion.token_type.weight[1])
    assert any("a second image's is the first's" in line for line in found.derived)
    # And back: a model of one image takes the first's.
    state = {f"model.{name}": value for name, value in fresh.model.state_dict().items()}
    header = header_of(fresh.model, fresh.preprocessing, "nlvr2", {})
    torch.save({"vlabs": header, "state_dict": state}, tmp_path / "pairs.ckpt")
    one, _ = build("snli_ve", layouts / "snli_ve")
    initialize(one.model, tmp_path / "pairs.ckpt")
    assert torch.equal(one.model.fusion.token_type.weight, types[:2])
    assert "head.classifier.0.weight" in found.left_out


def test_statements_without_a_label_are_not_trained_on_and_not_scored(layouts, tmp_path):
    raw = tmp_path / "raw"
    make_scenes("tiny", raw, num_workers=1, train_images=30, layout="snli_ve")
    lines = lines_of(raw / "snli_ve_train.jsonl")
    for line in lines[::3]:
        del line["gold_label"]
    write_lines(raw / "snli_ve_train.jsonl", lines)
    prepare(SNLIVE(raw), tmp_path / "out", Options(vocab_size=400))
    task, data = build("snli_ve", tmp_path / "out")
    trained = [key for batch in data.train_dataloader() for key in batch.keys]
    assert sorted(trained) == sorted(line["pairID"] for n, line in enumerate(lines) if n % 3)
    batch = next(iter(data.eval_dataloader("train")))
    assert (batch.labels == -1).any()
    losses = task.eval().losses(batch)
    known = batch.labels >= 0
    expected = torch.nn.functional.cross_entropy(task(batch).logits[known], batch.labels[known])
    assert torch.allclose(losses.task["snli_ve"], expected, atol=1e-6)
    assert len(losses.right["snli_ve"]) == known.sum()


def test_consistency_is_the_datasets_own():
    identifiers = [f"test1-{s}-{pair}-{n}" for s in range(30) for pair in range(4) for n in range(2)]
    right = (np.random.default_rng(0).random(len(identifiers)) < 0.8).tolist()
    sentences = {}
    for identifier, is_right in zip(identifiers, right, strict=True):
        parts = identifier.split("-")
        parts[2] = ""
        sentences.setdefault("-".join(parts), []).append(is_right)
    assert len(sentences) == 60
    assert consistency(identifiers, right) == pytest.approx(100 * np.mean([all(v) for v in sentences.values()]))


# --- the command line ------------------------------------------------------------------------------------------------


def test_pairs_are_trained_measured_and_predicted_from_the_command_line(layouts, tmp_path):
    few = [*TINY, "data.batch_size=32", "trainer.max_epochs=1", "logger=csv", f"data.dir={layouts / 'nlvr2'}"]
    result = command("vlabs.train", "task=nlvr2", *few, "hydra.run.dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "val/nlvr2_accuracy" in (tmp_path / "run/metrics.csv").read_text()
    evaluate = ["task=nlvr2", "ckpt=run", "split=dev", "data.num_workers=0", "hydra.run.dir=ev"]
    result = command("vlabs.evaluate", *evaluate, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "ev/metrics.json").read_text())
    lines = {line["identifier"]: line["label"] for line in lines_of(layouts / "nlvr2-raw/dev.json")}
    guessed = dict(line.split(",") for line in (tmp_path / "ev/predictions.csv").read_text().splitlines())
    right = [guessed[key] == label for key, label in lines.items()]
    assert metrics["accuracy"] == pytest.approx(100 * np.mean(right))
    assert metrics["consistency"] == pytest.approx(consistency(list(lines), right))
    assert sum(sum(row.values()) for row in metrics["confusion"].values()) == len(lines)
    assert Image.open(tmp_path / "ev/figures/confusion.png").size[0] > 200
    with zipfile.ZipFile(layouts / "nlvr2-raw/dev_img.zip") as archive:
        archive.extractall(tmp_path)
    pair = [f"dev/dev-0-0-img{side}.png" for side in (0, 1)]
    asked = ["--ckpt", "run", "--question", next(iter(lines_of(layouts / "nlvr2-raw/dev.json")))["sentence"]]
    result = command("vlabs.predict", *asked, "--image", pair[0], "--image", pair[1], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shares = [float(line.split("%")[0]) for line in result.stdout.splitlines() if "%  " in line]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert f"{max(shares):.1f}%  {guessed['dev-0-0-0']}" in result.stdout
    wrong = command("vlabs.predict", *asked, "--image", pair[0], cwd=tmp_path)
    assert_one_line_error(wrong, "needs 2 images at a time, but 1 are given")
    with pytest.raises(UserError, match="a second look is at one image, and this model reads 2 at a time"):
        Predictor(load_checkpoint(tmp_path / "run")).answer(pair, ["a"], second_look="crop")


def test_entailment_is_trained_and_measured(layouts, tmp_path, in_process):
    few = [*TINY, "data.batch_size=64", "trainer.max_epochs=1", "logger=csv", f"data.dir={layouts / 'snli_ve'}"]
    result = in_process("vlabs.train", ["task=snli_ve", *few, "hydra.run.dir=run"], tmp_path)
    assert result.returncode == 0, result.stderr
    evaluate = ["ckpt=run", "split=train", "data.num_workers=0"]
    result = in_process("vlabs.evaluate", ["task=snli_ve", *evaluate, "hydra.run.dir=ev"], tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "ev/metrics.json").read_text())
    assert set(metrics["confusion"]) == {"contradiction", "neutral", "entailment"}
    assert "consistency" not in metrics
    # A figure says what a prediction says.
    asked, picture = ["a red circle", "there is nothing"], Image.new("RGB", (50, 40), "red")
    answers = Predictor(load_checkpoint(tmp_path / "run")).answer(picture, asked, top=3)
    assert [sum(share for _, share in one.answers) for one in answers] == pytest.approx([1, 1])
    checkpoint = load_checkpoint(tmp_path / "run")
    figure = questions_figure(checkpoint, [picture], asked, "norm")
    shown = {text.get_text() for axis in figure.axes for text in (axis.title, axis.xaxis.label, *axis.texts)}
    assert {f"{one.answers[0][0]} {one.answers[0][1]:.0%}" for one in answers} <= shown
    result = in_process("vlabs.evaluate", ["task=grounding", *evaluate, "hydra.run.dir=gr"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "gr/metrics.json").read_text())["texts"] > 20
    result = in_process("vlabs.evaluate", ["task=nlvr2", *evaluate], tmp_path)
    assert_one_line_error(result, "was trained for the task 'snli_ve'", "not two")


def test_what_does_not_fit_is_one_line(layouts, tmp_path, in_process):
    options = [*TINY, "logger=csv", "trainer.max_epochs=1", "hydra.run.dir=run"]
    wrong = ["task=nlvr2", "data=scenes_snli_ve", f"data.dir={layouts / 'snli_ve'}", *options]
    assert_one_line_error(in_process("vlabs.train", wrong, tmp_path), "2 images per statement", "data=scenes_nlvr2")
    wrong = ["task=nlvr2", f"data.dir={layouts / 'nlvr2'}", "task.token_prior_weight=1", *options]
    assert_one_line_error(in_process("vlabs.train", wrong, tmp_path), "task.token_prior_weight", "pairs")
    wrong = ["task=snli_ve", "data=snli_ve", f"data.dir={tmp_path / 'nowhere'}", "hydra.run.dir=run"]
    assert_one_line_error(in_process("vlabs.train", wrong, tmp_path), "nowhere", "no manifest.json")


def test_an_image_of_a_pair_that_rots_later_is_named(layouts):
    rows = load_split(layouts / "nlvr2", "dev").select(range(2)).to_list()
    rows[1]["image_2"] = rows[1]["image_2"][:200]
    _, data = build("nlvr2", layouts / "nlvr2", "data.on_bad=skip")
    import datasets

    from vlabs.data.images import ImageReader
    from vlabs.data.sampling import BatchSpec, Group

    made = datasets.Dataset.from_list(rows, load_split(layouts / "nlvr2", "dev").features)
    spec = BatchSpec(0, [Group(0, (0, 1)), Group(1, (0,))])
    with pytest.raises(UserError, match=rf"image {rows[1]['image_id']} \(2 of 2\) is not a whole image"):
        ImageReader(made, data.preprocessing, pictures=2).read_batch(spec)
    read = ImageReader(made, data.preprocessing, on_bad="skip", pictures=2).read_batch(spec)
    assert (len(read.images), read.image_index, read.skipped) == (2, [0, 0], [rows[1]["image_id"]])


def test_augmentation_moves_each_image_of_a_pair_by_itself_and_its_region_with_it(layouts):
    data = StatementDataModule(layouts / "nlvr2", image_size=32, num_workers=0, rand_augment="rand-m9-n2")
    data.wants = Wants((4, 4))
    plain = StatementDataModule(layouts / "nlvr2", image_size=32, num_workers=0)
    plain.wants = Wants((4, 4))
    moved, still = (next(iter(module.train_dataloader())) for module in (data, plain))
    assert moved.keys == still.keys
    changed = (moved.coverage - still.coverage).abs().sum(dim=1) > 1e-6
    assert changed[::2].any()
    assert changed[1::2].any()
    again = next(
        iter(
            StatementDataModule(
                layouts / "nlvr2", image_size=32, num_workers=0, rand_augment="rand-m9-n2"
            ).train_dataloader()
        )
    )
    assert torch.equal(again.images, moved.images)
