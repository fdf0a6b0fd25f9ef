"""Grounding from the command line, and the maps that are measured."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import areas_by_hand, assert_one_line_error, command
from PIL import Image
from scipy.stats import spearmanr
from test_models import make_model
from tiny_models import save_tiny

from vlabs.attention.gradients import best_score, inputs_of, normgrad
from vlabs.attention.maps import MAPS, default_map, look, look_and_read
from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.instances import crop_map, crop_mask, read_instances, resize_area
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import decode_image
from vlabs.look import load
from vlabs.metrics.grounding import energy_inside, rank_correlation, read_hat, to_pixels
from vlabs.metrics.vqa import answer_accuracy
from vlabs.models.topdown import PerceiverIO
from vlabs.models.variants.codebook import Codebook


@pytest.fixture(scope="module")
def measured(tiny_run, tiny_data, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("grounding")
    result = command(
        "vlabs.evaluate", "task=grounding", f"ckpt={tiny_run[0]}", "split=val", "task.num_texts=30",
        f"task.instances={tiny_data.parent / 'raw/annotations.zip'}", "hydra.run.dir=out", cwd=cwd,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (cwd / "out/grounding.jsonl").read_text().splitlines()]
    return json.loads((cwd / "out/metrics.json").read_text()), records, result


def test_the_table_has_every_map_and_measure_with_an_interval_around_the_mean(measured):
    metrics, records, result = measured
    for name in MAPS:
        assert f"\n| {name} " in result.stdout
        for measure in ("energy", "pointing", "ap", "iou"):
            low, high = metrics[f"{name}/{measure}_interval"]
            mean = 100 * np.mean([record["maps"][name][measure] for record in records])
            assert metrics[f"{name}/{measure}"] == pytest.approx(mean)
            assert low <= mean <= high
        joint = [np.sqrt(record["right"] / 100 * record["maps"][name]["energy"]) for record in records]
        assert metrics[f"{name}/right_energy"] == pytest.approx(100 * np.mean(joint))
    assert {record["right"] > 0 for record in records} == {True, False}
    assert metrics["right"] == pytest.approx(np.mean([record["right"] for record in records]))


def test_grounding_in_validation_is_what_evaluation_finds(tiny_run, tiny_data, tmp_path, in_process):
    run = tiny_run[0]
    result = in_process(
        "vlabs.evaluate",
        ["task=grounding", f"ckpt={run / 'checkpoints/last.ckpt'}", "split=val", "task.num_texts=30",
         f"task.instances={tiny_data.parent / 'raw/annotations.zip'}", "task.maps=[norm,fusion]", "hydra.run.dir=out"],
        tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    logged = json.loads((run / "summary.json").read_text())["metrics"]
    for name in ("norm", "fusion"):
        assert logged[f"val/grounding/{name}_energy"] == pytest.approx(found[f"{name}/energy"], rel=1e-4)
    assert logged["val/grounding/area"] == pytest.approx(found["area"], rel=1e-4)


def test_a_record_is_what_the_map_and_the_mask_say(measured, tiny_run, tiny_data):
    _, records, _ = measured
    checkpoint = load_checkpoint(tiny_run[0])
    record = records[0]
    row = next(row for row in load_split(tiny_data, "val") if record["id"] in row["question_id"])
    position = row["question_id"].index(record["id"])
    targets = row["target_instances"][position]
    found = read_instances(tiny_data.parent / "raw/annotations.zip", targets)
    size = checkpoint.preprocessing.image_size
    mask = crop_mask(np.logical_or.reduce([found[n].mask() for n in targets]), size)
    image = checkpoint.preprocessing.image(decode_image(row["image"], "image"))[None]
    ids, attention = checkpoint.preprocessing.pad(checkpoint.preprocessing.token_ids([record["text"]]))
    _, maps = look(checkpoint.model, image, ids, attention, ["norm"])
    energy = energy_inside(to_pixels(maps["norm"][0].numpy(), size), mask)
    assert record["maps"]["norm"]["energy"] == pytest.approx(float(energy), abs=1e-6)


def test_maps_of_recorded_attention_equal_their_definitions(tiny_run):
    model = load_checkpoint(tiny_run[0]).model
    image = torch.randn(1, 3, 32, 32)
    ids, mask = torch.randint(5, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    attention = []
    written_out = model(image.expand(2, -1, -1, -1), ids, mask, record=attention)
    assert len(attention) == len(model.vision.vit.blocks)
    torch.testing.assert_close(attention[0].sum(-1), torch.ones_like(attention[0].sum(-1)))
    plain = model(image.expand(2, -1, -1, -1), ids, mask)
    torch.testing.assert_close(written_out.logits, plain.logits, atol=1e-5, rtol=1e-5)
    _, maps = look(model, image, ids, mask, MAPS)
    torch.testing.assert_close(maps["cls"].flatten(1), attention[-1].mean(1)[:, 0, 1:])
    rolled = torch.eye(attention[0].shape[-1])
    for weights in attention:
        rolled = ((weights.mean(1) + torch.eye(weights.shape[-1])) / 2) @ rolled
    torch.testing.assert_close(maps["rollout"].flatten(1), rolled[:, 0, 1:])
    for name in MAPS:
        assert (maps[name] >= 0).all()
        assert not maps[name].requires_grad


@pytest.mark.parametrize("topdown", [None, PerceiverIO, Codebook])
def test_without_a_second_pass_the_maps_of_blocks_are_of_all_patches_whatever_is_kept(topdown):
    model = make_model(topdown and topdown(), keep=0.5)
    image, attention = torch.randn(1, 3, 16, 16), []
    images = image.expand(2, -1, -1, -1)
    ids, mask = torch.randint(5, 30, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    with torch.no_grad():
        model.vision.encode(images, record=attention)
    output, maps = look(model, image, ids, mask, ["cls", "rollout", "gradient", "normgrad", "relevance"])
    assert output.seen.hidden.shape[1] == 1 + 2 + 1
    torch.testing.assert_close(maps["cls"].flatten(1), attention[-1].mean(1)[:, 0, 1:])
    rolled = torch.eye(5)
    for weights in attention:
        rolled = ((weights.mean(1) + torch.eye(5)) / 2) @ rolled
    torch.testing.assert_close(maps["rollout"].flatten(1), rolled[:, 0, 1:])
    with inputs_of([block.norm2 for block in model.vision.vit.blocks]) as states:
        score = best_score(model(images, ids, mask, read_image=True).logits)
        torch.testing.assert_close(maps["normgrad"].flatten(1), normgrad(score, states)[:, 1:])
    assert [int((maps[name][0] > 0).sum()) for name in ("cls", "relevance")] == [4, 2]


def _plain_relevance(read, words, tokens):
    """Chefer's rules, number by number: rows of [cls] in R_ti and R_tt, from Ā of the blocks and the fusion."""
    blocks, layers = read

    def times(a, b):
        return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]

    def plus(a, b):
        return [[x + y for x, y in zip(one, other, strict=True)] for one, other in zip(a, b, strict=True)]

    def eye(n):
        return [[float(i == j) for j in range(n)] for i in range(n)]

    def scaled(r):
        rows = [[x - (i == j) for j, x in enumerate(row)] for i, row in enumerate(r)]
        shares = [[x / sum(row) if sum(row) else 0.0 for x in row] for row in rows]
        return plus(shares, eye(len(r)))

    def turned(a):
        return [list(column) for column in zip(*a, strict=True)]

    tt, ii = eye(words), eye(tokens)
    ti, it = [[0.0] * tokens for _ in range(words)], [[0.0] * words for _ in range(tokens)]
    for a in blocks:
        ii = plus(ii, times(a, ii))
    for a_tt, a_ti, a_ii, a_it in layers:
        old_tt, old_ii, old_ti, old_it = tt, ii, ti, it
        tt, ti, ii, it = (plus(r, times(a, r)) for a, r in ((a_tt, tt), (a_tt, ti), (a_ii, ii), (a_ii, it)))
        more_ti = times(times(turned(scaled(tt)), a_ti), scaled(old_ii))
        more_it = times(times(turned(scaled(ii)), a_it), scaled(old_tt))
        tt, ii = plus(tt, times(a_ti, old_it)), plus(ii, times(a_it, old_ti))
        ti, it = plus(ti, more_ti), plus(it, more_it)
    return ti[0], tt[0]


def test_maps_of_gradients_equal_a_plain_computation(tiny_run):
    model = load_checkpoint(tiny_run[0]).model.double()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    ids, mask = torch.randint(5, 50, (1, 5)), torch.tensor([[1, 1, 1, 1, 0]])
    attention: list[torch.Tensor] = []
    norms = [block.norm2 for block in model.vision.vit.blocks]
    with inputs_of(norms) as states, model.fusion.recording() as fusion:
        output = model(image.requires_grad_(), ids, mask, record=attention, all_features=True)
    torch.testing.assert_close(output.logits, model(image, ids, mask).logits)
    best = output.logits.max()
    kept = [*attention, *fusion]
    gradients = torch.autograd.grad(best, [*kept, *states], retain_graph=True, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, [*kept, *states], strict=True)]
    read = [(g * a).clamp(min=0).mean(dim=1)[0].tolist() for g, a in zip(zeros, kept, strict=False)]
    layers = list(zip(*[iter(read[len(attention) :])] * 4, strict=True))
    patches, words = _plain_relevance((read[: len(attention)], layers), 5, attention[0].shape[-1])
    _, found, counted = look_and_read(model, image, ids, mask, ["relevance"])
    np.testing.assert_allclose(found["relevance"].ravel(), patches[1:], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(counted[0], words, rtol=1e-5, atol=1e-12)
    assert counted[0, 4] == 0  # padding

    product = np.ones(len(patches))
    for g, x in zip(zeros[len(kept) :], states, strict=True):
        one = np.array([float(u.norm() * v.norm()) for u, v in zip(g[0], x[0], strict=True)])
        product *= (one - one.min()) / (one.max() - one.min())
    _, maps = look(model, image, ids, mask, ["normgrad", "contrast", "fusion"])
    np.testing.assert_allclose(maps["normgrad"].numpy().ravel(), product[1:], rtol=1e-5)
    empty = torch.cat([ids[:, :1], ids[:, 3:4]], dim=1)
    _, nothing = look(model, image, empty, torch.ones_like(empty), ["fusion"])
    expected = maps["fusion"] / (nothing["fusion"] + nothing["fusion"].mean())
    torch.testing.assert_close(maps["contrast"], expected)


def test_a_text_has_the_same_maps_alone_as_beside_others(tiny_run):
    model = load_checkpoint(tiny_run[0]).model
    image = torch.randn(1, 3, 32, 32)
    ids, mask = torch.randint(5, 50, (3, 6)), torch.ones(3, 6, dtype=torch.int64)
    _, together = look(model, image, ids, mask, MAPS)
    for name in MAPS:
        _, alone = look(model, image, ids[1:2], mask[1:2], [name])
        torch.testing.assert_close(together[name][1:2], alone[name], atol=1e-5, rtol=1e-4)
    with torch.inference_mode():  # as in a validation
        _, inside = look(model, image.clone(), ids.clone(), mask.clone(), MAPS)
    torch.testing.assert_close(inside, together)
    assert default_map(model) == "weights"
    model.vision.topdown = None
    assert default_map(model) == "normgrad"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["task.maps=[norm,heat]"], ["heat", "fusion"]),
        (["task.instances=nowhere.zip"], ["nowhere.zip"]),
        (["task=grounds"], ["grounds", "choose one of asymmetry, classify, conditional, control, "]),
        (["task=faithfulness", "task.maps=[heat]"], ["heat", "relevance"]),
    ],
)
def test_wrong_options_are_one_line(options, parts, tiny_run, tiny_data, tmp_path, in_process):
    instances = f"task.instances={tiny_data.parent / 'raw/annotations.zip'}"
    group = [] if options[0].startswith("task=") else ["task=grounding", instances]
    result = in_process("vlabs.evaluate", [*group, f"ckpt={tiny_run[0]}", *options], tmp_path)
    assert_one_line_error(result, *parts)


@pytest.fixture(scope="module")
def people(tiny_data, tmp_path_factory):
    """Made-up human maps of six questions of val in VQA-HAT's form, two people each."""
    folder = tmp_path_factory.mktemp("hat")
    rows = load_split(tiny_data, "val")
    rng = np.random.default_rng(0)
    for row in (rows[0], rows[2]):
        for question_id in row["question_id"][:3]:
            for n in (1, 2):
                pixels = rng.integers(0, 256, (14, 14), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(folder / f"{question_id}_{n}.png")
    return folder


def test_maps_are_compared_with_where_people_looked(tiny_run, tiny_data, people, tmp_path):
    result = command(
        "vlabs.evaluate", "task=grounding", f"ckpt={tiny_run[0]}", "split=val", f"task.human_maps={people}",
        "task.maps=[norm,fusion]", "hydra.run.dir=out", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "out/grounding.jsonl").read_text().splitlines()]
    assert metrics["texts"] == len(records) == 6
    checkpoint = load_checkpoint(tiny_run[0])
    row = next(row for row in load_split(tiny_data, "val") if records[0]["id"] in row["question_id"])
    image = checkpoint.preprocessing.image(decode_image(row["image"], ""))
    ids, mask = checkpoint.preprocessing.pad(checkpoint.preprocessing.token_ids([records[0]["text"]]))
    _, maps = look(checkpoint.model, image[None], ids, mask, ["norm", "fusion"])
    (human,) = read_hat(people, {records[0]["id"]})
    humans = [crop_map(one, 32) for one in human.maps]
    expected = np.mean([rank_correlation(maps["norm"][0].numpy(), one) for one in humans])
    assert records[0]["maps"]["norm"] == pytest.approx(float(expected), abs=1e-5)
    assert records[0]["agreement"] == pytest.approx(float(rank_correlation(*humans)))
    mean = np.mean([record["maps"]["fusion"] for record in records])
    assert metrics["fusion/rank_correlation"] == pytest.approx(mean)
    assert metrics["people/rank_correlation"] == pytest.approx(np.mean([record["agreement"] for record in records]))
    assert "| fusion " in result.stdout


def test_vqa_hat_goes_the_whole_way_from_the_files_that_are_downloaded(tiny_run, tmp_path):
    """Made-up files in the layout of VQA v1 and VQA-HAT: zips, `QUESTION_NUMBER.png`, up to three people a question."""
    raw, hat, rng = tmp_path / "raw", tmp_path / "vqahat_val", np.random.default_rng(0)
    raw.mkdir()
    hat.mkdir()
    questions, annotations = [], []
    with zipfile.ZipFile(raw / "val2014.zip", "w") as archive:
        for image_id in (42, 73):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            with archive.open(f"val2014/COCO_val2014_{image_id:012d}.jpg", "w") as file:
                Image.fromarray(pixels).save(file, "JPEG")
            for n in range(2):
                one = {"image_id": image_id, "question_id": 10 * image_id + n}
                questions.append(one | {"question": "What is this?"})
                answers = [{"answer": "dog", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
                annotations.append(
                    one | {"question_type": "what is", "answer_type": "other", "multiple_choice_answer": "dog",
                           "answers": answers}
                )  # fmt: skip
                for person in range(1, 4 if n else 2):
                    looked = rng.integers(0, 256, (48, 64), dtype=np.uint8)
                    Image.fromarray(looked).save(hat / f"{10 * image_id + n}_{person}.png")
    for kind, name, content in (
        ("Questions", "OpenEnded_mscoco_val2014_questions", {"data_subtype": "val2014", "questions": questions}),
        ("Annotations", "mscoco_val2014_annotations", {"data_subtype": "val2014", "annotations": annotations}),
    ):
        with zipfile.ZipFile(raw / f"{kind}_Val_mscoco.zip", "w") as archive:
            archive.writestr(f"{name}.json", json.dumps(content))
    fast = ["--num-workers", 1, "--vocab-size", 0, "--min-answer-count", 1]
    given = ["--raw-dir", raw, "--out-dir", "data", "--human-maps", hat, *fast]
    prepared = command("data_prep.vqav2", *given, cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    assert "4 of 4 questions with human maps are prepared" in prepared.stdout
    options = [f"ckpt={tiny_run[0]}", "data=vqav2", "data.dir=data", "split=val", "data.num_workers=0"]
    result = command(
        "vlabs.evaluate", "task=grounding", *options, f"task.human_maps={hat}", "task.maps=[fusion]",
        "hydra.run.dir=out", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "out/grounding.jsonl").read_text().splitlines()]
    assert {one["id"]: one["people"] for one in records} == {420: 1, 421: 3, 730: 1, 731: 3}
    # The ceiling by another library, over the pairs of three people, at 14 x 14.
    agree = []
    for question in (421, 731):
        small = [resize_area(crop_map(one, 32), 14, 14).ravel() for one in next(read_hat(hat, {question})).maps]
        agree.append(np.mean([spearmanr(small[i], small[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]))
    assert metrics["people/rank_correlation"] == pytest.approx(np.mean(agree))
    assert metrics["texts_of_several_people"] == 2
    assert "| people, with each other |" in result.stdout
    # The same of a model of transformers, which sees the whole image.
    folder = save_tiny("ViltForQuestionAnswering", tmp_path / "vilt")
    given = ["look", "--model", folder, "--data", "data", "--human-maps", hat, "--map", "normgrad", "--results", "seen"]
    assert (looked := command("vlabs.cli", *given, cwd=tmp_path)).returncode == 0, looked.stderr
    of_vilt = json.loads((tmp_path / "seen/grounding.jsonl").read_text().splitlines()[-1])
    image = Image.open(io.BytesIO(load_split(tmp_path / "data", "val")[1]["image"]))
    found = load(str(folder), device="cpu").answer(image, ["What is this?"], "normgrad")[0].map
    people = next(read_hat(hat, {731})).maps
    assert of_vilt["maps"]["normgrad"] == pytest.approx(
        np.mean([rank_correlation(found, one) for one in people]), abs=1e-3
    )
    whole = [resize_area(one, 14, 14).ravel() for one in people]
    agree = np.mean([spearmanr(whole[i], whole[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))])
    assert of_vilt["agreement"] == pytest.approx(agree)


def test_air_d_goes_the_whole_way_from_the_files_that_are_downloaded(tiny_run, tmp_path):
    """Made-up files in the layout of GQA and AiR-D: `fixmaps/QUESTION.png`, by ids that are texts, one a question."""
    raw, maps, rng = tmp_path / "raw", tmp_path / "aggregated_maps/fixmaps", np.random.default_rng(0)
    (raw / "images").mkdir(parents=True)
    maps.mkdir(parents=True)
    questions = {}
    for name in ("00126851", "126851", "011000868"):  # two differ in leading zeros only
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(raw / f"images/{int(name) % 97}.jpg")
        questions[name] = {
            "question": "What is this?", "imageId": str(int(name) % 97), "answer": "dog", "fullAnswer": "A dog.",
            "annotations": {"question": {}, "answer": {}, "fullAnswer": {}}, "isBalanced": True,
            "types": {"detailed": "choose", "semantic": "attr", "structural": "query"},
        }  # fmt: skip
        Image.fromarray(rng.integers(0, 256, (48, 64), dtype=np.uint8)).save(maps / f"{name}.png")
    (raw / "val_balanced_questions.json").write_text(json.dumps(questions))
    fast = ["--num-workers", 1, "--vocab-size", 0]
    prepared = command("vlabs.cli", "prepare", "gqa", "--raw-dir", raw, "--out-dir", "data", *fast, cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    given = ["data=vqav2", "data.dir=data", "split=val", f"task.human_maps={maps}", "task.maps=[norm]"]
    result = command(
        "vlabs.evaluate", "task=grounding", f"ckpt={tiny_run[0]}", *given, "hydra.run.dir=out", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "out/grounding.jsonl").read_text().splitlines()]
    assert {one["id"]: one["people"] for one in records} == dict.fromkeys(questions, 1)
    checkpoint = load_checkpoint(tiny_run[0])
    for record in records:
        image = Image.open(raw / f"images/{int(record['id']) % 97}.jpg").convert("RGB")
        ids, mask = checkpoint.preprocessing.pad(checkpoint.preprocessing.token_ids(["What is this?"]))
        found = look(checkpoint.model, checkpoint.preprocessing.image(image)[None], ids, mask, ["norm"])[1]["norm"]
        human = crop_map(np.asarray(Image.open(maps / f"{record['id']}.png")) / 255, 32)
        expected = float(rank_correlation(found[0].numpy(), human))
        assert record["maps"]["norm"] == pytest.approx(expected, abs=1e-5)
    assert "| people, with each other | " in result.stdout


def test_human_maps_of_other_questions_are_one_line(tiny_run, tmp_path):
    (tmp_path / "hat").mkdir()
    Image.new("L", (14, 14)).save(tmp_path / "hat/1_1.png")
    options = ["task=grounding", f"ckpt={tiny_run[0]}", "split=val", "task.human_maps=hat"]
    assert_one_line_error(command("vlabs.evaluate", *options, cwd=tmp_path), "task.human_maps=hat", "VQA v1")
    beside = command("vlabs.evaluate", *options, "task.instances=nowhere.json", cwd=tmp_path)
    assert_one_line_error(beside, "task.instances=nowhere.json", "leave one out")


def test_an_answer_without_patches_is_scored_as_a_plain_loop_scores_it(tiny_run, tiny_data, tmp_path, in_process):
    place = [f"ckpt={tiny_run[0]}", f"data.dir={tiny_data}", "split=val", "hydra.run.dir=out"]
    given = ["task=faithfulness", "task.maps=[norm,weights]", "task.num_texts=4", "task.batch_size=7", *place]
    result = in_process("vlabs.evaluate", given, tmp_path)
    assert result.returncode == 0, result.stderr
    words = [f"words by {name}" for name in ("leaving one out", "relevance")]
    assert all(f"\n| {name} " in result.stdout for name in ("norm", "weights", "random", "words at random", *words))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "out/faithfulness.jsonl").read_text().splitlines()]
    assert metrics["norm/gap"] == pytest.approx(np.mean([one["norm"]["gap"] for one in records]))
    checkpoint, side = load_checkpoint(tiny_run[0]), 8
    for record in records:
        row = next(row for row in load_split(tiny_data, "val") if record["id"] in row["question_id"])
        answers = row["answers"][row["question_id"].index(record["id"])]
        image = checkpoint.preprocessing.image(decode_image(row["image"], "image"))[None]
        ids, mask = checkpoint.preprocessing.pad(checkpoint.preprocessing.token_ids([record["text"]]))
        values = look(checkpoint.model, image, ids, mask, ["norm"])[1]["norm"]

        def score(taken):
            left = image.clone()  # noqa: B023
            for patch in taken:
                top, start = side * (patch // 4), side * (patch % 4)
                left[..., top : top + side, start : start + side] = 0
            best = checkpoint.model(left, ids, mask).logits[0].argmax()  # noqa: B023
            return 100 * answer_accuracy(checkpoint.preprocessing.names[best], answers)  # noqa: B023

        deletion, insertion = areas_by_hand(values.flatten().argsort(descending=True).tolist(), score)
        assert record["norm"]["deletion"] == pytest.approx(deletion, abs=1e-6)
        assert record["norm"]["insertion"] == pytest.approx(insertion, abs=1e-6)

        spoken = [places for _, places in checkpoint.preprocessing.words(record["text"])]
        best = int(checkpoint.model(image, ids, mask).logits[0].argmax())

        def logits(taken):
            left = mask.clone()  # noqa: B023
            left[0, [place for word in taken for place in spoken[word]]] = 0  # noqa: B023
            return checkpoint.model(image, ids, left).logits[0]  # noqa: B023

        def score_of(taken):
            named = checkpoint.preprocessing.names[logits(taken).argmax()]
            return 100 * answer_accuracy(named, answers)  # noqa: B023

        without = [float(logits([word])[best]) for word in range(len(spoken))]
        deletion, insertion = areas_by_hand(np.argsort(without).tolist(), score_of)
        assert record[words[0]]["deletion"] == pytest.approx(deletion, abs=1e-6)
        assert record[words[0]]["insertion"] == pytest.approx(insertion, abs=1e-6)
