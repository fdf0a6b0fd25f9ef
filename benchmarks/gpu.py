"""Every figure of a GPU in one command: correctness first, then speed. No network, no data, under 20 minutes.

    python benchmarks/gpu.py                           results in outputs/gpu.json, and a table
    python benchmarks/gpu.py --device cpu --size mini  the same steps on a CPU, in a minute or two: do they run?

A step that is in the results already is not run again; one that fails is said, and the others continue.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from vlabs.checkpoints.released import load_released
from vlabs.utils.files import write_json

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "golden"
HEADS = {"vision_heads": 3, "text_heads": 3, "fusion_heads": 3}
_PARITY = 2e-5  # float32 without TF32, of outputs around 1


@dataclass
class Options:
    """The command line, see `parse`."""

    device: str
    size: str
    out: Path
    peak_tflops: float
    batches: list[int]
    pairs: int


@torch.no_grad()
def parity(options: Options) -> dict[str, Any]:
    """The largest difference from the released outputs, in float32 and, relative to their spread, in bfloat16."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = {"float32": 0.0, "bfloat16_relative": 0.0}
    for task, file, output in (("vqa", "vqa", "vqa_logits"), ("retrieval", "irtr", "rank_score")):
        for encoder in ("absvit", "vit"):
            numbers: dict[str, dict[str, torch.Tensor]] = {}
            for key, value in safetensors.torch.load_file(GOLDEN / f"meter_{encoder}_{file}.safetensors").items():
                group, name = key.split("/", 1)
                numbers.setdefault(group, {})[name] = value.to("cpu" if group == "state" else options.device)
            module = load_released(numbers["state"], task=task, **HEADS).to(options.device).eval()
            inputs, expected = numbers["input"], numbers["out"][output]
            arguments = inputs["image"], inputs["text_ids"], inputs["text_masks"]
            plain = module(*arguments).logits.reshape(expected.shape)
            with torch.autocast(options.device, torch.bfloat16):
                half = module(*arguments).logits.reshape(expected.shape).float()
            found["float32"] = max(found["float32"], float((plain - expected).abs().max()))
            spread = float(expected.std()) if expected.numel() > 1 else float(expected.abs().max())
            found["bfloat16_relative"] = max(found["bfloat16_relative"], float((half - expected).abs().max()) / spread)
    if found["float32"] > _PARITY:
        raise RuntimeError(f"the outputs are not the released ones: {found}")
    return found


def resume(options: Options) -> dict[str, Any]:
    """A run that is stopped in mid-epoch and continues, beside one that is not: how far their weights are apart."""
    chosen = ["task=vqa", "data=scenes", "data.size=tiny", "data.num_workers=0", "logger=csv", "trainer.max_epochs=4"]
    chosen += [f"trainer.accelerator={'gpu' if options.device == 'cuda' else 'cpu'}", "trainer.deterministic=true"]
    chosen += [
        "checkpoints.every_n_steps=2",
        "checkpoints.every_minutes=null",
        "callbacks.predictions=null",
        "callbacks.grounding=null",
    ]
    with tempfile.TemporaryDirectory() as folder:
        _, whole = _ended(_start(folder, *chosen, "hydra.run.dir=whole"), Path(folder, "whole"))
        process, last = _start(folder, *chosen, "hydra.run.dir=parts"), Path(folder, "parts/checkpoints/last.ckpt")
        while process.poll() is None and not last.is_file():
            time.sleep(0.01)
        process.terminate()
        stopped, _ = _ended(process, Path(folder, "parts"))
        _, parts = _ended(_start(folder, "resume=parts"), Path(folder, "parts"))
    states = whole["state_dict"], parts["state_dict"]
    apart = max(float((states[0][name] - value).abs().max()) for name, value in states[1].items() if value.numel())
    return {"was_stopped": stopped, "steps": [whole["global_step"], parts["global_step"]], "weights_apart": apart}


def _start(folder: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-m", "vlabs.train", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)


def _ended(process: subprocess.Popen[str], run: Path) -> tuple[bool, dict[str, Any]]:
    """Whether a training was stopped, and its last checkpoint."""
    said = process.communicate()[0]
    if process.returncode not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(said.strip().splitlines()[-1])
    return process.returncode != 0, torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def benchmark(name: str, *arguments: str) -> dict[str, Any]:
    """Another benchmark as a process of its own: the JSON of its last line."""
    command = [sys.executable, str(HERE / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    print(result.stdout.rpartition("\n{")[0].strip(), flush=True)
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def steps(options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    """All that is measured, by name, in order."""
    common = ["--size", options.size, "--device", options.device, "--peak-tflops", str(options.peak_tflops)]
    batches = ["--batches", *map(str, options.batches)]
    return {
        "parity": lambda: parity(options),
        "resume": lambda: resume(options),
        "compile": lambda: benchmark("train_step.py", *common, "--compile", "--questions", str(options.batches[0])),
        "training": lambda: benchmark("train_step.py", *common, "--throughput", *batches),
        "ranking": lambda: benchmark("ranking.py", *common, "--throughput", "--pairs", str(options.pairs)),
        "loader": lambda: benchmark("loader.py", "--images", "100"),
    }


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--size", choices=["base", "small", "mini"], default="base", help="base: ViT-B/16 at 224 px, RoBERTa-base")
    add("--out", type=Path, default=Path("outputs/gpu.json"), help="results; steps that are in it are not run again")
    add("--peak-tflops", type=float, default=989.0, help="dense bfloat16 peak of the card (989: H100)")
    add("--batches", type=int, nargs="+", default=[16, 64], help="questions a step")
    add("--pairs", type=int, default=50_000, help="of the ranking, at least")
    options = Options(**vars(parser.parse_args(arguments)))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use here: pass --device cpu --size mini to see that all steps run")
    return options


def main() -> None:
    options = parse()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    card = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    failed = []
    for name, step in steps(options).items():
        key = f"{name}, {options.size}, {card}"
        if key in results:
            print(f"{key}: there already", flush=True)
            continue
        print(f"\n== {key}", flush=True)
        started = time.perf_counter()
        try:
            found = step()
        except RuntimeError as error:
            failed.append(name)
            print(f"failed: {error}", flush=True)
            continue
        results[key] = {**found, "torch": torch.__version__, "seconds": round(time.perf_counter() - started, 1)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, results)
        print(json.dumps(results[key]), flush=True)
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; run the same command again for what is missing")
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
