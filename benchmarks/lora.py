"""What adapters (task.lora) save over training all of a model: python benchmarks/lora.py

VQA training steps of an AbSViT with random weights, all parameters against adapters of rank 8 in both encoders, both in
one process run, one after the other. Memory is what must be kept: weights, gradients and AdamW's two moments, and what
the forward pass keeps for the backward pass, counted exactly. Times are medians, of which only the ratio is printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from functools import partial
from typing import Any

import torch
from common import SIZES, make_model
from torch import Tensor

from vlabs.models.heads import VQAHead
from vlabs.models.lora import LoRA, add_adapters
from vlabs.tasks.vqa import vqa_loss

ANSWERS = 3129
TOKENS = 14


def measure(size: str, rank: int, batch: int, repetitions: int) -> dict[str, float]:
    model = make_model(size, "absvit", partial(VQAHead, num_answers=ANSWERS)).train()
    if rank:
        for part in (model.vision.vit, model.text):
            part.requires_grad_(False)  # type: ignore[operator]
        add_adapters(model, LoRA(rank=rank))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    pixels, vocabulary = SIZES[size].pixels, SIZES[size].vocabulary
    images = torch.randn(batch, 3, pixels, pixels)
    ids = torch.randint(5, vocabulary, (batch, TOKENS))
    targets = torch.rand(batch, ANSWERS)
    seconds = []
    for step in range(repetitions + 1):
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = vqa_loss(model(images, ids, torch.ones_like(ids)).logits, targets)
        loss.backward()
        optimizer.step()
        if step:  # the first one also makes the moments
            seconds.append(time.perf_counter() - began)
        else:
            activations = sum(kept.values())
    moments = sum(value.numel() * 4 for state in optimizer.state.values() for value in state.values())
    found = {
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "weights_bytes": sum(parameter.numel() * 4 for parameter in model.parameters()),
        "gradients_and_moments_bytes": sum(parameter.numel() * 4 for parameter in trained) + moments,
        "activations_bytes": activations,
        "seconds": statistics.median(seconds),
    }
    del model, optimizer, trained
    gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    sides: dict[str, dict[str, Any]] = {
        name: measure(arguments.size, rank, arguments.batch, arguments.repetitions)
        for name, rank in (("all", 0), (f"rank {arguments.rank}", arguments.rank))
    }
    print(f"batch {arguments.batch}, GiB")
    print(f"{'':10}{'trained':>12}{'weights':>10}{'gradients, moments':>20}{'activations':>13}")
    for name, side in sides.items():
        sizes = [side[key] / 2**30 for key in ("weights_bytes", "gradients_and_moments_bytes", "activations_bytes")]
        print(f"{name:10}{side['trained_parameters'] / 1e6:10.1f} M{sizes[0]:10.2f}{sizes[1]:20.2f}{sizes[2]:13.2f}")
    whole, adapters = sides.values()
    memory = [sum(value for key, value in side.items() if key.endswith("bytes")) for side in (whole, adapters)]
    print(
        json.dumps(
            {
                "trained_ratio": round(adapters["trained_parameters"] / whole["trained_parameters"], 3),
                "memory_ratio": round(memory[1] / memory[0], 3),
                "time_ratio": round(adapters["seconds"] / whole["seconds"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
