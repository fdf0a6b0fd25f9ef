"""Models of transformers: what they say, their maps by hand, the command, the measures, and what is refused."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error
from PIL import Image
from tiny_models import change_json, save_tiny

from vlabs.attention.gradients import Read, relevances
from vlabs.data.instances import crop_mask, read_instances
from vlabs.data.prepared import load_split, read_answers
from vlabs.data.preprocessing import decode_image
from vlabs.evaluation.faithfulness import SHARES
from vlabs.look import load
from vlabs.look.models import KINDS
from vlabs.metrics.grounding import energy_inside, to_pixels

TEXT = "is the red circle left ?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random model of every class."""
    room = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(kind, room / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def lookers(folders):
    return {kind: load(str(folder), device="cpu") for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def photo():
    """An image that is wider than high."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8))


def given(looker, photo):
    """What transformers' own processors make of the image and the text, with gradients, and the model."""
    pixels = dict(looker.images(images=[photo], return_tensors="pt"))
    padding = {"padding": "max_length", "max_length": looker.looks.positions} if looker.looks.pads else {}
    text = dict(looker.tokenizer([TEXT], return_tensors="pt", **padding))
    return pixels, {name: text[name] for name in looker.looks.text_inputs if name in text}, looker.looks.model


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_says_what_its_class_says_and_has_a_map_of_every_patch(kind, lookers, photo):
    looker = lookers[kind]
    pixels, text, model = given(looker, photo)
    for name in looker.maps:
        answer = looker.answer(photo, [TEXT], name)[0]
        wide = kind.startswith(("Vilt", "Siglip2"))
        assert answer.map.shape[0] < answer.map.shape[1] if wide else answer.map.shape == (4, 4)
        assert answer.map.min() >= 0 < answer.map.max()
        assert answer.words is None or [word for word, _ in answer.words] == TEXT.split()
    said = dict(answer.answers)
    with torch.no_grad():
        if kind == "BlipForQuestionAnswering":
            ids = model.generate(**pixels, **text, max_new_tokens=11, do_sample=False)[0]
            assert list(said) == [looker.tokenizer.decode(ids[1:], skip_special_tokens=True)]
            return
        output = model(**pixels, **text)
    if kind == "CLIPModel":
        assert said["similarity"] == pytest.approx(float(output.logits_per_image / model.logit_scale.exp()), abs=1e-5)
    elif kind.startswith("Siglip"):
        assert said["match"] == pytest.approx(float(output.logits_per_image.sigmoid()), abs=1e-5)
    elif kind == "BlipForImageTextRetrieval":
        assert said["match"] == pytest.approx(float(output.itm_score.softmax(dim=1)[0, 1]), abs=1e-5)
    else:
        values = output.logits[0].sigmoid().sort(descending=True).values[: len(said)].tolist()
        assert list(said.values()) == pytest.approx(values, abs=1e-5)


def plus(a, b):
    return [[x + y for x, y in zip(one, other, strict=True)] for one, other in zip(a, b, strict=True)]


def times(a, b):
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


def eye(n):
    return [[float(i == j) for j in range(n)] for i in range(n)]


def scaled(r):
    """R − I with rows that sum to 1, plus I."""
    rows = [[x - (i == j) for j, x in enumerate(row)] for i, row in enumerate(r)]
    return plus([[x / sum(row) if sum(row) else 0.0 for x in row] for row in rows], eye(len(r)))


def counted(score, attention):
    """mean_h relu(∇A ⊙ A) of every layer, as lists."""
    gradients = torch.autograd.grad(score, attention, retain_graph=True)
    return [(g * a).clamp(min=0).mean(dim=1)[0].tolist() for g, a in zip(gradients, attention, strict=True)]


def through(blocks, size):
    """R of one stream after its self-attention, number by number."""
    r = eye(size)
    for block in blocks:
        r = plus(r, times(block, r))
    return r


def close(found, expected):
    np.testing.assert_allclose(np.ravel(found), np.ravel(expected), rtol=2e-3, atol=1e-7)


def test_relevance_through_blip_equals_a_computation_number_by_number(lookers, photo):
    looker = lookers["BlipForImageTextRetrieval"]
    pixels, text, model = given(looker, photo)
    vision = model.vision_model(**pixels, output_attentions=True)
    read = model.text_encoder(**text, encoder_hidden_states=vision.last_hidden_state, output_attentions=True)
    logits = model.itm_head(read.last_hidden_state[:, 0])[0]
    score = logits[1] - logits[0]
    ii = through(counted(score, vision.attentions), 17)
    words = text["input_ids"].shape[1]
    tt, ti = eye(words), [[0.0] * 17 for _ in range(words)]
    for own, other in zip(counted(score, read.attentions), counted(score, read.cross_attentions), strict=True):
        tt, ti = plus(tt, times(own, tt)), plus(ti, times(own, ti))
        ti = plus(ti, times(times([list(row) for row in zip(*scaled(tt), strict=True)], other), scaled(ii)))
    answer = looker.answer(photo, [TEXT], "relevance")[0]
    close(answer.map, ti[0][1:])


def test_relevance_through_an_answer_that_blip_generates_follows_its_text(lookers, photo):
    looker = lookers["BlipForQuestionAnswering"]
    pixels, text, model = given(looker, photo)
    ids = model.generate(**pixels, **text, max_new_tokens=11, do_sample=False)
    vision = model.vision_model(**pixels, output_attentions=True)
    read = model.text_encoder(**text, encoder_hidden_states=vision.last_hidden_state, output_attentions=True)
    answer = model.text_decoder(ids[:, :-1], encoder_hidden_states=read.last_hidden_state, output_attentions=True)
    chances = answer.logits.log_softmax(-1)[0, range(ids.shape[1] - 1), ids[0, 1:]]
    own = (ids[0, 1:] != 3).tolist()
    score = chances[own].sum()

    def arrays(attention):
        return [np.array(one) for one in counted(score, attention)]

    ii = np.array(through(counted(score, vision.attentions), 17))
    tt, ti = np.eye(text["input_ids"].shape[1]), 0
    for a, b in zip(arrays(read.attentions), arrays(read.cross_attentions), strict=True):
        tt, ti = tt + a @ tt, ti + a @ ti if np.ndim(ti) else np.zeros((len(tt), 17))
        ti = ti + np.array(scaled(tt)).T @ b @ np.array(scaled(ii))
    aa, ai = np.eye(len(own)), np.zeros((len(own), 17))
    for a, b in zip(arrays(answer.attentions), arrays(answer.cross_attentions), strict=True):
        aa, ai = aa + a @ aa, ai + a @ ai
        ai = ai + b @ ti  # what the answer reads of a word, it reads of what the word has read
    close(looker.answer(photo, [TEXT], "relevance")[0].map, ai[own].mean(axis=0)[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_words_that_counted_are_those_without_which_the_score_of_the_answer_falls(kind, lookers, photo):
    looker = lookers[kind]
    pixels, text, model = given(looker, photo)

    def score(text):
        """Of the answer to the whole text, for one text."""
        with torch.no_grad():
            if kind == "BlipForQuestionAnswering":
                image = model.vision_model(**pixels).last_hidden_state
                read = model.text_encoder(**text, encoder_hidden_states=image).last_hidden_state
                chances = model.text_decoder(ids[:, :-1], encoder_hidden_states=read).logits.log_softmax(-1)[0]
                return float(sum(chances[n, one] for n, one in enumerate(ids[0, 1:].tolist()) if n == 0 or one != 3))
            output = model(**pixels, **text)
        if kind == "BlipForImageTextRetrieval":
            return float(output.itm_score[0, 1] - output.itm_score[0, 0])
        if kind == "CLIPModel":
            return float(output.logits_per_image / model.logit_scale.exp())
        return float((output.logits_per_image if kind.startswith("Siglip") else output.logits)[0, best])

    ids = model.generate(**pixels, **text, max_new_tokens=11, do_sample=False) if kind.startswith("BlipForQ") else None
    best = int(model(**pixels, **text).logits.argmax()) if kind == "ViltForQuestionAnswering" else 0
    words, falls = TEXT.split(), []
    for n in range(len(words)):
        left = " ".join(words[:n] + words[n + 1 :])
        padding = {"padding": "max_length", "max_length": looker.looks.positions} if looker.looks.pads else {}
        read = looker.tokenizer([left], return_tensors="pt", **padding)
        falls.append(score(text) - score({name: read[name] for name in text}))
    answer = looker.answer(photo, [TEXT], "relevance")[0]
    assert [word for word, _ in answer.words] == words
    total = sum(max(0.0, fall) for fall in falls)
    close([share for _, share in answer.words], [max(0.0, fall) / total for fall in falls])
    assert looker.answer(photo, ["circle"], "relevance")[0].words in ([("circle", 1.0)], [("circle", 0.0)])


def test_relevances_of_many_layers_with_large_gradients_do_not_overflow():
    attention = [torch.rand(1, 2, 3, 3).softmax(-1).requires_grad_() for _ in range(40)]
    score = 1e5 * torch.stack([one.sum() for one in attention]).sum()[None]
    found = relevances(score, [[Read("image", "image", one)] for one in attention])["image", "image"]
    assert found.isfinite().all()
    assert found.max() > 1e100


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel", "ViltForQuestionAnswering"])
def test_relevance_and_normgrad_of_other_kinds_equal_their_definitions(kind, lookers, photo):
    looker = lookers[kind]
    pixels, text, model = given(looker, photo)
    wanted = {"output_attentions": True, "output_hidden_states": True}
    if kind.startswith("Vilt"):
        # transformers puts the patches in a random order: that of the same seed is drawn again.
        torch.manual_seed(1)
        output = model(**pixels, **text, **wanted)
        torch.manual_seed(1)
        order = torch.multinomial(torch.ones(24), 24).argsort()
        score, seen, words = output.logits.max(), output, text["input_ids"].shape[1]
        places = words + 1 + order
        related = np.array(through(counted(score, seen.attentions), words + 25))[0]
        expected = related[places]
    else:
        pixels["pixel_values"].requires_grad_()
        output = model(**pixels, **text, **wanted)
        score, seen = output.logits_per_image[0, 0], output.vision_model_output
        if kind == "CLIPModel":
            score = score / model.logit_scale.exp()
            places = torch.arange(1, 17)
            expected = np.array(through(counted(score, seen.attentions), 17))[0, 1:]
        else:
            places, head = torch.arange(16), model.vision_model.head
            states = seen.last_hidden_state.detach()
            query, key, value = (
                part.unflatten(-1, (2, 8)).transpose(1, 2)
                for part in (
                    F.linear(x, w, b) for x, w, b in zip(
                        (head.probe, states, states), head.attention.in_proj_weight.chunk(3),
                        head.attention.in_proj_bias.chunk(3), strict=True,
                    )
                )
            )  # fmt: skip
            pooling = (query @ key.mT / 8**0.5).softmax(-1).detach().requires_grad_()
            pooled = head.attention.out_proj((pooling @ value).transpose(1, 2).flatten(2))
            pooled = (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
            cosine = F.normalize(pooled, dim=-1) @ output.text_embeds.detach()[0]
            again = (cosine * model.logit_scale.exp() + model.logit_bias)[0]
            assert float(again) == pytest.approx(float(score), abs=1e-5)
            r = np.array(scaled(through(counted(score, seen.attentions), 16)))
            expected = (np.array(counted(again, [pooling])[0]) @ r)[0]
    close(looker.answer(photo, [TEXT], "relevance")[0].map, expected)

    product = np.ones(len(places))
    states = seen.hidden_states[:2]  # what goes into the two blocks
    for x, g in zip(states, torch.autograd.grad(score, states), strict=True):
        one = np.array([float(g[0, n].norm() * x[0, n].norm()) for n in places])
        product *= (one - one.min()) / (one.max() - one.min())
    close(looker.answer(photo, [TEXT], "normgrad")[0].map, product)


def test_similarity_is_that_of_a_patch_which_the_last_attention_reads_alone(lookers, photo):
    pixels, text, model = given(lookers["CLIPModel"], photo)
    with torch.no_grad():
        output = model(**pixels, **text, output_hidden_states=True)
        last, cosines = model.vision_model.encoder.layers[-1], []
        for token in output.vision_model_output.hidden_states[-2][0, 1:]:
            token = token + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(token)))
            token = token + last.mlp(last.layer_norm2(token))
            image = model.visual_projection(model.vision_model.post_layernorm(token))
            cosines.append(float(F.cosine_similarity(image, output.text_embeds[0], dim=0)))
    close(lookers["CLIPModel"].answer(photo, [TEXT], "similarity")[0].map, np.array(cosines) - min(cosines))


def test_the_command_draws_an_upright_image_and_says_what_counted(folders, lookers, photo, tmp_path, in_process):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo.save(tmp_path / "photo.jpg", exif=exif)
    given = ["--model", folders["CLIPModel"], "--image", "photo.jpg", "--text", TEXT, "--text", "a red square"]
    result = in_process("vlabs.cli", ["look", *given, "--map", "similarity", "--out", "seen.png"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "similarity" in result.stdout
    assert "cosine similarity" in result.stdout
    assert result.stdout.splitlines()[-1] == "seen.png"
    assert Image.open(tmp_path / "seen.png").width > 900
    result = in_process("vlabs.cli", ["look", *given], tmp_path)
    assert "words that counted: " in result.stdout
    assert (tmp_path / "look.png").is_file()
    assert lookers["CLIPModel"].box((40, 64)) == pytest.approx((0, 12, 40, 52))
    assert lookers["ViltForQuestionAnswering"].box((40, 64)) == (0, 0, 40, 64)


def test_maps_are_measured_as_a_plain_loop_measures_them(folders, lookers, tiny_data, tmp_path, in_process):
    raw = tiny_data.parent / "raw/annotations.zip"
    given = ["look", "--data", tiny_data, "--num-texts", "6", "--instances", raw]
    clip = lookers["CLIPModel"]
    result = in_process("vlabs.cli", [*given, "--model", folders["CLIPModel"]], tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(f"\n| {name} " in result.stdout for name in clip.maps)
    record = json.loads((tmp_path / "look-grounding/grounding.jsonl").read_text().splitlines()[0])
    row = next(row for row in load_split(tiny_data, "val") if record["id"] in row["question_id"])
    position = row["question_id"].index(record["id"])
    image = decode_image(row["image"], "")

    targets = read_instances(raw, row["target_instances"][position])
    mask = crop_mask(np.logical_or.reduce([one.mask() for one in targets.values()]), 32)
    values = clip.answer(image, [record["text"]], "normgrad")[0].map
    assert record["maps"]["normgrad"]["energy"] == pytest.approx(
        float(energy_inside(to_pixels(values, 32), mask)), abs=1e-4
    )

    # Deletion: by hand for one that scores, and for one that answers.
    for kind, folder in (("CLIPModel", "clip"), ("ViltForQuestionAnswering", "vilt")):
        looker = lookers[kind]
        options = ["--model", folders[kind], "--measure", "faithfulness", "--map", "relevance", "--results", folder]
        result = in_process("vlabs.cli", [*given, *options], tmp_path)
        assert result.returncode == 0, result.stderr
        assert "\n| random " in result.stdout
        for line in (tmp_path / folder / "faithfulness.jsonl").read_text().splitlines():
            record = json.loads(line)
            row = next(row for row in load_split(tiny_data, "val") if record["id"] in row["question_id"])
            position = row["question_id"].index(record["id"])
            image = decode_image(row["image"], "")
            pixels, text = looker.pixels(image), looker.text(record["text"])
            order = looker.answer(image, [record["text"]], "relevance")[0].map.ravel().argsort()[::-1]
            curve = []
            for share in SHARES:
                left = pixels["pixel_values"].clone()
                for patch in order[: round(share * len(order))]:
                    top, start = 8 * (patch // 4), 8 * (patch % 4)
                    left[..., top : top + 8, start : start + 8] = 0
                with torch.no_grad():
                    best, value = looker.looks.run({**pixels, "pixel_values": left}, text).answers[0][0]
                if kind == "CLIPModel":
                    curve.append(100 * value)
                else:
                    names = read_answers(tiny_data)
                    truth = {
                        names[n]: s
                        for n, s in zip(row["answer_ids"][position], row["answer_scores"][position], strict=True)
                    }
                    curve.append(100 * truth.get(best, 0.0))
            assert record["relevance"]["deletion"] == pytest.approx(np.trapezoid(curve, SHARES) / 0.95, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "change", "options", "parts"),
    [
        ("CLIPModel", None, ["--text", "red " * 20], ["22 tokens", "at most 12", "shorten"]),
        ("CLIPModel", None, ["--text", " "], ["--text is empty"]),
        ("CLIPModel", None, ["--image", "broken.png"], ["broken.png", "not a whole image"]),
        ("CLIPModel", None, ["--image", "nowhere.png"], ["nowhere.png"]),
        ("ViltForQuestionAnswering", None, ["--image", "thin.png"], ["an image of 3000 x 4 pixels: crop it"]),
        ("CLIPModel", {"projection_dim": 20}, [], ["projection.weight is (", "but its config.json asks for (20, "]),
        ("CLIPModel", None, ["--out", "look.gif"], ["look.gif", ".png or .svg"]),
        ("CLIPModel", None, ["--results", "there"], ["--results", "--data"]),
        ("CLIPModel", None, ["--num-texts", "5"], ["--num-texts is for --data"]),
        ("ViltForQuestionAnswering", None, ["--map", "similarity"], ["no map similarity", "relevance, normgrad"]),
        ("CLIPModel", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, [],
         ["is a GPT2LMHeadModel", "CLIPModel", "ViltForQuestionAnswering"]),
        ("BlipForQuestionAnswering", {"architectures": ["BlipForConditionalGeneration"]}, [],
         ["is a BlipForConditionalGeneration", "BlipForImageTextRetrieval"]),
        ("CLIPModel", {"architecture": {"class": "VisionLanguageModel"}}, [], ["of vlabs, not of trans", "--ckpt"]),
        ("CLIPModel", None, ["--model", "scenes"], ["scenes is of vlabs", "predict --ckpt"]),
        ("CLIPModel", {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, [],
         ["is a LlavaForConditionalGeneration", "writes text", "CLIPModel"]),
        ("CLIPModel", {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, [],
         ["is a Qwen2VLForConditionalGeneration", "writes text", "CLIPModel"]),
        ("CLIPModel", {"vision_config": {"hidden_size": 12 * 2**16}}, [], ["many times the memory"]),
        ("CLIPModel", {"vision_config": {"num_hidden_layers": 300_000}}, [], ["more parameters"]),
        ("CLIPModel", {"text_config": "tiny"}, [], ["holds no model"]),
        ("ViltForQuestionAnswering", {"patch_size": [8, 8]}, [], ["not square by its config"]),
        ("CLIPModel", {"preprocessor_config.json": {"size": 48, "crop_size": 48}}, [], ["32 pixels", "48 x 48"]),
        ("CLIPModel", {"preprocessor_config.json": {"size": 10**6}}, [], ["preprocessor_config.json is damaged"]),
        ("CLIPModel", "preprocessor_config.json", [], ["no preprocessor_config.json", "--model DIR"]),
        ("CLIPModel", "tokenizer.json vocab.txt", [], ["no tokenizer.json", "--model DIR"]),
        ("CLIPModel", "model.safetensors", [], ["no model.safetensors"]),
        ("CLIPModel", "config.json", [], ["no config.json"]),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_into_is_one_line(kind, change, options, parts, folders, photo, tmp_path, in_process):
    import shutil

    folder = shutil.copytree(folders[kind], tmp_path / "model")
    photo.save(tmp_path / "photo.png")
    photo.resize((3000, 4)).save(tmp_path / "thin.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "photo.png").read_bytes()[:2000])
    if isinstance(change, dict):
        file = next((name for name in change if name.endswith(".json")), None)
        change_json(folder / (file or "config.json"), **(change[file] if file else change))
    for name in change.split() if isinstance(change, str) else ():
        (folder / name).unlink()
    asked = {"--image": "photo.png", "--text": "a red square"} | dict(zip(options[::2], options[1::2], strict=True))
    flat = [part for pair in asked.items() for part in pair]
    result = in_process("vlabs.cli", ["look", "--model", "model", *flat], tmp_path)
    assert_one_line_error(result, *parts)
    assert not list(tmp_path.glob("look*"))


def test_names_on_the_hub_and_data_without_regions_are_one_line(folders, tiny_data, tmp_path, in_process):
    given = ["look", "--image", "photo.png", "--text", "a cat"]
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    result = in_process("vlabs.cli", [*given, "--model", "openai/clip-vit-base-patch32"], tmp_path)
    assert_one_line_error(result, "openai/clip-vit-base-patch32", "HF_HUB_OFFLINE", "--model DIR")
    result = in_process("vlabs.cli", [*given, "--model", folders["CLIPModel"], "--data", tiny_data], tmp_path)
    assert_one_line_error(result, "--data is instead of --image")
    options = ["look", "--model", folders["CLIPModel"], "--data", tiny_data]
    for more in (["--human-maps", "hat", "--measure", "faithfulness"], ["--human-maps", "hat", "--seed", "0"]):
        result = in_process("vlabs.cli", [*options, *more], tmp_path)
        assert_one_line_error(result, "--human-maps is a measure of its own", more[2])
    assert_one_line_error(in_process("vlabs.cli", [*options, "--seed", "0"], tmp_path), "--seed is for")
    other = ["predict", "--ckpt", folders["CLIPModel"], "--image", "photo.png", "--question", "a cat"]
    assert_one_line_error(in_process("vlabs.cli", other, tmp_path), "of a model of transformers", "vlabs look --model")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine").touch()
    options = ["--model", folders["CLIPModel"], "--data", tiny_data, "--results", "kept"]
    assert_one_line_error(in_process("vlabs.cli", ["look", *options], tmp_path), "kept already exists")
    options = ["--model", folders["CLIPModel"], "--data", "nowhere", "--results", "new"]
    assert_one_line_error(in_process("vlabs.cli", ["look", *options], tmp_path), "nowhere")
    assert not (tmp_path / "new").exists()


def test_a_config_runs_no_code_and_sets_nothing_beside_the_architecture(folders, photo, tmp_path):
    import shutil

    folder = shutil.copytree(folders["CLIPModel"], tmp_path / "model")
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    change_json(
        folder / "config.json", auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, dtype="float16",
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}, attn_implementation="a/kernel",
    )  # fmt: skip
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    change_json(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Images"})
    # As in some older configs of CLIP, where transformers lets these win.
    known = json.loads((folder / "config.json").read_text())["text_config"]
    change_json(folder / "config.json", text_config={"hidden_size": 24}, text_config_dict=known)
    expected = load(str(folders["CLIPModel"]), device="cpu").answer(photo, [TEXT])[0]
    found = load(str(folder), device="cpu").answer(photo, [TEXT])[0]
    close(found.map, expected.map)
