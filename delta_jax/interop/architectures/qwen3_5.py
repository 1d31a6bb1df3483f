"""Qwen3.5 and its successors with the same classes: Qwen3-Next with its projections cut otherwise, dense or with experts.

Of a model that also sees, the text part is read; the vision tower and the heads that predict several tokens are set aside.
Names and splits: transformers, `qwen3_5` and `qwen3_5_moe`.
"""

from functools import partial
from typing import Any

from delta_jax.interop.architectures import qwen3_next
from delta_jax.interop.architectures.common import (
    Architecture,
    Names,
    Rows,
    Tensors,
    mlp,
    one,
    options_of,
    parts,
)
from delta_jax.interop.keys import Keys
from delta_jax.models import ModelConfig

ASIDE = r"(language_model\.)?mtp\..*|(model\.)?visual\..*"
PREFIXES = ("model.", "model.language_model.", "language_model.model.")
SIGHT = (
    *("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    *("language_model_only",),
)
MTP_KEYS = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "num_nextn_predict_layers")


def config(keys: Keys, *, sparse: bool) -> ModelConfig:
    nested = "text_config" in keys
    text = keys.inner("text_config") if nested else keys
    if sparse:
        found = qwen3_next.decoder(text, sizes=(248320, 2048, 40), attention=(16, 2), gated=(16, 32))
        text.demand("norm_topk_prob", True, default=True)
        found["experts"] = qwen3_next.routed(text, experts=256, per_token=8)
        # A dense width of the file, if any, is that of no layer.
        text.plain("intermediate_size")
    else:
        found = qwen3_next.decoder(text, sizes=(248320, 4096, 32), attention=(16, 4), gated=(16, 32))
        found["intermediate_size"] = text.get(int, "intermediate_size", default=12288)
    text.demand("output_gate_type", "silu", "swish", default="silu")
    text.demand("mamba_ssm_dtype", "float32", "bfloat16", default="float32")
    if nested:
        found["tie_embeddings"] = keys.get(bool, "tie_word_embeddings", default=found["tie_embeddings"])
        keys.finish((*SIGHT, *MTP_KEYS))
    text.finish((*SIGHT, *MTP_KEYS))
    return ModelConfig(**found)


def projections() -> Rows:
    """The projections of a linear layer's input."""
    return [
        parts("linear_attn.in_proj_qkv.weight", *(f"mixer/{name}_proj/kernel" for name in "qkv")),
        one("linear_attn.in_proj_z.weight", "mixer/g_proj/kernel"),
        one("linear_attn.in_proj_b.weight", "mixer/b_proj/kernel"),
        one("linear_attn.in_proj_a.weight", "mixer/a_proj/kernel"),
    ]


def tensors(config: ModelConfig, keys: Keys, there: Names) -> Tensors:
    nested = "text_config" in keys
    prefix = PREFIXES[1] if nested else PREFIXES[0]
    if there is not None:
        prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in there), prefix)
    # Files of the composite class keep all experts in one tensor, transformers writes text models expert by expert.
    fused = there is None and nested

    def block(index: int) -> tuple[str, Rows]:
        layer = config.layers[index]
        if layer.mixer.mixer == "attention":
            rows = qwen3_next.attention_rows(options_of(config, layer.mixer))
        else:
            rows = [*projections(), *qwen3_next.gated_delta_net_rest()]
        rows += qwen3_next.expert_rows(config, fused=fused) if layer.experts else mlp()
        return f"{prefix}layers.{index}.", [*qwen3_next.norms(config), *rows]

    head = "language_model.lm_head.weight"
    return Tensors(
        qwen3_next.outer(config, prefix, head if there and head in there else "lm_head.weight"), block, ASIDE
    )


def table(config: ModelConfig, *, sparse: bool) -> dict[str, Any]:
    if sparse:
        found = qwen3_next.decoder_table(config, "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM")
        return found | qwen3_next.routed_table(config)
    found = qwen3_next.decoder_table(config, "qwen3_5_text", "Qwen3_5ForCausalLM")
    return found | {"intermediate_size": config.mlp_width}


DENSE = Architecture("transformers", partial(config, sparse=False), tensors, partial(table, sparse=False))
SPARSE = Architecture("transformers", partial(config, sparse=True), tensors, partial(table, sparse=True))
