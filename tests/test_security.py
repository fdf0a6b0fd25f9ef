"""Files of others: nothing in them runs, nothing is read that was not named, and nothing takes more than it has."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import safetensors.torch
import torch
import transformers
from conftest import assert_one_line_error, command
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint

import vlabs
from data_prep.engine.hub import check_sources
from data_prep.readers.own import Source, write_table
from vlabs.checkpoints.card import model_card
from vlabs.checkpoints.checkpoint import export_safetensors, load_checkpoint, packaged_starts, read_tensors
from vlabs.checkpoints.initialize import initialize
from vlabs.checkpoints.pretrained import text_from_pretrained, vit_from_timm
from vlabs.checkpoints.released import load_released
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.tokenizer import read_tokenizer
from vlabs.errors import UserError, show
from vlabs.models.registry import build, register
from vlabs.runs.groups import config_dir
from vlabs.runs.record import read_config, read_summary
from vlabs.runs.trusted import check_config
from vlabs.training.callbacks.recording import Recorder

GOLDEN = Path(__file__).parent / "golden"


class Touch:
    """What a pickle from a stranger may do when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model's folder that is as it should be."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    from vlabs.checkpoints.share import export_folder

    export_folder("scenes", folder)
    return folder


@pytest.fixture
def model(whole, tmp_path):
    """A copy of it, to be tampered with."""
    return shutil.copytree(whole, tmp_path / "model")


def tamper(folder, file, *path, value):
    content = json.loads((folder / file).read_text())
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    (folder / file).write_text(json.dumps(content))


# What a checkpoint says of its architecture


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        ("vision", "checkpoint_path", "extra.bin"),
        ("vision", "cache_dir", "/tmp"),
        ("vision", "pretrained", True),
        ("vision", "pretrained_cfg", {"file": "extra.bin"}),
        ("vision", "pretrained_cfg_overlay", {"file": "extra.bin"}),
        ("vision", "weights", "local-dir:model"),
        ("vision", "features_only", True),
        ("vision", "device", "cuda"),
        ("vision", "dtype", "float16"),
        ("vision", "block_fn", "os.system"),
        ("vision", "architecture", "hf-hub:someone/model"),
        ("vision", "architecture", "local-dir:model"),
        ("vision", "drop_path_rate", "0.1"),
        ("vision", "img_size", True),
        ("vision", "num_heads", -1),
        ("text", "quantization_config", {"load_in_4bit": True}),
        ("text", "auto_map", {"AutoModel": "code.Model"}),
        ("text", "_attn_implementation", "someone/kernels"),
        ("text", "torch_dtype", "float16"),
        ("fusion", "path", "/etc/passwd"),
        ("head", "num_answers", "many"),
    ],
)
def test_a_model_folder_says_only_what_is_on_the_list_of_its_class(part, option, value, model):
    (model / "extra.bin").write_bytes(pickle.dumps(Touch(model / "ran")))
    tamper(model, "config.json", "architecture", part, option, value=value)
    for load in (vlabs.load, vlabs.VisionLanguageModel.from_pretrained):
        with pytest.raises(UserError) as refused:
            load(model)
        assert str(model) in str(refused.value)
        assert option in str(refused.value) or str(value) in str(refused.value)
    assert not (model / "ran").exists()


@pytest.mark.parametrize(
    "option", ["auto_map", "quantization_config", "_attn_implementation", "attn_implementation", "_commit_hash"]
)
def test_a_text_encoder_in_a_checkpoint_has_options_of_an_architecture_alone(option):
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    spec = {"class": "OtherEncoder", "model_type": "bert", "intermediate_size": 8} | sizes
    # What the configs of the hub say of heads and files is left out, as it ever was.
    build(spec | {"architectures": ["BertModel"], "id2label": {"0": "a"}, "transformers_version": "4.1"})
    with pytest.raises(UserError, match=option):
        build(spec | {option: "x/y"})


def test_a_class_of_your_own_may_be_annotated_with_what_is_not_imported():
    @register
    class Mine(torch.nn.Module):
        def __init__(self, size: NotThere = 3, name: str = "a"):  # noqa: F821
            super().__init__()

    assert build({"class": "Mine", "size": 4}).spec["size"] == 4
    with pytest.raises(UserError, match="'other', which is no option"):
        build({"class": "Mine", "other": 4})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("text", "num_hidden_layers"), 300_000),
        (("fusion", "depth"), 300_000),
        (("vision", "depth"), 300_000),
        (("vision", "img_size"), 100_000),
        (("vision", "embed_dim"), 10**6),
        (("text", "vocab_size"), 10**12),
        (("head", "num_answers"), 10**6),
        (("vision", "mlp_ratio"), 1e300),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_built(path, value, model):
    tamper(model, "config.json", "architecture", *path, value=value)
    started = time.perf_counter()
    with pytest.raises(UserError, match="config.json|model"):
        vlabs.load(model)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, model):
    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights["vision.vit.cls_token"][..., 0] = value
    safetensors.torch.save_file(weights, model / "model.safetensors")
    with pytest.raises(UserError, match=r"the weights vision\.vit\.cls_token are not finite"):
        vlabs.load(model)


def test_answers_of_no_numbers_are_refused(model):
    tamper(model, "preprocessing.json", "std", value=[1e-320] * 3)
    with pytest.raises(UserError, match=r"model\.safetensors gives numbers that are not finite"):
        vlabs.load(model).answer(Image.new("RGB", (40, 30), "red"), ["What is it?"])


# Every file of a folder


@pytest.mark.parametrize("file", ["config.json", "preprocessing.json", "tokenizer.json"])
def test_a_file_of_very_many_values_takes_no_memory(file, model):
    (model / file).write_text('{"a": [' + "[]," * 3_000_000 + "[]]}")
    started = time.perf_counter()
    with pytest.raises(UserError, match="more values"):
        vlabs.load(model)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 1e5), ("image_size", 100_000), ("image_size", 0), ("image_size", "32"), ("image_size", True),
        ("image_size", 32), ("max_length", -1), ("max_length", 10**9), ("max_length", 400),
        ("pad_to_max_length", "no"), ("names", "yes"), ("names", [1]), ("names", ["a" * 2000]), ("names", []),
        ("mean", [0, 0]), ("mean", [0, 0, "a"]), ("std", [0, 0, 0]), ("std", [1, 1, 1e999]), ("std", None),
        ("pad_token_id", -1), ("pad_token_id", 10**6), ("crop", 0), ("crop", 2), ("crop", 1e-9), ("crop", "all"),
        ("file", "/etc/passwd"),
    ],
)  # fmt: skip
def test_preprocessing_that_was_tampered_with_is_one_line(name, value, model):
    tamper(model, "preprocessing.json", name, value=value)
    with pytest.raises(UserError) as refused:
        vlabs.load(model)
    assert str(model) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("file", ["config.json", "preprocessing.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", ["[" * 5000, '{"image_size": NaN}', "{", "[]", "\xff\xfe", "null", '{"a": 1}', "secret = 1"]
)
def test_files_that_are_not_what_they_say_are_one_line(file, content, model):
    (model / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="model"):
        vlabs.load(model)


DOUBLE = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}


def template(pieces, ids):
    """What adds tokens to a text, `A`."""
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if one == "A" else {"SpecialToken": {"id": one, "type_id": 0}}
        for one in pieces
    ]
    special = {"x": {"id": "x", "ids": ids, "tokens": ["x"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 10**6}, "unk_token": "a"}},
        {"model": {"type": "Nothing"}},
        {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}},
        {"post_processor": {"type": "BertProcessing", "sep": ["x", 10**9], "cls": ["y", 10**9]}},
        # What makes of a few letters more text than any memory holds.
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 10**5}] * 2}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 10**5}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}] * 40,
            }
        },
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        {"post_processor": template(["x"] * 2000, [0])},
        {"post_processor": template(["x", "A"], [0] * 100)},
    ],
)
def test_a_tokenizer_that_makes_tokens_that_the_model_has_not_is_one_line(change, model):
    content = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match="token"):
        vlabs.load(model)


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "preprocessing.json", "tokenizer.json", "README.md"]
)
def test_a_link_out_of_a_models_folder_is_refused_and_not_published(file, model, whole, tmp_path):
    (model / file).unlink()
    (model / file).symlink_to(whole / file)
    with pytest.raises(UserError, match=f"{file} is a link out of its folder"):
        vlabs.load(model)
    with pytest.raises(UserError, match="link out"):
        vlabs.checkpoints.share.export_folder(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_within_a_folder_and_those_of_the_hubs_cache_are_followed(whole, tmp_path):
    cached = tmp_path / "models--user--model"
    (cached / "snapshots/abc").mkdir(parents=True)
    (cached / "blobs").mkdir()
    for number, file in enumerate(sorted(whole.iterdir())):
        shutil.copy(file, cached / f"blobs/{number}")
        (cached / f"snapshots/abc/{file.name}").symlink_to(f"../../blobs/{number}")
    assert vlabs.load(cached / "snapshots/abc").preprocessing.names
    (cached / "snapshots/abc/config.json").unlink()
    (cached / "snapshots/abc/config.json").symlink_to(whole / "config.json")
    with pytest.raises(UserError, match="link out"):
        vlabs.load(cached / "snapshots/abc")


@pytest.mark.parametrize("file", ["config.json", "preprocessing.json", "tokenizer.json"])
def test_pipes_and_devices_in_the_place_of_files_are_not_read(file, model):
    (model / file).unlink()
    os.mkfifo(model / file)
    with pytest.raises(UserError, match="regular file"):
        vlabs.load(model)


# A checkpoint's own integrity


def checkpoint_of(whole, tmp_path, change=lambda content: None, name="a.ckpt"):
    content = read_tensors(whole / "model.safetensors")
    change(content)
    torch.save(content, tmp_path / name)
    return tmp_path / name


def test_bytes_that_rotted_in_a_checkpoint_are_found(whole, tmp_path):
    path = checkpoint_of(whole, tmp_path)
    load_checkpoint(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 512] = bytes(512)
    path.write_bytes(content)
    with pytest.raises(UserError, match="CRC"):
        load_checkpoint(path)


def test_an_archive_of_more_bytes_than_its_file_has_is_not_unpacked(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(2**20)}}, tmp_path / "plain.ckpt")
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as source, zipfile.ZipFile(tmp_path / "small.ckpt", "w") as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="larger than the file"):
        read_tensors(tmp_path / "small.ckpt")


def repeat(content):
    weights = content["state_dict"]
    weights["model.more"] = torch.zeros(1).expand(10**6, 10**6)


def share(content):
    one = torch.zeros(10**6)
    content["state_dict"] |= {f"model.{number}": one for number in range(100)}


def lora(content):
    key = "model.text.roberta.encoder.layer.0.attention.self.query"
    weights = content["state_dict"]
    weights[f"{key}.base_layer.weight"] = weights.pop(f"{key}.weight")
    weights[f"{key}.lora_A.default.weight"] = torch.zeros(1, 10**6)
    weights[f"{key}.lora_B.default.weight"] = torch.zeros(10**6, 1)
    content["vlabs"]["lora"] = {"scale": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (repeat, "repeats the few bytes"),
        (share, "repeat the same bytes"),
        (lora, "another shape"),
        (lambda c: c["vlabs"].update(lora={"rank": 1}), "adapters"),
        (lambda c: c["vlabs"].update(lora={"scale": "x"}), "adapters"),
        (lambda c: c["state_dict"].update({"model.more": torch.eye(3).to_sparse()}), "not plain"),
        (lambda c: c["state_dict"].update({"model.more": torch.zeros(3, device="meta")}), "not plain"),
        (lambda c: c["state_dict"].update({k: v.long() for k, v in c["state_dict"].items()}), "of the type"),
        (lambda c: c.update(vlabs=[1]), "not a dictionary"),
        (lambda c: c.update(state_dict=3), "not a dictionary"),
        (lambda c: c["vlabs"].update(data={"history": 7}), "its task, data or preprocessing"),
        (lambda c: c["vlabs"].update(data={"history": [{}]}), "its task, data or preprocessing"),
        (lambda c: c["vlabs"].update(data=[]), "its task, data or preprocessing"),
        (lambda c: c["vlabs"].update(task=7), "its task, data or preprocessing"),
        (lambda c: c["vlabs"]["data"].update(short_side=10**6), "short_side"),
        (lambda c: c["vlabs"]["data"].update(x=torch.zeros(1)), "not plain data"),
        (lambda c: c["vlabs"]["data"].update(x=float("nan")), "not plain data"),
        (lambda c: c["state_dict"].update({3: torch.zeros(1)}), "not tensors by name"),
        (lambda c: c["state_dict"].update({"model.x": None}), "not tensors by name"),
        (lambda c: c["vlabs"].update(task="nlvr2"), "trained for the task 'nlvr2', but holds"),
        (lambda c: c["vlabs"].update(task="classify"), "trained for the task 'classify', but holds"),
        (lambda c: c["vlabs"]["architecture"]["text"].update(pad_token_id=-5), "pad_token_id"),
        (lambda c: c["vlabs"]["preprocessing"].update(max_length=60_000), "at most 8192 are allowed"),
        (lambda c: c["vlabs"].update(architecture=None), "spec"),
        (lambda c: c["vlabs"].pop("architecture"), "spec"),
    ],
)
def test_a_checkpoint_that_was_tampered_with_is_one_line(change, message, whole, tmp_path):
    path = checkpoint_of(whole, tmp_path, change)
    with pytest.raises(UserError, match=message) as refused:
        load_checkpoint(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["vlabs"].pop("data"), "without its data"),
        (lambda c: c["state_dict"].update({"model.z": c["state_dict"]["model.vision.vit.cls_token"]}), "share memory"),
    ],
)
def test_what_cannot_be_exported_is_one_line(change, message, whole, tmp_path):
    path = checkpoint_of(whole, tmp_path, change)
    with pytest.raises(UserError, match=message) as refused:
        export_safetensors(path, tmp_path / "out.safetensors")
    assert str(path) in str(refused.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "change", [lambda v: v * float("nan"), lambda v: v.to(torch.complex64), lambda v: v.to(torch.int8), lambda v: v > 0]
)
def test_a_training_begins_with_no_weights_that_are_no_numbers(change, whole, tmp_path):
    name = "model.vision.vit.cls_token"
    path = checkpoint_of(whole, tmp_path, lambda c: c["state_dict"].update({name: change(c["state_dict"][name])}))
    with pytest.raises(UserError, match=r"init=.*a\.ckpt: the weights vision\.vit\.cls_token"):
        initialize(load_checkpoint(whole).model, path)


@pytest.mark.parametrize(
    ("name", "shape"), [("vision.vit.pos_embed", (1, 0, 64)), ("fusion.token_type.weight", (0, 64))]
)
def test_weights_of_an_odd_shape_are_left_out_of_a_training(name, shape, whole, tmp_path):
    path = checkpoint_of(whole, tmp_path, lambda c: c["state_dict"].update({f"model.{name}": torch.zeros(shape)}))
    assert initialize(load_checkpoint(whole).model, path).left_out == [name]


def test_a_header_that_is_itself_many_times_over_is_refused(whole, tmp_path):
    def laugh(content):
        value = ["ha"]
        for _ in range(30):
            value = [value] * 10
        content["vlabs"]["data"]["x"] = value

    with pytest.raises(UserError, match="nested too deeply, or larger"):
        load_checkpoint(checkpoint_of(whole, tmp_path, laugh))


def test_a_storage_that_claims_more_than_its_record_is_not_read_beyond_it(tmp_path):
    torch.save({"state_dict": {"a": torch.arange(64.0)}}, tmp_path / "plain.ckpt")
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as source, zipfile.ZipFile(tmp_path / "lie.ckpt", "w") as target:
        for record in source.infolist():
            data = source.read(record)
            if record.filename.endswith("data.pkl"):
                assert data.count(b"K@") == 2  # 64, of the storage and of the tensor
                data = data.replace(b"K@", b"J\x00\x00\x10\x00")
            target.writestr(record.filename, data)
    with pytest.raises(UserError, match=r"lie\.ckpt"):
        read_tensors(tmp_path / "lie.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_makes_bytes_without_end_is_refused(zipped, tmp_path):
    torch.save({"a": bytearray(b"123")}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="bytearray"):
        read_tensors(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "value", ["{", "[]", "[" * 5000, "null", '{"format": NaN}', '{"format": 1, "task": "vqa"}', "7"]
)
def test_an_exports_header_that_was_tampered_with_is_one_line(value, whole, tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"model.a": torch.zeros(1)}, path, metadata={"vlabs": value})
    with pytest.raises(UserError, match=r"a\.safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize("start", packaged_starts())
def test_what_comes_with_vlabs_loads(start):
    assert load_checkpoint(start).preprocessing.image_size


def test_a_released_file_with_few_large_numbers_builds_no_large_network(tmp_path):
    numbers = safetensors.torch.load_file(GOLDEN / "absvit_classifier_token.safetensors")
    golden = {name.removeprefix("state/"): value for name, value in numbers.items() if name.startswith("state/")}
    torch.save(golden, tmp_path / "a.pth")
    load_released(tmp_path / "a.pth", task="classification", vision_heads=2)
    for change in (
        {"blocks.300000.norm1.weight": torch.zeros(4)},
        {"blocks.x.norm1.weight": torch.zeros(4)},
        {"head.weight": torch.zeros(10**7, 1)},
        {"patch_embed.proj.weight": torch.zeros(3)},
        {"pos_embed": torch.zeros(1, 0, 24)},
    ):
        torch.save(golden | change, tmp_path / "a.pth")
        with pytest.raises(UserError, match=r"a\.pth|not a checkpoint"):
            load_released(tmp_path / "a.pth", task="classification")


# Text encoders and tokenizers


BERT = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.fixture
def encoder(tmp_path):
    folder = tmp_path / "encoder"
    transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False).save_pretrained(folder)
    return folder


def test_a_text_encoders_config_leads_to_no_code_no_kernels_and_no_other_folder(encoder, tmp_path, monkeypatch):
    (encoder / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    said = {
        "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "_attn_implementation": "someone/kernels",
        "dtype": "float16",
    }
    for name, value in said.items():
        tamper(encoder, "config.json", name, value=value)
    (encoder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    found = text_from_pretrained(str(encoder))
    assert found.encoder.dtype == torch.float32
    tamper(encoder, "config.json", "model_type", value="mine")
    with pytest.raises(UserError, match="is a mine"):
        text_from_pretrained(str(encoder))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_a_text_encoder_are_read_as_plain_data_or_refused(encoder, tmp_path):
    weights = safetensors.torch.load_file(encoder / "model.safetensors")
    expected = text_from_pretrained(str(encoder))
    (encoder / "model.safetensors").unlink()
    torch.save({f"bert.{name}": value for name, value in weights.items()}, encoder / "pytorch_model.bin")
    again = text_from_pretrained(str(encoder))
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), again.parameters(), strict=True))
    (encoder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Touch(tmp_path / "ran")}))
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        text_from_pretrained(str(encoder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 300_000), ("hidden_size", 10**6), ("hidden_act", "os.system"), ("vocab_size", "many"),
     ("hidden_size", 7), ("num_attention_heads", 0)],
)  # fmt: skip
def test_a_text_encoder_that_was_tampered_with_is_one_line(name, value, encoder):
    tamper(encoder, "config.json", name, value=value)
    started = time.perf_counter()
    with pytest.raises(UserError, match="encoder"):
        text_from_pretrained(str(encoder))
    assert time.perf_counter() - started < 10


def test_a_tokenizers_folder_runs_nothing_and_names_no_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = tmp_path / "tokens"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret\n")
    (folder / "vocab.txt").write_text("a\n")
    (folder / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    for said in (
        {"auto_map": {"AutoTokenizer": ["code.Mine", "code.Mine"]}, "tokenizer_class": "Mine"},
        {"tokenizer_class": "BertTokenizer", "vocab_file": str(tmp_path / "secret.txt")},
        {"tokenizer_class": "PreTrainedTokenizerFast", "tokenizer_file": str(tmp_path / "secret.txt")},
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        with pytest.raises(UserError, match="tokens"):
            read_tokenizer(str(folder), tmp_path)
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match="link out"):
        read_tokenizer(str(folder), tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text("secret")
    with pytest.raises(UserError, match="is not JSON"):
        read_tokenizer(str(folder), tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("weights", ["hf-hub:someone/model", "hf_hub:someone/model", "local-dir:model", "nothing.tag"])
def test_weights_by_a_scheme_of_timms_are_refused(weights):
    with pytest.raises(UserError, match=r"model\.vision\.weights|no model|cannot"):
        vit_from_timm(weights, "vit_tiny_patch16_224", img_size=32)


def test_options_of_timm_that_lead_to_files_are_refused_from_a_config_too(tmp_path):
    (tmp_path / "extra.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(UserError, match="checkpoint_path"):
        vit_from_timm(None, "vit_tiny_patch16_224", img_size=32, checkpoint_path=str(tmp_path / "extra.bin"))
    assert not (tmp_path / "ran").exists()


# A run folder's config


LAUGHS = "".join(
    f"{one}: &{one} [{', '.join([before] * 8)}]\n"
    for before, one in zip(["1", *(f"*{name}" for name in "abcdef")], "abcdefg", strict=True)
)


def checked(folder, text, *arguments):
    (folder / "config.yaml").write_text(text)
    return check_config([f"--config-dir={folder}", "--config-name=config", *arguments], "train", Path(config_dir()))


@pytest.mark.parametrize(
    "text",
    [
        "callbacks: {x: {_target_: os.system, command: ls}}",
        "callbacks: {x: {_target_: torch.load, f: a, weights_only: false}}",
        "callbacks: {x: {_target_: pandas.read_pickle}}",
        "logger: {_target_: vlabs.utils.files.write_text, path: a, text: b}",
        "trainer: {_target_: pytorch_lightning.Trainer, plugins: [{_target_: builtins.eval}]}",
        "trainer: {strategy: {a: [[{_target_: subprocess.run}]]}}",
        "trainer: {_target_: pytorch_lightning.trainer.trainer.os.system}",
        "trainer: {_target_: pytorch_lightning.utilities.rank_zero.rank_zero_info}",
        "model: {_target_: transformers.AutoModel.from_pretrained}",
        "task: {_target_: 7}",
        "hydra: {job_logging: {}}",
        "hydra: {callbacks: {x: {_target_: vlabs.models.lora.LoRA}}}",
        "defaults: [callbacks: evil]",
        "# @package hydra.callbacks\nx: 1",
        "callbacks: 3",
        "trainer: []",
        "logger: null",
        "seed: ${oc.env:HOME}",
        "seed: '${oc.decode:7}'",
        "init_by: ['+callbacks.x._target_=os.system']",
        "init_by: ['+callbacks.x={_target_: os.system}']",
        "init_by: [--config-dir=/tmp]",
        "init_by: ['hydra.job_logging.root=1']",
        "init_by: ['trust=os']",
        "init_by: ['import=os']",
        "import: os",
        "init_by: task=vqa",
        "a: !!python/object/apply:os.system [ls]",
        "a: " + "[" * 5000,
        LAUGHS,
        "- a",
        "",
    ],
)  # fmt: skip
def test_a_run_folders_config_names_nothing_but_parts_of_runs(text, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        checked(tmp_path, text)


MERGES = "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}], b{n}: 1}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS + "data: {}",
        MERGES + "data: {}",
        "data: {}\na: [" + "1, " * 400_000 + "1]",
        "data: " + "{a: " * 3000 + "1" + "}" * 3000,
    ],
)
def test_a_config_that_is_larger_than_it_looks_is_not_read(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    started = time.perf_counter()
    assert read_config(tmp_path) is None
    assert time.perf_counter() - started < 2
    (tmp_path / "config.yaml").write_text("a: &a {b: 1}\ndata: *a\n")  # as people write it
    assert read_config(tmp_path).data.b == 1


def test_a_config_that_is_a_pickle_is_not_read(tmp_path):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    for arguments in ([f"--experimental-rerun={tmp_path}/config.pickle"], ["--experimental-rerun", "config.pickle"]):
        with pytest.raises(UserError, match="--experimental-rerun reads a pickle"):
            check_config(arguments, "train", Path(config_dir()))


def test_what_a_run_folders_config_may_name(tmp_path):
    named = "my_tasks.Mine"
    own = f"task: {{_target_: {named}}}"
    with pytest.raises(UserError, match="pass import=my_tasks"):
        checked(tmp_path, own)
    for given in ("import=my_tasks", "+import=other,my_tasks", "trust=[other,my_tasks]"):
        names = "my_tasks" if given == "import=my_tasks" else "other,my_tasks"
        assert checked(tmp_path, own, given)[-1] == f"++import=[{names}]"
    checked(tmp_path, own, f"task._target_={named}")
    with pytest.raises(UserError, match="my_tasks_of_another"):
        checked(tmp_path, "task: {_target_: my_tasks_of_another.Mine}", "import=my_tasks")
    lightning = "pytorch_lightning.callbacks.EarlyStopping"
    checked(tmp_path, f"callbacks: {{x: {{_target_: {lightning}, monitor: a}}, y: null}}\nlogger: {{_target_: null}}")
    # The configs of vlabs themselves are read as ever, and a folder beside them is the user's.
    for arguments in (["--config-name=train"], [f"--config-dir={tmp_path}", "task=mine"]):
        assert check_config(arguments, "train", Path(config_dir())) == arguments


def test_a_run_that_somebody_else_made_does_not_run_his_code(tiny_run, tmp_path, in_process):
    run = shutil.copytree(tiny_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("wandb", "figures"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with open(run / "config.yaml", "a") as file:
        file.write(f"evil:\n  _target_: os.mkdir\n  path: {tmp_path / 'ran'}\n")
    before[run / "config.yaml"] = (run / "config.yaml").read_bytes()
    for arguments in ([f"resume={run}"], [f"--config-dir={run}", "--config-name=config", "hydra.run.dir=again"]):
        refused = in_process("vlabs.train", arguments, tmp_path)
        assert_one_line_error(refused, "config.yaml names os.mkdir", "import=os")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "ran").exists()


def moments(content):
    one = content["optimizer_states"][0]["state"]
    one[next(iter(one))]["exp_avg"] = torch.zeros(3)  # a fused step would write far beyond it


def generator(content):
    content["callbacks"]["GoOn"]["numpy"][2] = 10**6  # numpy would read there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moments, "exp_avg of the optimizer"),
        (generator, "numpy's generator"),
        (lambda c: c.update({"pytorch-lightning_version": "banana"}), "banana"),
        (lambda c: c["loops"]["fit_loop"].update(epoch_progress={"total": "x"}), "is damaged"),
        (lambda c: c.update(train_loader="x"), "is damaged"),
        (lambda c: c["callbacks"]["Recorder"].update(summary={"overrides": 5}), "not a checkpoint that a run"),
        (lambda c: c["vlabs"]["architecture"]["text"].update(num_hidden_layers=10**6), "many more parameters"),
    ],
)
def test_a_last_checkpoint_that_was_tampered_with_is_one_line(change, message, tiny_run, tmp_path, in_process):
    run = shutil.copytree(tiny_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("wandb", "figures"))
    (run / "checkpoints/last.ckpt.previous").unlink(missing_ok=True)
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    change(content)
    torch.save(content, run / "checkpoints/last.ckpt")
    refused = in_process("vlabs.train", [f"resume={run}", "trainer.max_epochs=3", "logger.mode=disabled"], tmp_path)
    assert_one_line_error(refused, str(run / "checkpoints/last.ckpt"), message)


@pytest.mark.parametrize("name", ["checkpoints/../../secret", "secret", "memory://secret"])
@pytest.mark.parametrize("key", ["best_model_path", "kth_best_model_path", "last_model_path", "best_k_models"])
def test_a_checkpoint_names_no_file_outside_of_the_folder_that_lightning_removes_or_sends(key, name, tmp_path):
    folder, (secret, best) = str(tmp_path / "run/checkpoints"), (tmp_path / "secret", tmp_path / "run/checkpoints/a")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for file in (secret, best):
        file.write_text("x")
    said = {"secret": str(secret), "memory://secret": name}.get(name, f"{tmp_path}/run/{name}")
    state = {"dirpath": folder, "best_model_path": str(best), "best_k_models": {str(best): 1}}
    trainer = SimpleNamespace(checkpoint_callbacks=[ModelCheckpoint(folder)])
    recorder = Recorder(SimpleNamespace(folder=tmp_path / "run"), lambda: None, {})
    changed = {key: {said: 1} if key == "best_k_models" else said}
    elsewhere = {"dirpath": str(tmp_path), "best_model_path": str(secret), "best_k_models": {}}
    for change, keeps in (({}, True), (changed, False), (elsewhere, False)):
        checkpoint = {"callbacks": {"ModelCheckpoint": state | change}}
        recorder.on_load_checkpoint(trainer, None, checkpoint)
        assert bool(checkpoint["callbacks"]) == keeps


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", json.dumps({"status": "done", "overrides": [], "steps": "many", "best/val/x": "y"})),
        ("summary.json", "[" * 100_000),
        ("environment.json", json.dumps({"packages": None, "vlabs": ["x"]})),
    ],
)
def test_a_run_folder_of_others_has_a_card(file, content, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("wandb", "figures"))
    (run / file).write_text(content)
    assert "many" not in str(model_card(load_checkpoint(run), run, "a/b"))
    for one in ({"overrides": [{}]}, {"parts": [1]}, {"parts": [{"seconds": "x"}]}, {"parameters": "x"}):
        (run / "summary.json").write_text(json.dumps({"status": "done", "overrides": []} | one))
        assert read_summary(run) is None


# Datasets


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["absolute", "up", "device", "link", "pipe"])
def test_a_row_of_a_dataset_names_no_image_outside_of_it(kind, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    path = {"absolute": str(tmp_path / "secret.png"), "up": "../secret.png", "device": "/dev/zero",
            "link": "link.png", "pipe": "pipe.png"}[kind]  # fmt: skip
    (folder / "train.jsonl").write_text(json.dumps({"image": path, "question": "What?", "answers": ["a"]}) + "\n")
    with pytest.raises(UserError, match="not in the folder|no image's file"):
        write_table(Source(str(folder), {}), tmp_path / "out")
    (folder / "inside.png").write_bytes(png())
    (folder / "train.jsonl").write_text(json.dumps({"image": "inside.png", "question": "What?"}) + "\n")
    assert write_table(Source(str(folder), {}), tmp_path / "out2").is_file()


def test_an_image_of_a_dataset_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    rows = {"photos": [[{"bytes": eps, "path": "a.jpg"}]], "question": ["What?"]}
    features = {"photos": datasets.List(datasets.Image()), "question": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError):  # a list is no image, and nothing was decoded to see that
        write_table(Source(str(tmp_path / "set"), {"image": "photos"}), tmp_path / "out")


@pytest.mark.parametrize("elsewhere", ["http://example.org/a.parquet", "hf://datasets/a/b/c.parquet", "/etc/hostname",
                                       "../a.jsonl", "a/../../b.jsonl"])  # fmt: skip
def test_the_card_of_a_local_dataset_leads_nowhere_else(elsewhere, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {elsewhere}\n---\n")
    with pytest.raises(UserError, match=r"README\.md says that the dataset's files are elsewhere"):
        check_sources(tmp_path)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files:\n  - path: data/*.parquet\n---\nhttp://a.org\n")
    check_sources(tmp_path)


# What is said


def test_what_data_and_checkpoints_say_steers_no_terminal(whole, tmp_path, capsys):
    show("a\x1b[2J\x07b\x9b1m\n  c\u202e")
    said = capsys.readouterr().out
    assert said == "a\\x1b[2J\\x07b\\x9b1m\n  c\\u202e\n"
    model = shutil.copytree(whole, tmp_path / "model")
    answers = json.loads((model / "preprocessing.json").read_text())["answers"]
    tamper(model, "preprocessing.json", "answers", value=[f"\x1b]0;{one}\x07" for one in answers])
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    asked = command("vlabs.predict", "--ckpt", model, "--image", "a.png", "--question", "What\x1b[31m?", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert "\x1b" not in asked.stdout + asked.stderr
    assert "\\x1b]0;" in asked.stdout


def test_a_preprocessing_comes_back_as_it_was():
    tokenizer = read_tensors(packaged_starts()["scenes"])["vlabs"]["preprocessing"]["tokenizer"]
    made = Preprocessing(64, tokenizer, names=("a", "b"), pad_to_max_length=True, crop=0.875)
    assert Preprocessing.from_plain(json.loads(json.dumps(made.to_plain()))) == made
