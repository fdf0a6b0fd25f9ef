"""First passes on disk: what they hold, what comes of them, and a training that reads no image."""

import json
from functools import partial

import datasets
import pytest
import safetensors.torch
import torch
from conftest import assert_one_line_error

from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.images import ImageReader
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.sampling import BatchSpec, Group
from vlabs.data.store import TensorStore
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, StoredPass
from vlabs.models.topdown import AbSTopDown, FeedbackOnly, PerceiverIO
from vlabs.models.variants.film import FiLM
from vlabs.ranking.nearest import Nearest
from vlabs.ranking.passes import FirstPasses

TINY = {"architecture": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
LAYOUT = {"tokens": ((5, 8), torch.int8), "cls": ((8,), torch.float16)}


def made(n: int) -> dict[str, torch.Tensor]:
    tokens = torch.randn(5, 8, generator=torch.Generator().manual_seed(n)) * 10.0 ** torch.arange(-2, 3)[:, None]
    return {"tokens": tokens, "cls": tokens[0]}


def test_what_several_processes_add_is_read_to_within_a_step_of_int8_a_token(tmp_path):
    first, second = (TensorStore(tmp_path / "store", "one", LAYOUT) for _ in range(2))
    for n in range(7):
        (first, second)[n % 2].add(str(n), made(n))
    assert "3" not in first
    first.flush()
    second.flush()
    third = TensorStore(tmp_path / "store", "one", LAYOUT)
    first.refresh()
    left = tmp_path / "store" / ".vlabs-0123456789ab-89abcdef"  # by a process that was killed while it wrote
    left.touch()
    third.add("more", made(7))
    third.flush()
    assert not left.exists()
    for store in (first, third):
        found = store.read(["5", "0", "6"])
        for row, n in enumerate((5, 0, 6)):
            step = made(n)["tokens"].abs().amax(dim=1, keepdim=True) / 127
            assert ((found["tokens"][row] - made(n)["tokens"]).abs() <= 0.51 * step).all()
            torch.testing.assert_close(found["cls"][row], made(n)["cls"].half())
    sizes = sum(path.stat().st_size for path in (tmp_path / "store").glob("*.safetensors"))
    assert third.bytes_each == 5 * 8 + 5 * 4 + 8 * 2
    assert 8 * third.bytes_each <= sizes < 8 * third.bytes_each + 3000


def test_a_shard_of_something_else_or_half_a_shard_is_named(tmp_path):
    store = TensorStore(tmp_path, "one", LAYOUT)
    store.add("a", made(0))
    store.flush()
    with pytest.raises(UserError, match="holds no images as this model sees them: remove it"):
        TensorStore(tmp_path, "another", LAYOUT)
    with pytest.raises(UserError, match="holds no images as this model sees them: remove it"):
        TensorStore(tmp_path, "one", {"cls": LAYOUT["cls"]})
    with pytest.raises(UserError, match="the disk has .* GB: name a folder on another"):
        store.check_room(10**15)
    store.add("b", {name: tensor * float("nan") for name, tensor in made(0).items()})
    with pytest.raises(UserError, match="not finite"):
        store.read(["b"])
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="a.txt is a file, and no folder for first passes: name another folder"):
        TensorStore(tmp_path / "a.txt" / "store", "one", LAYOUT).check_room(1)
    (shard,) = tmp_path.glob("*.safetensors")
    held = safetensors.torch.load_file(shard)
    for keys in ("5", "null", '"a"', '{"a": 0}', "[0]", '[["a"]]'):
        safetensors.torch.save_file(held, tmp_path / "x.safetensors", {"identity": "one", "keys": keys})
        with pytest.raises(UserError, match=r"x.safetensors is damaged \(its keys are no list of names\): remove it"):
            TensorStore(tmp_path, "one", LAYOUT)
    (tmp_path / "x.safetensors").unlink()
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        TensorStore(tmp_path, "one", LAYOUT)


@pytest.mark.parametrize(
    ("make", "stored"),
    [
        (partial(AbSViT, topdown=AbSTopDown()), {"embedded", "tokens", "cls"}),
        (partial(AbSViT, topdown=AbSTopDown(), start=2, keep=0.5), {"embedded", "tokens", "cls"}),
        (partial(AbSViT, topdown=FeedbackOnly()), {"embedded", "tokens", "cls"}),
        (partial(AbSViT, topdown=PerceiverIO()), {"tokens", "cls"}),
        (AbSViT, {"tokens", "cls"}),
        (partial(AbSViT, keep=[0.5, 1.0]), {"tokens", "cls", "read"}),
        (partial(AbSViT, topdown=FiLM()), {"embedded", "tokens", "cls"}),
    ],
)
def test_a_pass_that_was_stored_is_the_pass(make, stored, tmp_path):
    torch.manual_seed(0)
    vision = make(**TINY, num_heads=2)
    passes = FirstPasses(tmp_path, vision, Preprocessing(32, ""), torch.float32)
    assert passes.store.layout.keys() == stored
    images = torch.randn(3, 3, 32, 32)
    passes.fill(((str(n), image[None]) for n, image in enumerate(images)), 3)
    vision.eval()
    again = FirstPasses(tmp_path, vision, Preprocessing(32, ""), torch.float32)
    # What is missing is shared out alike by processes of which one has seen what another has not.
    assert {*again.missing("0123456", 0, 2), *passes.missing("0123456", 1, 2)} == {"3", "4", "5", "6"}
    assert again.missing("0303") == ["3"]
    empty = FirstPasses(tmp_path / "other", vision, Preprocessing(32, ""), torch.float32)
    assert {*again.missing("0123456", 0, 2), *empty.missing("0123456", 1, 2)} >= {"3", "4", "5", "6"}
    prior, index = torch.randn(4, 16), torch.tensor([0, 1, 1, 0])
    with torch.no_grad(), vision.keeping(vision.shares[0]):
        plain = vision.attend(vision.encode(images[[2, 0]]), prior, index)
        found = vision.attend(vision.encode(again.read(["2", "0"])), prior, index)
    torch.testing.assert_close(found.tokens, plain.tokens)
    vision.vit.patch_embed.proj.weight.data += 1
    assert "0" not in FirstPasses(tmp_path, vision, Preprocessing(32, ""), torch.float32)
    assert "0" not in FirstPasses(tmp_path, vision, Preprocessing(32, "", crop=0.5), torch.float32)


@pytest.mark.parametrize("start", [1, 2])
def test_blocks_that_are_trained_continue_from_what_is_stored(start, tmp_path):
    torch.manual_seed(0)
    vision = AbSViT(**TINY, num_heads=2, topdown=AbSTopDown(), start=start).eval()
    with pytest.raises(UserError, match=r"pass task\.freeze=\[vision\]"):
        FirstPasses(tmp_path, vision, Preprocessing(32, ""), training=True)
    for name, value in vision.named_parameters():
        below = ("vit.patch_embed", "vit.cls_token", "vit.pos_embed", *[f"vit.blocks.{n}." for n in range(start - 1)])
        value.requires_grad_(not name.startswith(below))
    passes = FirstPasses(tmp_path, vision, Preprocessing(32, ""), torch.float32, training=True)
    images = torch.randn(1, 3, 32, 32)
    passes.fill([("a", images)], 1)
    vision.vit.blocks[1].mlp.fc1.weight.data += 0.1  # as a step does
    again = FirstPasses(tmp_path, vision, Preprocessing(32, ""), torch.float32, training=True)
    torch.testing.assert_close(vision.encode(again.read(["a"])).tokens, vision.encode(images).tokens)


def test_faiss_finds_nearly_all_that_a_comparison_of_all_does():
    pytest.importorskip("faiss")
    vectors = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    every, some = Nearest(vectors), Nearest(vectors, many=1000)
    assert some.index is not None
    kept = []
    for one in vectors[:20, None] + 0.1:
        cosines, places = every.find(one, 10)
        torch.testing.assert_close(cosines, torch.cosine_similarity(one, vectors[places]))
        kept.append(torch.isin(places, some.find(one, 20)[1]).float().mean())
    assert torch.stack(kept).mean() > 0.95


class _Known:
    def __init__(self, *keys):
        self.keys = keys

    def __contains__(self, key):
        return key in self.keys

    def read(self, keys):
        return StoredPass(torch.tensor([[self.keys.index(key)] for key in keys]), None)


def test_a_reader_of_what_is_stored_takes_no_image_and_leaves_out_what_is_missing(tiny_data):
    rows = load_split(tiny_data, "val")
    plain = ImageReader(rows, Preprocessing(32, ""))
    reader = ImageReader(rows, Preprocessing(32, ""), stored=_Known(plain.key(4), plain.key(2)), on_bad="skip")
    assert "image" not in reader.rows.column_names
    spec = BatchSpec(0, [Group(row, (0, 1)) for row in (2, 3, 4)])
    read = reader.read_batch(spec)
    assert read.images.embedded.tolist() == [[1], [0]]
    assert read.image_index == [0, 0, 1, 1]
    assert read.skipped == [rows[3]["image_id"]]
    assert reader.read(3, 0)[1] is None
    pairs = datasets.Dataset.from_dict({"image": [b"", b""], "image_2": [b"", b""], "image_id": [0, 1]})
    both = ImageReader(pairs, Preprocessing(32, ""), pictures=2)
    known = _Known(both.key(1, 0), both.key(1, 1), both.key(0, 0))
    read = ImageReader(pairs, Preprocessing(32, ""), pictures=2, stored=known).read_batch(
        BatchSpec(0, [Group(0, (0,)), Group(1, (0,))])
    )
    assert read.images.embedded.tolist() == [[0], [1]]


FROZEN = [
    "task.freeze=[vision]", "task.store=store", "logger=csv", "callbacks.grounding=null", "callbacks.predictions=null",
]  # fmt: skip


def test_a_training_from_a_store_is_the_training_and_reads_no_image(tiny_options, tmp_path, in_process, monkeypatch):
    def train(name, *options):
        result = in_process("vlabs.train", [*tiny_options, *FROZEN, f"hydra.run.dir={name}", *options], tmp_path)
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / name / "summary.json").read_text())["metrics"], result.stdout

    plain, _ = train("plain", "task.store=null", "data.scaled_decoding=false")
    first, said = train("first")
    assert "kB each, in store/" in said
    monkeypatch.setattr(ImageReader, "_read_image", None)
    again, _ = train("again")
    assert again["train/loss"] == first["train/loss"]
    assert again["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-3)
    assert again["val/vqa_loss"] == pytest.approx(plain["val/vqa_loss"], rel=1e-3)
    one, other = (load_checkpoint(tmp_path / name).model.state_dict() for name in ("first", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # A run that continues knows its passes by the weights that it continues with.
    resumed = in_process("vlabs.train", ["resume=again", "trainer.max_epochs=3"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert len(list((tmp_path / "store").iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["task.freeze=[]"], "task.freeze=[vision]"),
        (["task.store="], "task.store=null"),
        (["task.store_gb=1e-6"], "task.store_gb=1e-06"),
        (["data.rand_augment=rand-m9-n2"], "data.rand_augment=null"),
    ],
)
def test_what_has_no_one_first_pass_or_no_room_cannot_be_stored(options, part, tiny_options, tmp_path, in_process):
    result = in_process("vlabs.train", [*tiny_options, *FROZEN, *options, "hydra.run.dir=run"], tmp_path)
    assert_one_line_error(result, "task.store", part)
    assert not (tmp_path / "store").exists()


def test_the_blind_see_one_color_and_are_told_so(tiny_data, tiny_options, tmp_path, in_process):
    rows = load_split(tiny_data, "val")
    reader = ImageReader(rows, Preprocessing(32, ""), blind=True)
    read = reader.read_batch(BatchSpec(0, [Group(row, (0,)) for row in (2, 3)]))
    assert read.images.shape == (2, 3, 32, 32)
    assert not read.images.any()
    assert read.image_index == [0, 1]

    options = [*tiny_options, *FROZEN, "data.blind=true", "hydra.run.dir=blind"]
    result = in_process("vlabs.train", options, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "data.blind=true" in result.stdout
    assert "first passes of 1 images" in result.stdout

    asked = ["ckpt=blind", f"data.dir={tiny_data}", "data.blind=true", "data.num_workers=0"]
    result = in_process("vlabs.evaluate", [*asked, "hydra.run.dir=out"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "data.blind=true" in result.stdout
    assert json.loads((tmp_path / "out/metrics.json").read_text())["blind"]
    text_of = {n: text for row in rows for n, text in zip(row["question_id"], row["question"], strict=True)}
    answers: dict[str, set[str]] = {}
    for one in json.loads((tmp_path / "out/results.json").read_text()):
        answers.setdefault(text_of[one["question_id"]], set()).add(one["answer"])
    assert len(answers) < len(text_of)
    assert all(len(given) == 1 for given in answers.values())

    result = in_process("vlabs.evaluate", [*asked, "task=grounding", "hydra.run.dir=where"], tmp_path)
    assert_one_line_error(result, "data.blind=true", "images")
