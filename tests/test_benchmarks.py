"""The benchmarks' rival computes what vlabs computes, and their command lines run and end in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import warm_python
from test_ranking import random_model

from vlabs.checkpoints.released import ReleasedVLM, load_released
from vlabs.data.sampling import BatchSpec, Group
from vlabs.models.absvit import AbSViT
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.topdown import AbSTopDown, ReleasedTopDown
from vlabs.runs.groups import choices

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(BENCHMARKS))

import common  # type: ignore[import-not-found]  # noqa: E402
import gpu  # type: ignore[import-not-found]  # noqa: E402
import keep  # type: ignore[import-not-found]  # noqa: E402
import loader  # type: ignore[import-not-found]  # noqa: E402
import ranking  # type: ignore[import-not-found]  # noqa: E402
import train_step  # type: ignore[import-not-found]  # noqa: E402
import variants  # type: ignore[import-not-found]  # noqa: E402
from released_ranking import ReleasedRanking  # type: ignore[import-not-found]  # noqa: E402


@pytest.mark.parametrize("prior_token", ["eos", "cls"])
@pytest.mark.parametrize("topdown", ["absvit_released", "absvit"])
@torch.no_grad()
def test_the_released_arithmetic_gives_our_scores(topdown: str, prior_token: str) -> None:
    variant = ReleasedTopDown() if topdown == "absvit_released" else AbSTopDown()
    model = random_model(variant, prior_token)
    image, captions = torch.randn(1, 3, 32, 32), ranking.draw_captions(7, 400)
    rival = ReleasedRanking(model, variant.alpha, topdown, prior_token)
    ours = ranking.our_scores(model, image, captions, text_batch=3, batch_size=2)
    assert ours.std() > 0.01
    torch.testing.assert_close(rival.scores(image, captions, batch_size=4), ours, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_fusion_that_is_shown_the_rest_has_the_second_pass_of_what_is_kept_and_z_of_all_others(monkeypatch) -> None:
    for place, name in ((AbSViT, "attend"), (CoAttentionFusion, "forward")):
        monkeypatch.setattr(place, name, getattr(place, name))  # so that both come back afterwards
    model = random_model(AbSTopDown(), "cls")
    given: list[torch.Tensor] = []
    model.fusion.image_map.register_forward_pre_hook(lambda _, of: given.append(of[0]))
    images, index = torch.randn(2, 3, 32, 32), torch.tensor([1, 0, 1])
    ids = torch.randint(5, 400, (3, 6))
    for shown in (False, True):
        if shown:
            keep.show_rest()
        for share in (0.5, 1.0):
            with model.vision.keeping(share):
                output = model(images, ids, torch.ones_like(ids), index)
    seen = output.seen.tokens
    few, whole, both, again = given
    assert (few.shape, whole.shape, both.shape) == ((3, 4, 32), (3, 5, 32), (3, 5, 32))  # [cls], two patches, a mean
    assert torch.equal(again, whole)
    assert torch.equal(whole, seen)
    assert torch.equal(both[:, :3], few[:, :3])
    z = output.bottom_up.tokens[index]
    with model.vision.keeping(0.5):
        kept = model.vision.choose(output.bottom_up, output.prior, index).places
    for tokens, of_image, places in zip(both, z, kept.tolist(), strict=True):
        assert torch.equal(tokens[3:], of_image[[n for n in range(5) if n not in places]])


@torch.no_grad()
def test_the_released_arithmetic_computes_the_reconstruction_loss() -> None:
    model = random_model(AbSTopDown(), "cls")
    rival = ReleasedRanking(model, 10.0, "absvit", "cls")
    images = torch.randn(4, 3, 32, 32)
    ids, mask = rival.pad(ranking.draw_captions(4, 400))
    rival.pairs(images, ids, mask)
    plain = model(images, ids, mask.long(), reconstruct=True)
    torch.testing.assert_close(rival.reconstruction, plain.losses["reconstruction"])


@torch.no_grad()
def test_the_released_arithmetic_gives_the_released_numbers() -> None:
    numbers = safetensors.torch.load_file(GOLDEN / "meter_absvit_irtr.safetensors")
    state = {name.removeprefix("state/"): value for name, value in numbers.items() if name.startswith("state/")}
    released = load_released(state, task="retrieval", vision_heads=3, text_heads=3, fusion_heads=3)
    assert isinstance(released, ReleasedVLM)
    rival = ReleasedRanking(released.model, 5.0)
    scores = rival.pairs(numbers["input/image"], numbers["input/text_ids"], numbers["input/text_masks"].bool())
    torch.testing.assert_close(scores, numbers["out/rank_score"].reshape(-1), atol=5e-6, rtol=0)


def test_the_last_line_is_json_with_both_ratios() -> None:
    result = subprocess.run(
        [warm_python(), str(BENCHMARKS / "ranking.py"), "--size", "mini", "--repetitions", "2", "--captions", "5"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout.splitlines()[-1])
    assert numbers["ratio_float32"] > 0
    assert numbers["ratio_bfloat16"] > 0
    assert numbers["less_to_exact_bfloat16"] > 0
    assert numbers["difference_float32"] < 1e-5


def test_the_parts_of_both_sides_are_all_their_work(capsys: pytest.CaptureFixture[str]) -> None:
    options = ranking.parse(["--size", "mini", "--repetitions", "1", "--captions", "5", "--topdown", "absvit"])
    assert ranking.compare(options)["difference_float32"] < 1e-5
    rows = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    for side in range(5):
        macs = [float(rows[part][2 * side]) for part in (*ranking.PARTS, "all")]
        assert sum(macs[:-1]) == pytest.approx(macs[-1], abs=0.005)


def test_the_table_says_which_machine_its_seconds_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    result = ranking.table(ranking.parse(["--size", "mini", "--table", "--sizes", "1x6", "3x8", "--k", "2"]))
    assert "CPU cores" in capsys.readouterr().out
    assert [(row["images"], row["captions"]) for row in result["table"]] == [(1, 6), (3, 8)]


def test_the_throughput_of_a_gpu_is_measured_by_code_that_runs_on_a_cpu() -> None:
    options = ranking.parse(["--size", "mini", "--pairs", "9", "--batch-size", "4"])
    result = ranking.throughput(options, torch.device("cpu"))
    assert result["pairs"] >= 9
    assert result["less"]["gmac"] < result["gmac"] < result["released"]["gmac"]
    for row in (result, result["less"], result["released"]):
        assert 0 < row["share_of_peak"] < 1


def test_work_within_work_is_booked_once() -> None:
    ledger = common.Ledger()
    matrix = torch.ones(4, 4)
    with ledger.counting(), ledger.part("outer"):
        matrix @ matrix
        with ledger.part("inner"):
            matrix @ matrix @ matrix
    assert ledger.flops == {"outer": 2 * 4**3, "inner": 4 * 4**3}
    assert set(ledger.seconds) == {"outer", "inner"}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("topdown", ["absvit", "absvit_released"])
def test_the_released_training_step_has_our_loss_and_gradients(topdown: str, k: int) -> None:
    options = train_step.parse(["--size", "mini", "--topdown", topdown])
    batch = train_step.make_batch("mini", 6, k)
    sides = [make(name, options, batch) for make, name in ((train_step.our_side, "a"), (train_step.rival_side, "b"))]
    losses = [side.loss() for side in sides]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    task = sides[0].owner
    rival = sides[1].owner
    ours = {name: value.grad for name, value in task.model.named_parameters()}
    assert ours.keys() == {name for name, value in rival.weights.items() if value.requires_grad}
    trained = {name for name, gradient in ours.items() if gradient is not None and gradient.abs().max() > 0}
    assert trained == {name for name, value in rival.weights.items() if value.grad is not None and value.grad.any()}
    for name in trained:
        torch.testing.assert_close(ours[name], rival.weights[name].grad, atol=2e-6, rtol=1e-3, msg=name)
    torch.testing.assert_close(task.prior_loss.log_scale.grad, rival.log_scale.grad)


def test_compiled_parts_change_no_loss_and_no_gradient_and_no_name() -> None:
    batch = train_step.make_batch("mini", 6, 3)
    plain, compiled = (train_step.our_side("", train_step.parse(["--size", "mini"]), batch) for _ in range(2))
    names = list(compiled.owner.state_dict())
    compiled.owner.model.compile_parts(backend="eager")  # traced as for any backend; kernels take minutes
    losses = [side.loss() for side in (plain, compiled)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(*(side.owner.parameters() for side in (plain, compiled)), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    assert list(compiled.owner.state_dict()) == names
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("k", [1, 3])
def test_recomputed_activations_change_no_loss_and_no_gradient(k: int) -> None:
    batch = train_step.make_batch("mini", 6, k)
    kept, again = (train_step.our_side("", train_step.parse(["--size", "mini"]), batch) for _ in range(2))
    again.owner.model.recompute_activations()
    losses = [side.loss() for side in (kept, again)]
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        kept.loss()
        everything = sum(saved)
        saved.clear()
        again.loss()
    assert sum(saved) < everything / 2
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(*(side.owner.parameters() for side in (kept, again)), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_training_benchmark_ends_in_json_with_all_ratios() -> None:
    result = subprocess.run(
        [warm_python(), str(BENCHMARKS / "train_step.py"), "--size", "mini", "--repetitions", "1", "--threads", "1"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout.splitlines()[-1])
    for name in ("ratio_float32_k1", "ratio_float32_k4", "ratio_bfloat16_k4", "memory_ratio_k1"):
        assert numbers[name] > 0
    assert numbers["difference_of_loss"] < 1e-5


def test_cost_by_size_batch_and_depth_is_a_table_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "mini", "--table", "--pixels", "32", "64", "--batches", "1", "2", "--depths", "1", "2"]
    options = train_step.parse([*arguments, "--repetitions", "1", "--plot", str(tmp_path / "cost.png")])
    rows = train_step.table(options)["table"]
    assert "CPU cores" in capsys.readouterr().out
    by_pixels = [row["gmac"] for row in rows if row["what"] == "pixels"]
    assert by_pixels[1] > 2 * by_pixels[0]
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_the_parts_of_a_step_have_all_of_its_time_and_arithmetic() -> None:
    options = train_step.parse(["--size", "mini", "--parts", "--dtype", "float32", "--repetitions", "1"])
    side = train_step.our_side("ours", options, train_step.make_batch("mini", options.questions, 4))
    side.warm_up()
    found = train_step.parts(options)
    work = found["gmac"]
    assert sum(work.values()) == pytest.approx(train_step.gmac(side.flops))
    assert sum(found["share_of_time"].values()) == pytest.approx(1, abs=0.01)
    for part in ("text", "first pass", "second pass", "fusion"):
        # A matrix product has two in the backward pass, of its input and of its weights; pixels need no gradient, and
        # attention is computed again.
        assert 1.4 < work[f"{part}, backward"] / work[f"{part}, forward"] < 2.5


def test_training_throughput_of_a_gpu_is_measured_by_code_that_runs_on_a_cpu() -> None:
    options = train_step.parse(["--size", "mini", "--batches", "4", "--repetitions", "1"])
    rows = train_step.throughput(options, torch.device("cpu"))["rows"]
    sides = ["ours", "less", "released"]
    assert [(row["side"], row["k"]) for row in rows] == [(side, k) for k in (1, 4) for side in sides]
    assert all(0 < row["share_of_peak"] < 1 for row in rows)


def test_the_figures_of_a_gpu_begin_with_parity_and_continue_where_they_stopped(tmp_path, monkeypatch, capsys) -> None:
    options = gpu.parse(["--device", "cpu", "--size", "mini", "--out", str(tmp_path / "gpu.json")])
    found = gpu.parity(options)
    assert 0 < found["float32"] < 5e-6 < found["bfloat16_relative"] < 0.5
    monkeypatch.setattr(gpu, "_PARITY", 0.0)
    with pytest.raises(RuntimeError, match="not the released ones"):
        gpu.parity(options)
    ran: list[str] = []

    def fails() -> dict[str, Any]:
        raise RuntimeError("no memory")

    steps = {"first": lambda: {"n": ran.append("first")}, "second": fails}
    monkeypatch.setattr(gpu, "steps", lambda options: steps)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(options.out)])
    for _ in range(2):
        with pytest.raises(SystemExit, match="error: second failed"):
            gpu.main()
    assert ran == ["first"]
    assert "no memory" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(loader.make_data(tmp_path_factory.mktemp("loader"), 6))


def test_both_loaders_give_the_same_questions_and_nearly_the_same_images(pictures: Path) -> None:
    options = loader.parse(["--image-size", "64", "--batch-size", "5"])
    ours = loader.our_loader(pictures, options, 1).train_dataloader().dataset
    ours.images.augment = None
    plain = loader.PlainLoader(pictures, 64, 5)
    plain.augment = lambda image: image
    for row, position in plain.questions[:5]:
        sample = plain.sample(row, position)
        batch = ours[BatchSpec(0, [Group(row, (position,))])]
        length = batch.input_ids.shape[1]
        assert sample["input_ids"][:length].tolist() == batch.input_ids[0].tolist()
        assert sample["attention_mask"].sum() == batch.attention_mask.sum()
        torch.testing.assert_close(sample["target"], batch.targets[0])
        # Ours is decoded at a smaller size first, and moved by less than a pixel of that; a deviation is 1.
        assert (sample["image"] - batch.images[0]).abs().mean() < 0.2


def test_the_loader_benchmark_measures_both_sides(pictures: Path) -> None:
    options = loader.parse(
        ["--image-size", "32", "--batch-size", "4", "--batches", "1", "--repetitions", "1", "--gpu-rate", "100"]
    )
    result = loader.compare(pictures, options)
    assert result["ratio_k1"] > 0
    assert result["ratio_k4"] > 0


def test_memory_of_the_loader_is_read_in_the_course_of_an_epoch(pictures: Path) -> None:
    result = loader.memory(pictures, loader.parse(["--image-size", "32", "--batch-size", "5"]))
    assert len(result["mib"]) == 4  # at four shares of the epoch
    assert all(mib > 50 for mib in result["mib"])


def test_the_cost_of_every_variant_is_printed(tmp_path) -> None:
    result = subprocess.run(
        [warm_python(), str(BENCHMARKS / "variants.py"), "--size", "mini", "--repetitions", "1", "--threads", "1"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])["time_against_vit"]
    known = {*choices("model/topdown")} - {"prompt_merge"}  # which is of a Swin
    assert found.keys() == known
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line and line.split()[0] in known}
    plain, full = rows["none"], rows["absvit"]
    assert float(full[1]) > float(plain[1])  # decoders
    assert float(full[2]) > 1.05 * float(plain[2])  # a second pass


def test_the_cost_of_every_encoder_is_that_of_the_paper(capsys, monkeypatch) -> None:
    chosen = {
        name: it for name, it in variants.ENCODERS.items() if name in ("vit_small_patch16_224", "rvt_tiny", "fan_tiny")
    }
    monkeypatch.setattr(variants, "ENCODERS", chosen)
    variants.print_encoders()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["encoders"]
    for name, (_, published) in chosen.items():
        # Table 2 counts other parts of an encoder than we do, and rounds to a tenth.
        assert found[name][1] == pytest.approx(published[1], rel=0.16)
        assert found[name][3] == pytest.approx(published[3], rel=0.1)
        assert found[name][3] > 2 * found[name][1]
