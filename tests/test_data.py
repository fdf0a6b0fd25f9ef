"""From prepared rows to tensors: what a batch holds, and that augmentation is a function of seed, epoch and image."""

import io
import subprocess

import numpy as np
import pytest
import torch
from conftest import warm_python
from PIL import Image
from torchvision.transforms import v2

from vlabs.data.images import ImageReader
from vlabs.data.prepared import load_split, read_answers
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, Preprocessing, decode_image
from vlabs.data.sampling import BatchSpec, Group
from vlabs.data.vqa import VQADataModule, VQADataset
from vlabs.errors import UserError
from vlabs.runs.values import check_values


def make_data(tiny_data, **options):
    return VQADataModule(tiny_data, image_size=32, num_workers=0, **options)


def test_a_batch_is_the_rows_images_questions_and_soft_scores(tiny_data):
    data = make_data(tiny_data)
    rows = load_split(tiny_data, "train")
    batch = VQADataset(rows, data.preprocessing)[BatchSpec(0, [Group(2, (0, 3)), Group(5, (1,))])]
    asked = [(2, 0), (2, 3), (5, 1)]
    assert batch.image_index.tolist() == [0, 0, 1]
    assert batch.question_ids == [rows[r]["question_id"][q] for r, q in asked]
    assert batch.image_ids.tolist() == [rows[r]["image_id"] for r, _ in asked]
    for n, (r, q) in enumerate(asked):
        expected = np.zeros(len(read_answers(tiny_data)), dtype=np.float32)
        expected[rows[r]["answer_ids"][q]] = rows[r]["answer_scores"][q]
        np.testing.assert_array_equal(batch.targets[n].numpy(), expected)
    pixels = np.asarray(Image.open(io.BytesIO(rows[5]["image"])).convert("RGB"), dtype=np.float32) / 255
    expected = (pixels - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    np.testing.assert_allclose(batch.images[1].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_one_question_an_image_needs_no_index(tiny_data):
    data = make_data(tiny_data)
    batch = VQADataset(load_split(tiny_data, "train"), data.preprocessing)[
        BatchSpec(0, [Group(2, (0,)), Group(5, (1,))])
    ]
    assert batch.image_index is None


@pytest.mark.parametrize("shape", [(640, 480), (333, 500), (224, 224), (100, 31), (37, 300), (500, 223)])
def test_resizing_gives_the_square_that_torchvision_gives_but_for_rounding(shape):
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (shape[1] // 4, shape[0] // 4, 3), dtype=np.uint8))
    picture = rough.resize(shape, Image.Resampling.BICUBIC)
    size = 112
    theirs = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])
    expected, found = (np.asarray(resize(picture)).astype(int) for resize in (theirs, Preprocessing(size, "").resize))
    assert found.shape == expected.shape
    difference = found - expected
    assert np.abs(difference).max() <= 3  # the two passes, across and down, round in between
    assert abs(difference.mean()) < 0.01


def test_a_very_long_image_takes_no_more_memory_than_its_square():
    assert Preprocessing(224, "").resize(Image.new("RGB", (1, 100_000))).size == (224, 224)


def test_text_is_padded_to_the_longest_or_to_a_fixed_length_and_cut_at_the_limit(tiny_data):
    plain = make_data(tiny_data, max_length=12).preprocessing
    ids, mask = plain.pad(plain.token_ids(["Is it?", "What color is the star?"]))
    assert ids.shape[1] == max(len(row) for row in plain.token_ids(["Is it?", "What color is the star?"])) < 12
    assert (ids[mask == 0] == 1).all()
    fixed = Preprocessing.from_plain(plain.to_plain() | {"pad_to_max_length": True})
    assert fixed.pad(fixed.token_ids(["Is it?"]))[0].shape == (1, 12)
    long = plain.token_ids(["star " * 100])[0]
    assert len(long) == 12
    assert (long[0], long[-1]) == (0, 2)


def test_augmentation_is_a_function_of_seed_epoch_and_image(tiny_data):
    data = make_data(tiny_data)
    rows = load_split(tiny_data, "train")

    def image(seed, epoch, row):
        images = ImageReader(rows, data.preprocessing, "rand-m9-n2", seed)
        dataset = VQADataset(rows, data.preprocessing, images)
        return dataset[BatchSpec(epoch, [Group(row, (0,))])].images[0]

    assert torch.equal(image(1, 0, 3), image(1, 0, 3))
    drawn = [image(seed, epoch, 3) for seed in range(2) for epoch in range(4)]
    assert len({tuple(x.flatten().tolist()) for x in drawn}) > 4
    state = np.random.get_state()[1].copy()
    image(1, 1, 1)
    assert (np.random.get_state()[1] == state).all()


def test_training_leaves_out_questions_without_a_vocabulary_answer_and_validation_keeps_them(tiny_data):
    rows = load_split(tiny_data, "train")
    some = [row | {"answer_ids": [[], *row["answer_ids"][1:]]} for row in rows.select(range(3))]
    import datasets

    from vlabs.data.features import VQA_FEATURES

    rows = datasets.Dataset.from_list(some, features=VQA_FEATURES)
    total = sum(len(row["question"]) for row in some)
    data = VQADataModule(tiny_data, image_size=32)
    trained_rows, trained_positions = data.texts(rows, training=True)
    assert len(trained_rows) == total - 3
    assert 0 not in trained_positions
    assert len(data.texts(rows, training=False)[0]) == total


def test_a_loader_with_workers_gives_what_one_without_gives(tiny_data):
    alone, helped = make_data(tiny_data, rand_augment="rand-m9-n2"), make_data(tiny_data, rand_augment="rand-m9-n2")
    helped.num_workers = 2
    for a, b in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert a.question_ids == b.question_ids
        assert torch.equal(a.images, b.images)


def jpeg(width, height, kind="JPEG"):
    """A smooth image."""
    pixels = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("at_least", "size"), [(None, (640, 480)), (240, (320, 240)), (241, (640, 480)), (50, (80, 60))]
)
def test_a_jpeg_is_decoded_no_smaller_than_is_needed(at_least, size):
    assert decode_image(jpeg(640, 480), "picture", at_least).size == size
    assert decode_image(jpeg(640, 480, "PNG"), "picture", at_least).size == (640, 480)


def test_images_are_decoded_smaller_in_training_alone(tiny_data):
    data = VQADataModule(tiny_data, image_size=16, num_workers=0)
    assert data.train_dataloader().dataset.images.at_least == 16
    assert data.val_dataloader().dataset.images.at_least is None
    whole = VQADataModule(tiny_data, image_size=16, num_workers=0, scaled_decoding=False)
    assert whole.train_dataloader().dataset.images.at_least is None


@pytest.mark.parametrize("shape", [(240, 320), (241, 318), (100, 60), (224, 224), (40, 400)])
def test_resizing_for_training_moves_an_image_by_less_than_a_pixel(shape):
    smooth = np.random.default_rng(0).uniform(0, 255, (8, 8, 3)).astype(np.uint8)
    picture = Image.fromarray(smooth).resize(shape[::-1], Image.Resampling.BICUBIC)
    preprocessing = Preprocessing(image_size=96, tokenizer="")
    exact, quick = (np.asarray(resize(picture), dtype=int)
                    for resize in (preprocessing.resize, preprocessing.resize_for_training))  # fmt: skip
    assert quick.shape == exact.shape == (96, 96, 3)
    # One pixel of the image is so many of the result; the exact one moved by them bounds the difference.
    pixel = max(1, round(96 / min(shape)))
    moved = [np.abs(np.roll(exact, (y, x), (0, 1)) - exact)[8:-8, 8:-8].mean() for y, x in ((0, pixel), (pixel, 0))]
    assert np.abs(quick - exact)[8:-8, 8:-8].mean() < max(moved)
    if shape[0] == shape[1]:  # the same square
        assert np.abs(quick - exact).max() <= 1


@pytest.mark.parametrize("split", ["train", "train+val"])
def test_buckets_pad_less_and_leave_no_question_out(tiny_data, split):
    def tokens(**options):
        data = make_data(tiny_data, batch_size=8, train_split=split, minival_images=4, **options)
        batches = list(data.train_dataloader())
        return sorted(q for batch in batches for q in batch.question_ids), sum(b.input_ids.numel() for b in batches)

    everything, plain = tokens()
    bucketed, fewer = tokens(bucket_batches=8)
    assert bucketed == everything
    assert fewer < 0.95 * plain


def test_a_batch_that_cannot_be_handed_over_ends_its_process_and_is_not_waited_for(tmp_path):
    # As where /dev/shm is full: no file, that of shared memory included, may have more than a page.
    code = (
        "import resource, torch\nfrom vlabs.data.loading import LoaderOptions, eval_loader\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "class Rows(torch.utils.data.Dataset):\n    def __getitem__(self, plan): return torch.zeros(100_000)\n"
        "next(iter(eval_loader(Rows(), [0, 1], LoaderOptions(num_workers=1))))"
    )
    (tmp_path / "hand_over.py").write_text(code)
    ended = subprocess.run([warm_python(), "hand_over.py"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode != 0
    assert "a loader process cannot hand over a batch" in ended.stderr


@pytest.mark.parametrize(
    "option", [{"texts_per_image": 2}, {"captions_per_image": 2}, {"names": ["a"]}, {"folders": {"a": "b"}},
               {"sets": {"a": "b"}}, {"crop": 0.5}]
)  # fmt: skip
def test_options_of_other_data_are_refused_and_those_of_these_are_named(option, tiny_data):
    name = next(iter(option))
    with pytest.raises(
        UserError, match=rf"data\.{name}=.* do not use it; choose one of .*minival_images.*questions_per"
    ):
        check_values({"data": {"_target_": "vlabs.data.vqa.VQADataModule", "dir": str(tiny_data), **option}})


def test_a_number_of_texts_is_refused_by_the_name_that_it_was_given(tiny_data):
    with pytest.raises(UserError, match="data.questions_per_image=0 must be a whole number, at least 1"):
        VQADataModule(tiny_data, image_size=32, questions_per_image=0)


def test_checkpoints_of_old_call_all_names_answers():
    plain = Preprocessing(8, "", names=("contradiction", "neutral")).to_plain()
    old = {"answers" if name == "names" else name: value for name, value in plain.items()}
    assert Preprocessing.from_plain(old) == Preprocessing.from_plain(plain)
    assert Preprocessing.from_plain(old).names == ("contradiction", "neutral")
