"""Tiny checkpoints of architectures by transformers' own classes, with their logits and greedy continuations.

    python tests/interop/make_checkpoints.py OUTPUT [NAME...]      with torch (CPU) and transformers 5.24

Every tensor is random, norms and biases too, so that one that is forgotten or turned is seen; sizes differ from each other.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 256,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "shared_expert_intermediate_size": 12,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 24,
    "patch_size": 4,
}
MODELS = {
    "llama": {"model_type": "llama", "num_hidden_layers": 3, "intermediate_size": 40, "rope_parameters": LLAMA3},
    "llama_bias": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "intermediate_size": 40,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        "tie_word_embeddings": True,
    },
    "qwen3_windows": {
        "model_type": "qwen3",
        "num_hidden_layers": 4,
        "intermediate_size": 40,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
        "rope_parameters": YARN,
    },
    "lara_mini": {
        "model_type": "lara_mini",
        "num_hidden_layers": 6,
        "head_dim": 16,
        "sliding_window": 9,
        **LINEAR,
        **EXPERTS,
    },
    "bailing_hybrid": {
        "model_type": "bailing_hybrid",
        "num_hidden_layers": 5,
        "layer_group_size": 3,
        "intermediate_size": 40,
        "head_dim": 8,
        "num_key_value_heads": 4,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "n_group": 3,
        "topk_group": 2,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 10,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
    "qwen3_next_dense": {
        "model_type": "qwen3_next",
        "num_hidden_layers": 5,
        "intermediate_size": 40,
        "head_dim": 16,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        **LINEAR,
        **EXPERTS,
    },
    "qwen3_5_moe_vlm": {
        "model_type": "qwen3_5_moe",
        "text_config": {"num_hidden_layers": 4, "head_dim": 16, **COMMON, **LINEAR, **EXPERTS, "vocab_size": 70},
        "vision_config": VISION,
        "image_token_id": 66,
        "video_token_id": 67,
        "vision_start_token_id": 68,
        "vision_end_token_id": 69,
    },
    "olmo_hybrid_rope": {
        "model_type": "olmo_hybrid",
        "num_hidden_layers": 4,
        "intermediate_size": 40,
        "linear_allow_neg_eigval": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        **LINEAR,
    },
}


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        scale = {"norm": 0.3, "A_log": 0.5, "dt_bias": 0.5, "bias": 0.3, "conv1d": 0.4}
        size = next((value for key, value in scale.items() if key in name), 0.15)
        with torch.no_grad():
            tensor.copy_(size * noise + (tensor.mean() if "norm" in name else 0.0))


def make(name: str, output: Path) -> None:
    keys = dict(MODELS[name])
    kind = keys.pop("model_type")
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(keys if "text_config" in keys else COMMON | keys))
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    auto = AutoModelForImageTextToText if "text_config" in keys else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32, **options).eval()
    randomise(model)
    model.tie_weights()
    folder = output / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens).logits
        row = tokens[:, :12]
        for _ in range(6):
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens.int().numpy(),
        logits=logits.numpy(),
        prompt=tokens[:, :12].int().numpy(),
        greedy=row[:, 12:].int().numpy(),
    )
    table = json.loads((folder / "config.json").read_text())
    print(name, table["model_type"], f"{logits.std():.2f}", sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    for name in sys.argv[2:] or MODELS:
        make(name, Path(sys.argv[1]))
