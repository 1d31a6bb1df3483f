"""Checkpoints as they are published, by their config.json alone: their sizes, and the names of their tensors.

The tables hold the keys of the published files that decide about shapes; what is missing there is missing here too and is
the default of the class. Nothing is allocated.
"""

import math

import pytest

from delta_jax.interop.architectures.common import model_of
from delta_jax.interop.checkpoint import abstract_leaves, architecture_of, expected_layout
from delta_jax.interop.keys import Keys

GATED = {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
GATED |= {"linear_conv_kernel_dim": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6}
ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
ROPE |= {"mrope_section": [11, 11, 10], "mrope_interleaved": True}


def qwen3_5(width, layers, inner, heads, value_heads, *, tied=True):
    """The models that also see; the sizes are those of the model cards."""
    text = {"model_type": "qwen3_5_text", "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
    text |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 256, "vocab_size": 248320}
    text |= {"linear_num_value_heads": value_heads, "full_attention_interval": 4, "rope_parameters": ROPE, **GATED}
    return {"model_type": "qwen3_5", "text_config": text, "vision_config": {}, "tie_word_embeddings": tied}


ATTENTION_OF_KIMI = [4, 8, 12, 16, 20, 24, 27]
TABLES = {
    "Qwen3.5-0.8B": qwen3_5(1024, 24, 3584, (8, 2), 16),
    "Qwen3.5-2B": qwen3_5(2048, 24, 6144, (8, 2), 16),
    "Qwen3.5-4B": qwen3_5(2560, 32, 9216, (16, 4), 32),
    "Qwen3.5-9B": qwen3_5(4096, 32, 12288, (16, 4), 32, tied=False),
    "Qwen3.5-27B": qwen3_5(5120, 64, 17408, (24, 4), 48, tied=False),
    "Qwen3.5-35B-A3B": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "vocab_size": 248320,
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_value_heads": 32,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "rope_parameters": ROPE,
            **GATED,
        },
        "tie_word_embeddings": False,
    },
    "Qwen3-Next-80B-A3B": {
        "model_type": "qwen3_next",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_value_heads": 32,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_scaling": None,
        **GATED,
    },
    "Olmo-Hybrid-7B": {
        "model_type": "olmo_hybrid",
        "vocab_size": 100352,
        "hidden_size": 3840,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 30,
        "num_key_value_heads": 30,
        "linear_num_key_heads": 30,
        "linear_num_value_heads": 30,
        "linear_key_head_dim": 96,
        "linear_value_head_dim": 192,
        "linear_allow_neg_eigval": True,
        "rope_parameters": {"rope_theta": None, "rope_type": "default"},
    },
    "Kimi-Linear-48B-A3B": {
        "model_type": "kimi_linear",
        "vocab_size": 163840,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 27,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 72,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "mla_use_nope": True,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 1024,
        "moe_router_activation_func": "sigmoid",
        "moe_renormalize": True,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446,
        "num_expert_group": 1,
        "topk_group": 1,
        "use_grouped_topk": True,
        "linear_attn_config": {
            "full_attn_layers": ATTENTION_OF_KIMI,
            "kda_layers": [number for number in range(1, 28) if number not in ATTENTION_OF_KIMI],
            "head_dim": 128,
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
        "rms_norm_eps": 1e-5,
    },
    # The defaults of the classes, which are these models.
    "Ling-3.0-flash": {"model_type": "bailing_hybrid"},
    "Lara-4-Mini": {"model_type": "lara_mini"},
    "delta_net-1.3B-100B": {"model_type": "delta_net", "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 16},
    "delta_net-2.7B-100B": {"model_type": "delta_net", "hidden_size": 2560, "num_hidden_layers": 32, "num_heads": 20},
    "gated-deltanet-380M": {
        "model_type": "gated_deltanet",
        "hidden_size": 1024,
        "num_hidden_layers": 21,
        "num_heads": 4,
        "head_dim": 256,
        "expand_v": 1,
    },
    "1.3B-100B-GatedDeltaNet-pure": {
        "model_type": "gated_deltanet",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_heads": 8,
        "head_dim": 256,
        "expand_v": 1,
        "intermediate_size": 5632,
        "vocab_size": 32000,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
    },
}


def read(name):
    """The keys, the architecture, and the model."""
    table = TABLES[name]
    architecture = architecture_of(table)
    return table, architecture, model_of(architecture, Keys(table))


def parameters(model):
    """Without the biases by which routers choose, which transformers calls buffers."""
    leaves = abstract_leaves(model)
    return sum(leaf.size for path, leaf in leaves.items() if not path.endswith("/expert_bias"))


def tower(depth=27, width=1152, inner=4304, positions=2304, patch=16, frames=2, merged=2, *, out):
    """The numbers of the tower by which Qwen3.5 sees, which is set aside; the defaults are the class's."""
    block = 4 * width * (width + 1) + 2 * inner * width + inner + width + 4 * width
    joined = merged**2 * width
    merger = 2 * width + joined * (joined + 1) + (joined + 1) * out
    return depth * block + 3 * frames * patch**2 * width + width + positions * width + merger


def test_qwen3_5_9b_is_its_text_model_and_its_tower():
    """The model card's number; the layer that predicts a second token, mtp, is not in it."""
    table, _, model = read("Qwen3.5-9B")
    assert parameters(model) + tower(out=table["text_config"]["hidden_size"]) == 9_409_813_744


@pytest.mark.parametrize(
    ("name", "number"),
    [
        # As transformers 5.23 builds them; the biases of Kimi Linear's routers are 26 x 256 numbers more in its files.
        ("Kimi-Linear-48B-A3B", 49_122_675_072),
        ("Qwen3-Next-80B-A3B", 79_674_391_296),
        # Its files hold 14.86 GB of bfloat16.
        ("Olmo-Hybrid-7B", 14_861_741_376 // 2),
        # Files of flash-linear-attention: 1.366B, 357.8M and 1.466B.
        ("delta_net-1.3B-100B", 1_365_677_056),
        ("gated-deltanet-380M", 357_781_928),
        ("1.3B-100B-GatedDeltaNet-pure", 1_466_343_808),
        # 0.6B, of which the embedding is 0.16B; the file holds the head that is tied to it once more.
        ("Qwen3-0.6B", 596_049_920),
    ],
)
def test_number_of_parameters(name, number):
    assert parameters(read(name)[2]) == number


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3.5-0.8B", 0.75),
        ("Qwen3.5-2B", 1.88),
        ("Qwen3.5-4B", 4.21),
        ("Qwen3.5-27B", 26.9),
        ("Qwen3.5-35B-A3B", 34.7),
        ("delta_net-2.7B-100B", 2.70),
        ("Lara-4-Mini", 7.28),
        # 127B with the layer that predicts a second token, whose 512 experts are 3.0B.
        ("Ling-3.0-flash", 124.4),
    ],
)
def test_size_is_that_of_the_name(name, billions):
    """Without towers that see and layers that predict several tokens."""
    assert parameters(read(name)[2]) == pytest.approx(billions * 1e9, rel=4e-3)


GDN, ATTENTION = "linear_attn.in_proj_qkv.weight", "self_attn.q_proj.weight"
VLM = "model.language_model.layers"
NAMES = {
    "Qwen3.5-0.8B": (320, {f"{VLM}.0.{GDN}": (6144, 1024), f"{VLM}.3.{ATTENTION}": (4096, 1024)}),
    "Qwen3.5-4B": (426, {f"{VLM}.30.{GDN}": (8192, 2560), f"{VLM}.31.{ATTENTION}": (8192, 2560)}),
    "Qwen3.5-9B": (427, {"lm_head.weight": (248320, 4096), f"{VLM}.0.linear_attn.conv1d.weight": (8192, 1, 4)}),
    "Qwen3.5-35B-A3B": (
        693,
        {
            f"{VLM}.0.mlp.experts.gate_up_proj": (256, 1024, 2048),
            f"{VLM}.39.mlp.experts.down_proj": (256, 2048, 512),
            f"{VLM}.39.mlp.shared_expert_gate.weight": (1, 2048),
        },
    ),
    "Olmo-Hybrid-7B": (
        523,
        {
            "model.layers.0.linear_attn.v_conv1d.weight": (5760, 1, 4),
            "model.layers.0.linear_attn.o_norm.weight": (192,),
            "model.layers.3.self_attn.q_norm.weight": (3840,),
            "model.layers.3.post_feedforward_layernorm.weight": (3840,),
        },
    ),
    "Kimi-Linear-48B-A3B": (
        20493,
        {
            "model.layers.0.mlp.gate_proj.weight": (9216, 2304),
            "model.layers.1.block_sparse_moe.experts.255.w2.weight": (2304, 1024),
            "model.layers.1.block_sparse_moe.gate.e_score_correction_bias": (256,),
            "model.layers.0.self_attn.A_log": (1, 1, 32, 1),
            "model.layers.26.self_attn.kv_a_proj_with_mqa.weight": (576, 2304),
        },
    ),
    "Lara-4-Mini": (
        478,
        {
            "model.layers.0.linear_attn.in_proj.weight": (6176, 1024),
            "model.layers.33.mlp.experts.gate_up_proj": (128, 1024, 1024),
        },
    ),
    "delta_net-1.3B-100B": (339, {"model.layers.23.attn.b_proj.weight": (16, 2048)}),
    "1.3B-100B-GatedDeltaNet-pure": (435, {"model.layers.0.attn.o_norm.weight": (256,)}),
    "Qwen3-0.6B": (310, {"model.layers.27.self_attn.q_proj.weight": (2048, 1024)}),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_number_of_tensors(name):
    table, architecture, model = read(name)
    number, some = NAMES[name]
    layout, _ = expected_layout(architecture, model, table, None)
    assert len(layout.targets) == number
    assert {tensor: layout.targets[tensor].shapes[0] for tensor in some} == some
    held = sum(math.prod(target.shapes[0]) for target in layout.targets.values())
    leaves = abstract_leaves(model)
    assert held == sum(leaf.size for leaf in leaves.values()) - sum(leaves[path].size for path in layout.constant)
