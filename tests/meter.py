"""METER as its code lays it out, small and plain: what its checkpoints hold under which names, and what they compute.

Written from the layout that https://github.com/zdou0830/METER documents; nothing of vlabs is used.
"""

import re

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

WIDTH, HEADS = 64, 1  # heads of 64, as everywhere in METER


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Residual(nn.Module):
    """A block of CLIP's ViT."""

    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Visual(nn.Module):
    def __init__(self, width, size, patch, layers):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*[Residual(width) for _ in range(layers - 1)])  # one fewer
        self.ln_post = nn.LayerNorm(width)

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer.resblocks(self.ln_pre(x).transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x)


class Clip(nn.Module):
    """What METER keeps of CLIP: of its text side, some tensors that nothing reads."""

    def __init__(self, size, patch, layers=3):
        super().__init__()
        self.visual = Visual(WIDTH, size, patch, layers)
        self.positional_embedding = nn.Parameter(torch.randn(77, 8))
        self.ln_final = nn.LayerNorm(8)

    def forward(self, images):
        return self.visual(images)


class Attention(nn.Module):
    """BERT's, of x over a context, with residual and post-norm."""

    def __init__(self):
        super().__init__()
        self.self, self.output = nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.self, name, nn.Linear(WIDTH, WIDTH))
        self.output.dense = nn.Linear(WIDTH, WIDTH)
        self.output.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x, context, mask):
        q, k, v = (
            layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, y in ((self.self.query, x), (self.self.key, context), (self.self.value, context))
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + (1 - mask[:, None, None].float()) * -10000
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.output.LayerNorm(self.output.dense(mixed) + x)


class CrossLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.crossattention = Attention(), Attention()
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense = nn.Linear(WIDTH, 4 * WIDTH)
        self.output.dense = nn.Linear(4 * WIDTH, WIDTH)
        self.output.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x, other, mask, other_mask):
        x = self.attention(x, x, mask)
        x = self.crossattention(x, other, other_mask)
        y = self.output.dense(nn.functional.gelu(self.intermediate.dense(x)))
        return self.output.LayerNorm(y + x)


def pooler():
    module = nn.Module()
    module.dense = nn.Linear(WIDTH, WIDTH)
    return module


class Meter(nn.Module):
    """One of METER's networks.

    Args:
        vision: `clip` or `swin`.
        text: `roberta` or `bert`.
        task: METER's: `vqa`, `nlvr2`, `snli`, `irtr`, or `pretrain` for masked language modelling and matching.
        size: pixels.
        vocabulary: tokens.
    """

    def __init__(self, vision="clip", text="roberta", task="pretrain", size=32, vocabulary=50):
        super().__init__()
        self.is_clip, self.task = vision == "clip", task
        if self.is_clip:
            self.vit_model, image_width = Clip(size, 16), WIDTH
        else:
            options = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": size // 8}
            self.vit_model, image_width = SwinTransformer(size, 4, num_classes=0, **options), 32
        common = {"vocab_size": vocabulary, "hidden_size": WIDTH, "num_hidden_layers": 2}
        common |= {"num_attention_heads": 1, "intermediate_size": 96, "max_position_embeddings": 20}
        if text == "roberta":
            self.text_transformer = RobertaModel(RobertaConfig(**common, type_vocab_size=1, layer_norm_eps=1e-5))
        else:
            self.text_transformer = BertModel(BertConfig(**common))
        self.cross_modal_text_transform = nn.Linear(WIDTH, WIDTH)
        self.cross_modal_image_transform = nn.Linear(image_width, WIDTH)
        self.token_type_embeddings = nn.Embedding(3 if task == "nlvr2" else 2, WIDTH)
        self.cross_modal_image_layers = nn.ModuleList([CrossLayer() for _ in range(2)])
        self.cross_modal_text_layers = nn.ModuleList([CrossLayer() for _ in range(2)])
        self.cross_modal_image_pooler, self.cross_modal_text_pooler = pooler(), pooler()
        # Fine-tuned checkpoints keep the heads of pre-training, which nothing reads any more.
        self.mlm_score, self.itm_score = nn.Module(), nn.Module()
        self.mlm_score.transform = nn.Module()
        self.mlm_score.transform.dense = nn.Linear(WIDTH, WIDTH)
        self.mlm_score.transform.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.mlm_score.decoder = nn.Linear(WIDTH, vocabulary, bias=False)
        self.mlm_score.bias = nn.Parameter(torch.randn(vocabulary))
        self.itm_score.fc = nn.Linear(2 * WIDTH, 2)
        if task == "irtr":
            self.rank_output = nn.Linear(2 * WIDTH, 1)
        elif task != "pretrain":
            pictures = 2 if task == "nlvr2" else 1
            classes = {"vqa": 7, "nlvr2": 2, "snli": 3}[task]
            layers = [nn.Linear(2 * WIDTH * pictures, 2 * WIDTH), nn.LayerNorm(2 * WIDTH), nn.GELU()]
            setattr(self, f"{task}_classifier", nn.Sequential(*layers, nn.Linear(2 * WIDTH, classes)))

    def infer(self, images, ids, mask, image_type=1):
        """The features of both streams, and the pooled ones joined."""
        text = self.text_transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        x = self.cross_modal_text_transform(text) + self.token_type_embeddings.weight[0]
        seen = self.vit_model(images) if self.is_clip else self.vit_model.forward_features(images).flatten(1, 2)
        y = self.cross_modal_image_transform(seen) + self.token_type_embeddings.weight[image_type]
        whole = torch.ones(y.shape[:2])
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            x, y = text_layer(x, y, mask, whole), image_layer(y, x, whole, mask)
        read = y[:, 0] if self.is_clip else y.mean(dim=1)
        pooled = [self.cross_modal_text_pooler.dense(x[:, 0]), self.cross_modal_image_pooler.dense(read)]
        return x, y, torch.cat([part.tanh() for part in pooled], dim=-1)

    def forward(self, images, ids, mask):
        """The task's logits; of nlvr2 for images (n, 2, 3, H, W)."""
        if self.task == "nlvr2":
            pooled = [self.infer(images[:, side], ids, mask, 1 + side)[2] for side in (0, 1)]
            return self.nlvr2_classifier(torch.cat(pooled, dim=-1))
        x, _, pooled = self.infer(images, ids, mask)
        if self.task == "irtr":
            return self.rank_output(pooled)[:, 0]
        if self.task == "pretrain":
            mlm = self.mlm_score
            hidden = mlm.transform.LayerNorm(nn.functional.gelu(mlm.transform.dense(x)))
            return self.itm_score.fc(pooled), mlm.decoder(hidden) + mlm.bias
        return getattr(self, f"{self.task}_classifier")(pooled)

    def checkpoint(self):
        """The state as METER's files have it: a Swin's tokens are merged at the end of a stage, not before the next."""
        state = dict(self.state_dict())
        if self.is_clip:
            return state
        old = {}
        for name, value in state.items():
            moved = re.sub(r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
            old[moved] = value
        side = self.vit_model.layers[0].blocks[0].window_size[0] ** 2
        old["vit_model.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(side, side, dtype=torch.int64)
        old["vit_model.layers.0.blocks.0.attn_mask"] = torch.zeros(1, side, side)
        return old
