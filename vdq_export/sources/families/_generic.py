"""Video transformer classes without a file: those called by their signature, and those that cannot be exported.

REFUSED: why. TRIED: tiny configurations of classes whose signature says everything; they are exported in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping

from vdq_export.sources.families._family import Tiny

_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "rope_max_seq_len": 16,
}  # fmt: skip

TRIED: Mapping[str, Tiny] = {
    "ChronoEditTransformer3DModel": Tiny(_WAN, (5, 64, 64)),
    "EasyAnimateTransformer3DModel": Tiny(
        {
            "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "patch_size": 2,
            "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 16, "text_embed_dim": 32, "sample_width": 8,
            "sample_height": 8,
        },
        (5, 64, 64),
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        {
            "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 32, "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        (5, 64, 64),
    ),
    "SanaVideoTransformer3DModel": Tiny(
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 24, "cross_attention_dim": 48,
            "caption_channels": 32, "sample_size": 8, "rope_max_seq_len": 16,
        },
        (5, 64, 64),
    ),
}  # fmt: skip

REFUSED: Mapping[str, str] = {
    "AnyFlowFARTransformer3DModel": "a step reads and writes a key-value cache that grows along the video (kv_cache), "
    "and its attention masks are block masks of flex_attention, which ONNX has no operator for",
    "Kandinsky6SRTransformer3DModel": "each attention chooses at run time which blocks of tokens it sees (sort, "
    "flex_attention with a block mask), so its shapes depend on data",
    "SanaWMLTX2RefinerTransformer3DModel": "its pipeline runs it through a key-value cache that grows along the "
    "video (kv_cache), and gives it rotary tables of absolute positions at each call",
    "SanaWMTransformer3DModel": "its attention computes in bfloat16 whatever the type of the weights, and "
    "onnxruntime's CPU provider has no kernels for that: no graph agrees with it",
    "WanAnimate2Transformer3DModel": "it takes lists of latents of several sizes and a key-value cache of the "
    "reference (kv_cache), and masks attention with block masks of flex_attention",
}  # fmt: skip
