"""How images are read: as what a run starts from was shown them, unless the data or an experiment says otherwise."""

import json

import numpy as np
import pytest
from conftest import assert_one_line_error
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from vlabs.data.classes import ClassDataModule
from vlabs.data.masks import MaskDataModule
from vlabs.data.preprocessing import (
    CROP_MODES,
    IMAGE_MEAN,
    IMAGE_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
)
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.runs.groups import config_dir
from vlabs.training.build import settle
from vlabs.training.pictures import Shown, choose, shown_to_checkpoint, shown_to_encoder

HALF = (0.5, 0.5, 0.5)
NULLS = {"image_mean": None, "image_std": None, "interpolation": None, "crop_mode": None}


def config_of(*overrides):
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return compose("train", [*overrides])


@pytest.mark.parametrize(
    ("name", "mean", "crop"),
    [
        ("base", HALF, 0.9), ("siglip2_base", HALF, 0.9), ("clip_base", IMAGE_MEAN, 0.9),
        ("dinov2_base", IMAGENET_MEAN, 1.0), ("swin_b", IMAGENET_MEAN, 1.0), ("mini", None, None),
        ("rvt_small", None, None),
    ],
)  # fmt: skip
def test_timm_says_how_images_were_shown_to_an_encoder(name, mean, crop):
    shown = shown_to_encoder(config_of("model=base", f"model/vision={name}").model.vision)
    assert (shown and shown.values["mean"]) == mean
    assert (shown and shown.values["crop"]) == crop


def test_a_file_is_its_architectures_unless_a_config_beside_it_says_otherwise(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.touch()
    vision = {"weights": str(weights), "architecture": "vit_small_patch14_dinov2"}
    assert shown_to_encoder(vision).values["mean"] == IMAGENET_MEAN
    assert shown_to_encoder(vision | {"architecture": "fan_small"}).values["std"] == IMAGENET_STD
    processor = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "resample": 2, "size": {"shortest_edge": 256}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | {"crop_size": {"height": 224}}))
    assert shown_to_encoder(vision).values == {
        "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear", "crop": 0.875,
    }  # fmt: skip
    whole = processor | {"size": {"height": 224, "width": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(whole))
    assert shown_to_encoder(vision).values["crop_mode"] == "squash"
    own = {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert shown_to_encoder(vision).values["mean"] == [0, 0, 0]  # the config is of another architecture
    assert shown_to_encoder(vision | {"weights": str(tmp_path)}).values == {"mean": [0.1] * 3, "std": [0.2] * 3}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        shown_to_encoder(vision)


@pytest.mark.parametrize("name", ["vqav2", "flickr30k", "nlvr2", "snli_ve", "pretrain_coco"])
def test_the_released_recipes_keep_clips_values_for_their_vit_alone(name):
    data = config_of(f"experiment={name}_absvit_base").data
    assert (tuple(data.image_mean), tuple(data.image_std), data.interpolation) == (IMAGE_MEAN, IMAGE_STD, "bicubic")
    assert config_of(f"experiment={name}_absvit_base", "model/vision=dinov2_base").data.image_mean is None


def test_what_the_data_leave_open_is_taken_and_what_they_say_stays(tiny_data):
    shown = Shown("its encoder", {"mean": HALF, "std": HALF, "interpolation": "bilinear", "crop": 0.9})
    data = VQADataModule(tiny_data, image_size=32, **NULLS)
    assert choose(data, shown) == "images: mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bilinear (its encoder)"
    assert data.preprocessing.crop == 1  # whoever is asked about an image sees the whole shorter side
    data = VQADataModule(tiny_data, image_size=32, **NULLS | {"image_mean": [0.1, 0.2, 0.3]})
    line = choose(data, shown)
    assert line.endswith(
        "mean 0.1 0.2 0.3 (the config); its encoder had other values, which data.image_mean=null takes"
    )
    assert (data.preprocessing.mean, data.preprocessing.std) == ((0.1, 0.2, 0.3), HALF)
    data = VQADataModule(tiny_data, image_size=32, **NULLS)
    assert choose(data, None).endswith("bicubic (the default: no pre-trained encoder)")
    assert (data.preprocessing.mean, data.preprocessing.std) == (IMAGE_MEAN, IMAGE_STD)
    # The config of a run of old has no such options: it was CLIP's.
    choose(data := VQADataModule(tiny_data, image_size=32), shown)
    assert (data.preprocessing.mean, data.preprocessing.interpolation) == (IMAGE_MEAN, "bicubic")


def folder_of(kind, path):
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"format_version": 2, "kind": kind, "splits": {}}))
    (path / "classes.json").write_text(json.dumps(["a", "b"]))
    return path


def test_classes_are_cropped_as_the_encoder_was_and_masks_are_resized_by_their_own_rules(tmp_path):
    shown = Shown("it", {"mean": HALF, "std": HALF, "interpolation": "bilinear", "crop": 0.9})
    classes = folder_of("classes", tmp_path / "classes")
    assert choose(data := ClassDataModule(classes, crop=None, **NULLS), shown).endswith("bilinear, crop 0.9 (it)")
    assert data.preprocessing.crop == 0.9
    choose(data := ClassDataModule(classes, crop=None, **NULLS), None)
    assert (data.preprocessing.mean, data.preprocessing.crop) == (IMAGENET_MEAN, 0.875)
    choose(data := ClassDataModule(classes, crop=0.7, **NULLS | {"interpolation": "bicubic"}), shown)
    assert (data.preprocessing.crop, data.preprocessing.interpolation) == (0.7, "bicubic")
    masks = folder_of("masks", tmp_path / "masks")
    assert choose(data := MaskDataModule(masks, **NULLS), shown) == "images: mean 0.5 0.5 0.5, std 0.5 0.5 0.5 (it)"
    assert data.preprocessing.crop == 1
    choose(data := MaskDataModule(masks, **NULLS | {"image_std": [0.1, 0.2, 0.3]}), shown)
    assert data.preprocessing.std == (0.1, 0.2, 0.3)
    with pytest.raises(UserError, match=r"data\.interpolation=bilinear: .* do not use it"):
        MaskDataModule(masks, interpolation="bilinear")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": [0.5, 0.5], "std": [0.5] * 3}, r"x/config.json says data.image_mean=\[0.5, 0.5\] must be three"),
        ({"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}, r"data.image_std=.* must be three numbers above 0"),
        ({"interpolation": "lanczos"}, "data.interpolation=lanczos must be one of bicubic, bilinear"),
        ({"mean": [0.5] * 3}, "x/config.json has only one of mean and deviation"),
    ],
)
def test_values_that_no_image_is_read_by_are_one_line_unless_the_user_says_others(values, message, tiny_data):
    with pytest.raises(UserError, match=message):
        choose(VQADataModule(tiny_data, image_size=32, **NULLS), Shown("x/config.json", values))
    choose(VQADataModule(tiny_data, image_size=32), Shown("x/config.json", values))


def test_a_checkpoint_says_how_its_images_were_shown_also_one_of_old():
    made = Preprocessing(32, "", mean=HALF, std=HALF, interpolation="bilinear", crop=0.9)
    plain = json.loads(json.dumps(made.to_plain()))
    assert Preprocessing.from_plain(plain) == made
    assert shown_to_checkpoint("it", {"preprocessing": plain}).values["interpolation"] == "bilinear"
    old = {name: value for name, value in plain.items() if name not in ("interpolation", "crop", "crop_mode")}
    assert Preprocessing.from_plain(old).interpolation == "bicubic"
    assert shown_to_checkpoint("it", {"preprocessing": old}).values == {
        "mean": list(HALF), "std": list(HALF), "interpolation": "bicubic", "crop": 1.0, "crop_mode": "center",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["resize", "resize_for_training"])
def test_images_are_resized_as_it_is_said(name):
    picture = Image.effect_noise((64, 48), 90).convert("RGB")
    edge = Image.new("RGB", (64, 16))
    edge.paste((255, 0, 0), (0, 0, 16, 16))
    left = [
        np.asarray(getattr(Preprocessing(16, "", crop_mode=mode), name)(edge))[:, :4, 0].min() for mode in CROP_MODES
    ]
    assert left[0] == 0 < 200 < left[1]
    sharp, soft = (
        getattr(Preprocessing(16, "", interpolation=one), name)(picture).tobytes() for one in ("bicubic", "bilinear")
    )
    assert sharp != soft


def test_a_run_says_it_keeps_it_and_hands_it_on(tiny_run, tiny_options, tmp_path, monkeypatch):
    from vlabs.checkpoints.checkpoint import load_checkpoint
    from vlabs.training import build

    run, result = tiny_run
    line = "images: mean 0.5 0.51 0.52, std 0.18 0.17 0.18 (the config); bicubic (the default: no pre-trained encoder)"
    assert line in result.stdout
    said = []
    monkeypatch.setattr(build, "say", said.append)
    nulls = ["data.image_mean=null", "data.image_std=null", f"init={run}", "hydra.run.dir=none"]
    config = config_of(*(one for one in [*tiny_options, *nulls] if not one.startswith("hydra.")))
    with_tokenizer = build.build_task(config)[1].preprocessing
    assert with_tokenizer.mean == load_checkpoint(run).preprocessing.mean
    assert said[0].endswith(f"(init={run})")
    OmegaConf.update(config, "data.image_mean", [0.1, 0.2, 0.3])
    assert build.build_task(config)[1].preprocessing.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    "option", ["data.image_mean=[0.5,0.5,0.5]", "data.image_size=64", "data.interpolation=bilinear"]
)
def test_an_evaluation_reads_images_as_the_model_was_trained_to(option, tiny_run, tmp_path, in_process):
    result = in_process("vlabs.evaluate", [f"ckpt={tiny_run[0]}", option], tmp_path)
    assert_one_line_error(result, option, "as in the model's training")


@pytest.mark.parametrize(
    ("options", "size"), [(["init=scenes"], 64), ([], 224), (["init=scenes", "data.image_size=32"], 32)]
)
def test_images_have_the_size_that_init_was_trained_on_unless_it_is_set(options, size):
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", overrides=["data=vqav2", "data.dir=x", *options])
    settle(config)
    assert config.data.image_size == config.model.vision.img_size == size
