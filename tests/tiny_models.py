"""Tiny random models of transformers, as folders that `save_pretrained` writes, for the tests of `vlabs look`."""

import json
from pathlib import Path

import torch
import transformers

WORDS = [
    *("what", "is", "the", "color", "of", "shape", "a", "red", "blue", "green", "square", "circle", "triangle"),
    *("left", "right", "?", ".", "yes", "no"),
]
_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
# Of each class: the family that its config and image processor are named after, and more of its config.
_KINDS = {
    "CLIPModel": ("CLIP", {"projection_dim": 8}),
    "SiglipModel": ("Siglip", {}),
    "Siglip2Model": ("Siglip2", {}),
    "BlipForQuestionAnswering": ("Blip", {}),
    "BlipForImageTextRetrieval": ("Blip", {"image_text_hidden_size": 8}),
    "ViltForQuestionAnswering": ("Vilt", {}),
    "ViltForImageAndTextRetrieval": ("Vilt", {}),
}


def save_tokenizer(folder: Path) -> transformers.BertTokenizer:
    """A BERT tokenizer of a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS, *"abcdefghijklmnopqrstuvwxyz", "##s"]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(tokens)))
    tokenizer = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_pieces(folder: Path) -> transformers.Siglip2Tokenizer:
    """The tokenizer of SigLIP 2, of single letters."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz?."]
    tokenizer = transformers.Siglip2Tokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[])
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_tiny(kind: str, folder: Path, positions: int = 12) -> Path:
    """Write a random model of one of the classes that `vlabs look` knows."""
    torch.manual_seed(0)
    tokenizer = save_pieces(folder) if kind == "Siglip2Model" else save_tokenizer(folder)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 3}  # [DEC] and [SEP]
    family, more = _KINDS[kind]
    if family == "Vilt":
        answers = {"id2label": dict(enumerate(["red", "blue", "yes", "no", "3", "two"]))} if "Quest" in kind else {}
        config = transformers.ViltConfig(
            **_VISION, max_position_embeddings=12, vocab_size=len(tokenizer), initializer_range=0.3, **answers
        )
        processor = transformers.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8)
    else:
        vision, text = dict(_VISION), {**_TEXT, **ids, "max_position_embeddings": positions}
        if family == "Blip":
            text |= {"sep_token_id": 3, "initializer_range": 0.3, "encoder_hidden_size": 16}
            vision |= {"initializer_range": 0.3}
        if family.startswith("Siglip"):
            text |= {"projection_size": 16}
        if family == "Siglip2":
            del vision["image_size"]
            vision |= {"num_patches": 16}
            text |= {"max_position_embeddings": 48}
        config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision, **more)
        made = getattr(transformers, f"{family}ImageProcessor")
        if family == "Siglip2":
            processor = made(patch_size=8, max_num_patches=16)
        elif family == "CLIP":
            processor = made(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        else:
            processor = made(size={"height": 32, "width": 32})
    model = getattr(transformers, kind)(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def change_json(path: Path, **values: object) -> None:
    """Set values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
