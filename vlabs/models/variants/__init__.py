"""Ways to steer the image encoder that are not the paper's. Each has a file, and a config in `conf/model/topdown`."""

from vlabs.models.variants import codebook, cross_attention, film, prompt_merge, qa_vit, sentence_attention

__all__ = ["codebook", "cross_attention", "film", "prompt_merge", "qa_vit", "sentence_attention"]
