"""Tiny tokenizers and text encoders with random weights, as pipelines' folders have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.-"
WIDTH = 32


def _pieces(*special: str) -> list[tuple[str, float]]:
    return [(one, 0.0) for one in special] + [("▁", -2.0)] + [(one, -3.0) for one in LETTERS.replace(" ", "")]


def t5(folder: Path, number: str = "", *, kind: str = "UMT5EncoderModel") -> dict[str, list[str]]:
    """A T5 encoder and its tokenizer in `folder`; returns their entries of the index."""
    import transformers

    torch.manual_seed(1)
    made = getattr(transformers, kind)
    config = made.config_class(
        vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=1, num_heads=4, tie_word_embeddings=True
    )
    made(config).save_pretrained(folder / f"text_encoder{number}")
    tokenizer = transformers.T5TokenizerFast(vocab=_pieces("<pad>", "</s>", "<unk>"), extra_ids=0)
    tokenizer.save_pretrained(folder / f"tokenizer{number}")
    return {f"text_encoder{number}": ["transformers", kind], f"tokenizer{number}": ["transformers", "T5TokenizerFast"]}


def llama_and_clip(folder: Path, pooled: int = 16) -> dict[str, list[str]]:
    """HunyuanVideo's two encoders: hidden states of a language model, the pooled ones of CLIP."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(2)
    language = transformers.LlamaConfig(
        vocab_size=80,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
    )
    transformers.LlamaModel(language).save_pretrained(folder / "text_encoder")
    clip = transformers.CLIPTextConfig(
        vocab_size=80,
        hidden_size=pooled,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
    )
    transformers.CLIPTextModel(clip).save_pretrained(folder / "text_encoder_2")
    words = {one: i for i, one in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for number in ("", "_2"):
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        made.save_pretrained(folder / f"tokenizer{number}")
    kind = ["transformers", "PreTrainedTokenizerFast"]
    return {
        "text_encoder": ["transformers", "LlamaModel"], "tokenizer": kind,
        "text_encoder_2": ["transformers", "CLIPTextModel"], "tokenizer_2": kind,
    }  # fmt: skip


def add(folder: Path, entries: dict[str, list[str]], pipeline: str) -> Path:
    """Name the parts and the pipeline's class in the folder's index."""
    path = folder / "model_index.json"
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(index | entries | {"_class_name": pipeline}), encoding="utf-8")
    return folder
