"""Grounding: measures against cases worked out by hand and their chance levels, and masks against what made them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.scenes.drawing import instance as annotation_of
from vlabs.data.instances import (
    crop_map,
    crop_mask,
    decode_run_lengths,
    fill_polygons,
    read_instances,
    resize_area,
)
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import CROP_MODES, Preprocessing
from vlabs.errors import UserError
from vlabs.metrics.bootstrap import bootstrap_interval, paired_bootstrap
from vlabs.metrics.grounding import (
    area_share,
    average_precision,
    best_iou,
    energy_inside,
    pointing,
    rank_correlation,
    read_hat,
    to_pixels,
)

MEASURES = [energy_inside, pointing, average_precision, best_iou]
CHANCE_IS_AREA = [energy_inside, pointing, average_precision]


def random_masks(rng: np.random.Generator, *shape: int) -> np.ndarray:
    masks = rng.random(shape) < 0.3
    masks[..., 0, 0] = True
    return masks


# --- maps against masks --------------------------------------------------------------------------------------------


def test_measures_give_the_numbers_worked_out_by_hand() -> None:
    attention = np.array([[4.0, 3, 2], [2, 1, 0]])
    mask = np.array([[True, False, True], [False, False, True]])
    assert area_share(mask) == 3 / 6
    assert energy_inside(attention, mask) == 6 / 12
    assert pointing(attention, mask) == 1
    # Thresholds 4, 3, 2, 1, 0 choose 1, 2, 4, 5, 6 pixels with 1, 1, 2, 2, 3 of the target's three.
    assert average_precision(attention, mask) == pytest.approx((1 * 1 / 1 + 1 * 2 / 4 + 1 * 3 / 6) / 3)
    assert best_iou(attention, mask) == 3 / 6


def test_pointing_shares_a_tie_among_the_maxima() -> None:
    attention = np.array([[5, 5, 1], [5, 0, 5]])
    mask = np.array([[True, False, True], [True, True, True]])
    assert pointing(attention, mask) == 3 / 4


@pytest.mark.parametrize("measure", CHANCE_IS_AREA)
@pytest.mark.parametrize("value", [0.0, 0.3, 1 / 7, 1e30, 5e-324])
def test_a_uniform_map_scores_the_area_share_exactly(measure: Any, value: float) -> None:
    masks = random_masks(np.random.default_rng(0), 5, 37, 23)
    np.testing.assert_array_equal(measure(np.full(masks.shape, value), masks), area_share(masks))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_perfect_map_scores_one_and_an_opposite_one_less_than_chance(measure: Any) -> None:
    rng = np.random.default_rng(1)
    masks = random_masks(rng, 4, 16, 16)
    np.testing.assert_array_equal(measure(np.where(masks, rng.uniform(0.1, 1, masks.shape), 0), masks), 1)
    opposite = measure((~masks).astype(float), masks)
    assert (opposite <= area_share(masks)).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_the_scale_of_a_map_changes_nothing(measure: Any) -> None:
    rng = np.random.default_rng(2)
    attention, masks = rng.random((3, 14, 14)), random_masks(rng, 3, 14, 14)
    for scale in (1e-6, 7.3, 1e12):
        np.testing.assert_allclose(measure(scale * attention, masks), measure(attention, masks), rtol=1e-12)
    np.testing.assert_allclose(measure(attention.astype(np.float32), masks), measure(attention, masks), rtol=1e-6)


@pytest.mark.parametrize("measure", CHANCE_IS_AREA)
def test_random_maps_score_the_area_share_on_average(measure: Any) -> None:
    rng = np.random.default_rng(3)
    masks = np.broadcast_to(random_masks(rng, 40, 40), (3000, 40, 40))
    scores = measure(rng.random(masks.shape), masks)
    # Average precision is above chance by the order of 1 / pixels.
    assert scores.mean() == pytest.approx(float(area_share(masks[0])), abs=4 * scores.std() / 3000**0.5 + 3e-3)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_batch_gives_each_maps_own_value(measure: Any) -> None:
    rng = np.random.default_rng(4)
    attention, masks = rng.integers(0, 5, (2, 3, 8, 9)), random_masks(rng, 2, 3, 8, 9)
    together = measure(attention, masks)
    assert together.shape == (2, 3)
    for index in np.ndindex(2, 3):
        assert measure(attention[index], masks[index]) == together[index]


def test_precision_and_iou_equal_a_plain_loop_over_thresholds() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        attention, mask = rng.integers(0, 6, (7, 9)), random_masks(rng, 7, 9)
        precision, best, recall_before = 0.0, 0.0, 0.0
        for threshold in sorted(set(attention.ravel()), reverse=True):
            chosen = attention >= threshold
            recall = (chosen & mask).sum() / mask.sum()
            precision += (recall - recall_before) * (chosen & mask).sum() / chosen.sum()
            recall_before = recall
            best = max(best, (chosen & mask).sum() / (chosen | mask).sum())
        assert average_precision(attention, mask) == pytest.approx(precision)
        assert best_iou(attention, mask) == pytest.approx(best)


@pytest.mark.parametrize("measure", MEASURES)
def test_wrong_maps_and_masks_are_refused(measure: Any) -> None:
    attention, mask = np.ones((4, 5)), np.ones((4, 5), dtype=bool)
    for wrong, message in [(-attention, "negative"), (attention * np.nan, "finite"), (attention * np.inf, "finite")]:
        with pytest.raises(ValueError, match=message):
            measure(wrong, mask)
    with pytest.raises(ValueError, match="shape"):
        measure(attention.T, mask)
    with pytest.raises(ValueError, match="empty"):
        measure(attention, ~mask)
    with pytest.raises(ValueError, match="boolean"):
        measure(attention, mask.astype(int))


def test_a_target_without_pixels_has_no_area_share() -> None:
    masks = np.ones((2, 3, 3), dtype=bool)
    masks[1] = False
    with pytest.raises(ValueError, match="empty"):
        area_share(masks)


def test_a_patch_becomes_a_block_of_its_value() -> None:
    patches = np.array([[1.0, 2], [3, 4], [5, 6]])
    pixels = to_pixels(patches, (6, 4))
    np.testing.assert_array_equal(pixels[:2, 2:], 2)
    np.testing.assert_array_equal(pixels[4:, :2], 5)
    mask = to_pixels(np.array([[True, False], [False, False], [False, True]]), (6, 4))
    assert energy_inside(pixels, mask) == pytest.approx(7 / 21)
    assert to_pixels(np.ones((2, 14, 14)), 224).shape == (2, 224, 224)
    with pytest.raises(ValueError, match="3x2 patches do not tile"):
        to_pixels(patches, 8)


# --- maps against humans -------------------------------------------------------------------------------------------


def test_rank_correlation_shares_the_ranks_of_ties() -> None:
    # On 14x14, two blocks of rows each: 49 pixels a value, so the ranks are those of (1, 2, 3, 4) but for a scale.
    first = np.repeat(np.array([1.0, 1, 2, 3]), 49).reshape(14, 14)
    second = np.repeat(np.array([1.0, 2, 2, 4]), 49).reshape(14, 14)
    # Average ranks 1.5, 1.5, 3, 4 and 1, 2.5, 2.5, 4: 3.75 / sqrt(4.5 * 4.5).
    assert rank_correlation(first, second) == pytest.approx(3.75 / 4.5)


def test_rank_correlation_depends_on_nothing_but_the_order() -> None:
    rng = np.random.default_rng(6)
    attention = rng.random((2, 14, 14))
    np.testing.assert_allclose(rank_correlation(attention, np.exp(5 * attention)), 1)
    np.testing.assert_allclose(rank_correlation(attention, 1 - attention), -1)
    np.testing.assert_allclose(rank_correlation(attention, 1e-30 * attention), 1)


def test_rank_correlation_of_random_maps_is_zero_on_average() -> None:
    rng = np.random.default_rng(7)
    values = rank_correlation(rng.random((500, 14, 14)), rng.random((500, 28, 42)))
    assert abs(values.mean()) < 4 * values.std() / 500**0.5


@pytest.mark.parametrize("shape", [(14, 14), (24, 24), (4, 4), (480, 640)])
def test_a_uniform_map_correlates_with_nothing(shape: tuple[int, int]) -> None:
    human = np.random.default_rng(8).random((480, 640))
    assert rank_correlation(np.full(shape, 0.3), human) == 0
    assert rank_correlation(human, np.full(shape, 77, dtype=np.uint8)) == 0


def test_maps_of_any_size_are_compared_on_the_same_grid() -> None:
    attention = np.random.default_rng(9).random((14, 14))
    assert rank_correlation(attention, to_pixels(attention, (28, 70))) == pytest.approx(1)
    halves = np.where(np.arange(30) < 15, 0.3, 0.7) * np.ones((30, 1))
    assert rank_correlation(halves, halves[:14, 8:22]) == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="do not match"):
        rank_correlation(attention[None], attention)
    with pytest.raises(ValueError, match="negative"):
        rank_correlation(attention, -attention)


def test_human_maps_are_read_by_question(tmp_path: Path) -> None:
    for name, value in {"7_2": 102, "7_1": 51, "12_1": 255, "7_10": 204}.items():
        Image.new("L", (6, 4), value).save(tmp_path / f"{name}.png")
    (tmp_path / "12_1.png").rename(tmp_path / "12_1.PNG")
    for ignored in ("readme.txt", "._7_1.png"):
        (tmp_path / ignored).write_text("maps")
    first, second = read_hat(tmp_path)
    assert (first.question_id, second.question_id) == (7, 12)
    assert first.maps.shape == (3, 4, 6)
    np.testing.assert_allclose(first.maps[:, 0, 0], [0.2, 0.4, 0.8])
    np.testing.assert_allclose(first.mean, 1.4 / 3, rtol=1e-6)
    assert [human.question_id for human in read_hat(tmp_path, {12, 99})] == [12]


def test_unreadable_human_maps_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        read_hat(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no maps"):
        read_hat(tmp_path)
    (tmp_path / "5_1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"5_1\.png cannot be read"):
        list(read_hat(tmp_path))
    rng = np.random.default_rng(10)
    Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(tmp_path / "5_1.png")
    (tmp_path / "5_1.png").write_bytes((tmp_path / "5_1.png").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"5_1\.png cannot be read"):
        list(read_hat(tmp_path))
    Image.new("L", (6, 4)).save(tmp_path / "5_1.png")
    Image.new("L", (4, 6)).save(tmp_path / "5_2.png")
    with pytest.raises(UserError, match="differ in size"):
        list(read_hat(tmp_path))
    (tmp_path / "5_01.PNG").touch()
    with pytest.raises(UserError, match=r"5_0?1\.(png|PNG) are the same map of a question: move one"):
        read_hat(tmp_path)
    (tmp_path / "5_01.PNG").unlink()
    for odd in ("abc.png", "5_3.jpg"):
        (tmp_path / odd).touch()
    with pytest.raises(UserError, match=r"2 images are not called as maps are .* such as 5_3\.jpg: rename them"):
        read_hat(tmp_path)


# --- how sure ------------------------------------------------------------------------------------------------------


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    intervals = [bootstrap_interval(rng.exponential(2, 200), num_samples=400, seed=n) for n in range(300)]
    covered = np.mean([low <= 2 <= high for _, low, high in intervals])
    assert 0.9 <= covered <= 0.98


def test_the_interval_is_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(12).normal(3, 1, 5000)
    mean, low, high = bootstrap_interval(values)
    error = values.std() / 5000**0.5
    assert mean == values.mean()
    np.testing.assert_allclose([low, high], [mean - 1.96 * error, mean + 1.96 * error], atol=0.15 * error)
    assert bootstrap_interval(values) == (mean, low, high)
    wider = bootstrap_interval(values, confidence=0.99)
    assert wider.low < low < high < wider.high


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(13).random(50)
    whole = bootstrap_interval(values, num_samples=101)
    monkeypatch.setattr("vlabs.metrics.bootstrap._MOST_DRAWN", 350)
    assert bootstrap_interval(values, num_samples=101) == pytest.approx(whole)


def test_a_paired_difference_draws_the_same_questions_for_both() -> None:
    rng = np.random.default_rng(14)
    hard = rng.normal(0, 10, 400)
    a, b = hard + 1 + rng.normal(0, 0.1, 400), hard
    paired = paired_bootstrap(a, b, seed=3)
    assert paired == bootstrap_interval(a - b, seed=3)
    assert paired.mean == pytest.approx(a.mean() - b.mean())
    assert 0.9 < paired.low < paired.high < 1.1  # while either mean alone is unsure by 1
    assert bootstrap_interval(a).high - bootstrap_interval(a).low > 1


@pytest.mark.parametrize("values", [[], [1.0], [[1.0, 2.0]], [1.0, float("nan")], [1.0, float("inf")]])
def test_values_without_a_mean_are_refused(values: list[Any]) -> None:
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(values)


def test_wrong_options_of_the_bootstrap_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples"):
        bootstrap_interval([1, 2], num_samples=0)
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1, 2], confidence=95)
    with pytest.raises(ValueError, match="each question"):
        paired_bootstrap([1, 2, 3], [1, 2])


# --- masks ---------------------------------------------------------------------------------------------------------

# A 3x3 square in the middle of 5x5: 6 of 0, then columns of 3 with 2 between, and 6 of 0.
SQUARE = np.pad(np.ones((3, 3), dtype=bool), 1)
SQUARE_RUNS = [6, 3, 2, 3, 2, 3, 6]
# From the fourth on the differences to two before: 0, 0, 0, 4; each fits into one character, '0' being 0.
SQUARE_STRING = "6320004"


def test_run_lengths_go_down_the_columns() -> None:
    np.testing.assert_array_equal(decode_run_lengths(SQUARE_RUNS, 5, 5), SQUARE)
    np.testing.assert_array_equal(decode_run_lengths([2, 1, 3], 2, 3), [[False, True, False], [False, False, False]])
    np.testing.assert_array_equal(decode_run_lengths([0, 1, 3], 2, 2), [[True, False], [False, False]])


def test_compressed_run_lengths_are_the_same_mask() -> None:
    np.testing.assert_array_equal(decode_run_lengths(SQUARE_STRING, 5, 5), SQUARE)
    # 42 = 10 + 32 * 1: characters 48 + 32 + 10 = 'Z' (continues) and '1'.
    np.testing.assert_array_equal(decode_run_lengths("Z11", 1, 43), [[False] * 42 + [True]])
    # Runs 1, 2, 2, 1: the last is -1 to the run two before, five bits 11111, 48 + 31 = 'O'.
    np.testing.assert_array_equal(decode_run_lengths("122O", 2, 3), [[False, True, False], [True, False, True]])
    # Runs 0, 100, 0, 20: 100 = 4 + 32 * 3 is 'T3'; 20 - 100 = 16 - 32 * 3 is 48 + 32 + 16 = '`' and 48 + 29 = 'M'.
    np.testing.assert_array_equal(decode_run_lengths("0T30`M", 1, 120), [[True] * 120])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([6, 3], "add up to 9 pixels"),
        ([26, -1], "0 or more"),
        ([12.5, 12.5], "whole numbers"),
        ("63200", "add up to"),
        ("6320004Z", "end within"),
        ("6 3", "cannot occur"),
    ],
)
def test_damaged_run_lengths_are_refused(counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_run_lengths(counts, 5, 5)


def test_polygons_hold_the_pixels_that_they_cover() -> None:
    np.testing.assert_array_equal(fill_polygons([[1, 1, 4, 1, 4, 4, 1, 4]], 5, 5), SQUARE)
    two = fill_polygons([[0, 0, 2, 0, 2, 1, 0, 1], [1, 0, 3, 0, 3, 1, 1, 1]], 1, 4)
    np.testing.assert_array_equal(two, [[True, True, True, False]])
    assert fill_polygons([[-5, -5, 20, -5, 20, 20, -5, 20]], 3, 3).all()
    assert not fill_polygons([], 3, 3).any()


def test_the_area_of_a_polygon_is_right_on_average() -> None:
    rng = np.random.default_rng(15)
    ratios = []
    for _ in range(100):
        angles, radii = np.sort(rng.uniform(0, 2 * np.pi, 12)), rng.uniform(8, 20, 12)
        x, y = 32 + radii * np.cos(angles), 32 + radii * np.sin(angles)
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        ratios.append(fill_polygons([np.stack([x, y], axis=1).ravel().tolist()], 64, 64).sum() / area)
    assert np.mean(ratios) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("polygon", [[1, 1, 2, 2], [1, 1, 2, 2, 3, 3, 4], [1, 1, 2, 2, 3, float("nan")]])
def test_a_polygon_needs_three_corners(polygon: list[float]) -> None:
    with pytest.raises(ValueError, match="three or more"):
        fill_polygons([polygon], 5, 5)


def test_a_polygon_far_out_of_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="1e\\+09"):
        fill_polygons([[0, 0, 1e9, 0, 0, 4]], 5, 5)


def coco(annotations: list[dict[str, Any]]) -> str:
    return json.dumps({"images": [{"id": 3, "height": 5, "width": 5}], "annotations": annotations})


def annotation(annotation_id: int, segmentation: Any) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": 3, "category_id": 1, "area": 9.0, "segmentation": segmentation}


def test_all_of_cocos_formats_are_read_from_one_file(tmp_path: Path) -> None:
    path = tmp_path / "instances_val2014.json"
    path.write_text(
        coco(
            [
                annotation(10, {"size": [5, 5], "counts": SQUARE_RUNS}),
                annotation(11, {"size": [5, 5], "counts": SQUARE_STRING}),
                annotation(12, [[1, 1, 4, 1, 4, 4, 1, 4]]),
                annotation(13, [[1, 1, 4, 1, 4, 4]]),
            ]
        )
    )
    found = read_instances(path, [12, 10, 11, 10])
    assert sorted(found) == [10, 11, 12]
    for instance in found.values():
        np.testing.assert_array_equal(instance.mask(), SQUARE)
        assert (instance.image_id, instance.area) == (3, 9)
    assert read_instances(path, []) == {}


def test_a_zip_file_of_several_splits_is_searched(tmp_path: Path) -> None:
    path = tmp_path / "annotations_trainval2014.zip"
    polygon = [[1, 1, 4, 1, 4, 4, 1, 4]]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("annotations/instances_train2014.json", coco([annotation(1, polygon), annotation(3, polygon)]))
        archive.writestr("annotations/instances_val2014.json", coco([annotation(2, polygon)]))
        archive.writestr("annotations/person_keypoints_val2014.json", coco([annotation(2, [[0, 0]])]))
        archive.writestr("__MACOSX/annotations/._instances_val2014.json", b"\0")
    found = read_instances(path, {1, 2})
    assert found[1].mask().sum() == found[2].mask().sum() == 9


def test_wrong_annotation_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "instances_val2014.json"
    with pytest.raises(UserError, match="there is no file"):
        read_instances(path, [1])
    for content, message in [
        ("{", "not a whole JSON file"),
        ("{}", "no 'annotations'"),
        (coco([{"id": 1}]), "annotation 0 needs"),
        (coco([annotation(1, {"counts": [25]})]), "instance 1 has no image"),
        (coco([annotation(1, [[0, 0, 1, 0, 1, 1]]) | {"image_id": 4}]), "instance 1 has no image"),
        (coco([annotation(2, [])]), "no instance 1"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_instances(path, [1])
    path.write_text(coco([annotation(1, {"size": [5, 5], "counts": [9]})]))
    with pytest.raises(UserError, match="segmentation of instance 1"):
        read_instances(path, [1])[1].mask()
    archive = tmp_path / "annotations.zip"
    archive.write_bytes(b"no zip")
    with pytest.raises(UserError, match="not a whole zip file"):
        read_instances(archive, [1])
    with zipfile.ZipFile(archive, "w") as empty:
        empty.writestr("captions_val2014.json", "{}")
    with pytest.raises(UserError, match="holds no COCO instances"):
        read_instances(archive, [1])


def test_every_target_of_the_prepared_scenes_has_its_mask(tiny_data: Path) -> None:
    annotations = tiny_data.parent / "raw" / "annotations.zip"
    for split in ("val", "systematic"):
        rows = load_split(tiny_data, split)
        targets = {row["image_id"]: {one for asked in row["target_instances"] for one in asked} for row in rows}
        found = read_instances(annotations, [one for of_image in targets.values() for one in of_image])
        assert len(found) > 20
        for image_id, of_image in targets.items():
            for annotation_id in of_image:
                instance = found[annotation_id]
                mask = instance.mask()
                assert instance.image_id == image_id
                assert mask.sum() == instance.area > 0
                assert annotation_of(mask, 1, 1, 1)["segmentation"] == instance.segmentation


# --- the geometry of the model's input -----------------------------------------------------------------------------


def test_resizing_by_area_gives_means_over_areas() -> None:
    values = np.array([[1.0, 2, 6]])
    np.testing.assert_allclose(resize_area(values, 1, 2), [[(1 + 2 / 2) / 1.5, (2 / 2 + 6) / 1.5]])
    np.testing.assert_allclose(resize_area(values, 2, 6), [[1, 1, 2, 2, 6, 6]] * 2)
    picture = np.random.default_rng(16).integers(0, 256, (2, 30, 47))
    for size in [(14, 14), (7, 90), (30, 47)]:
        resized = resize_area(picture, *size)
        assert resized.shape == (2, *size)
        np.testing.assert_allclose(resized.mean(axis=(1, 2)), picture.mean(axis=(1, 2)))


@pytest.mark.parametrize("size", [(64, 64), (97, 64), (480, 641), (375, 500), (333, 128), (31, 50), (20, 20)])
@pytest.mark.parametrize("image_size", [32, 224])
@pytest.mark.parametrize("mode", CROP_MODES)
def test_a_mask_stays_on_its_object_in_the_models_image(size: tuple[int, int], image_size: int, mode: str) -> None:
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    side = min(size)
    distance = np.hypot((rows - 0.47 * height) / (0.2 * side), (columns - 0.54 * width) / (0.3 * side))
    mask = distance < 1
    picture = Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))
    seen = np.asarray(Preprocessing(image_size, "", crop_mode=mode).resize(picture))[..., 0] / 255
    for ours in (crop_map(mask, image_size, crop_mode=mode), crop_mask(mask, image_size, mode)):
        assert ours.shape == seen.shape == (image_size, image_size)
        # A border cut off otherwise would move the object by half a pixel or more.
        np.testing.assert_allclose(centre(ours), centre(seen), atol=0.2)
        assert ours.sum() == pytest.approx(seen.sum(), rel=0.05)


def centre(values: np.ndarray) -> tuple[float, float]:
    """(row, column) of the centre of mass."""
    rows, columns = np.indices(values.shape)
    return (rows * values).sum() / values.sum(), (columns * values).sum() / values.sum()


def test_a_mask_of_the_right_size_is_left_as_it_is() -> None:
    np.testing.assert_array_equal(crop_mask(SQUARE, 5), SQUARE)
    wide = np.zeros((4, 8), dtype=bool)
    wide[:, :2] = True
    assert not crop_mask(wide, 4).any()
