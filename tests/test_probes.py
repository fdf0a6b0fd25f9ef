"""Inside the image encoder: sinks against plain loops, a head without its output against weights without it."""

import json

import numpy as np
import pytest
import torch
from test_variants import make

from vlabs.attention.gradients import inputs_of
from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.evaluation.probes import head_means, sinks, without_head
from vlabs.models.variants.qa_vit import QAViT


def given(count=3):
    torch.manual_seed(0)
    return torch.randn(count, 3, 32, 32), torch.randint(5, 50, (count, 6)), torch.ones(count, 6, dtype=torch.int64)


def test_sinks_are_the_tokens_and_the_attention_that_a_plain_loop_counts(tiny_run, monkeypatch):
    monkeypatch.setattr("vlabs.evaluation.probes.OUTLYING", 0.1)  # none of 17 tokens is far away
    model = load_checkpoint(tiny_run[0]).model
    batch = given()
    attention: list[torch.Tensor] = []
    with torch.inference_mode(), inputs_of([block.norm2 for block in model.vision.vit.blocks]) as states:
        found = sinks(model, *batch)
        model(*batch, record=attention)
    assert set(found[0]) == {"1", "2", "fusion 1"}
    for n, of_text in enumerate(found):
        for block, (read, x) in enumerate(zip(attention, states, strict=True), start=1):
            norms = [float(token.norm()) for token in x[n]]
            limit = np.mean(norms) + 0.1 * np.std(norms, ddof=1)
            places = [place for place, norm in enumerate(norms) if norm > limit]
            assert 0 < len(places) < 17
            shares = [float(sum(query[place] for place in places)) for head in read[n] for query in head]
            assert of_text[str(block)]["tokens"] == pytest.approx(100 * len(places) / 17)
            assert of_text[str(block)]["attention"] == pytest.approx(100 * np.mean(shares), rel=1e-4)


@torch.inference_mode()
def test_words_that_join_the_attention_are_no_sinks_and_hide_no_head():
    model = make(QAViT()).float()
    batch = torch.randn(2, 3, 32, 32), torch.randint(5, 20, (2, 4)), torch.ones(2, 4, dtype=torch.int64)
    assert set(sinks(model, *batch)[0]) == {"2", "3", "4", "fusion 1"}
    attention = model.vision.vit.blocks[2].attn
    attention.proj.weight.zero_()  # what is left of its heads goes through the second output map
    before = model(*batch).logits
    with without_head(head_means(model, [batch])[2], 1):
        assert not torch.allclose(model(*batch).logits, before)


@torch.inference_mode()
def test_a_head_that_is_its_mean_is_as_one_whose_weights_give_only_that(tiny_run):
    model = load_checkpoint(tiny_run[0]).model
    model.vision.topdown = None  # one pass, whose values are those of the weights
    batches = [given(3), given(1)]
    means = head_means(model, batches)
    assert [len(of.heads) for of in means] == [2, 2]
    outputs = []
    hook = model.vision.vit.blocks[1].attn.proj.register_forward_pre_hook(lambda _, x: outputs.append(x[0]))
    before = [model(*batch).logits for batch in batches]
    hook.remove()
    mean = torch.cat([one.flatten(0, 1) for one in outputs]).mean(dim=0)
    torch.testing.assert_close(means[1].means[0].float(), mean)
    with without_head(means[1], 1):
        found = [model(*batch).logits for batch in batches]
    assert not any(torch.allclose(one, other) for one, other in zip(found, before, strict=True))
    torch.testing.assert_close([model(*batch).logits for batch in batches], before)  # it is back
    qkv = model.vision.vit.blocks[1].attn.qkv
    qkv.weight[40:48] = 0  # the values of the second of two heads of 8
    qkv.bias[40:48] = mean[8:]
    torch.testing.assert_close(found, [model(*batch).logits for batch in batches], atol=1e-5, rtol=1e-4)


def test_the_command_says_what_every_head_counts_for_in_both_passes(tiny_run, tiny_data, tmp_path, in_process):
    place = [f"ckpt={tiny_run[0]}", f"data.dir={tiny_data}", "split=val", "hydra.run.dir=out"]
    result = in_process("vlabs.evaluate", ["task=probes", "task.num_texts=9", "task.batch_size=4", *place], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| block | head 1 | head 2 |" in result.stdout
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out/probes.jsonl").read_text().splitlines()]
    assert metrics["texts"] == len(rows) == 9
    assert metrics["heads/2/1"] == pytest.approx(np.mean([row["heads"]["2/1"] for row in rows]))
    assert metrics["sinks/fusion 1/tokens"] == metrics["sinks/2/tokens"]
    model = load_checkpoint(tiny_run[0]).model
    with torch.inference_mode():
        means = head_means(model, [given(), given()])
    assert [len(of.means) for of in means] == [2, 2]
