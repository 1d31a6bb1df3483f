"""Architectures whose classes do not run everywhere: checkpoints made up here, against their equations in NumPy.

The equations are held to logits that published classes gave, where there are some of the same kind of layer.
"""

import json
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from delta_jax.cli import main
from delta_jax.config import load_config
from delta_jax.interop import load_pretrained, save_pretrained
from delta_jax.interop.architectures.common import options_of
from delta_jax.interop.checkpoint import architecture_of, open_checkpoint
from delta_jax.interop.keys import Keys
from delta_jax.interop.safetensors import read_flat, tensors_of_folder, write_file
from delta_jax.testing import relative_error
from delta_jax.training import TrainConfig
from tests.interop import equations
from tests.interop.conftest import CHECKPOINTS
from tests.interop.equations import Tensors, attention, decoder, kimi_delta_attention

SIZES = {"vocabulary": 61, "width": 24, "inner": 40}
COMMON = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "hidden_act": "silu"}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500.0, "rms_norm_eps": 1e-3}


def qwen2(tokens, get):
    mixers = [
        partial(
            attention,
            get=get.under(f"model.layers.{n}.self_attn."),
            heads=4,
            kv_heads=2,
            size=6,
            theta=500.0,
            window=7 if n else None,
            qkv_bias=True,
        )
        for n in range(3)
    ]
    return decoder(tokens, get, mixers, **SIZES, eps=1e-3, tied=True)


QWEN2 = {
    **COMMON,
    **ATTENTION,
    "model_type": "qwen2",
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
}


def mistral(tokens, get):
    options = {"heads": 4, "kv_heads": 2, "size": 8, "theta": 500.0, "window": 5}
    mixers = [partial(attention, get=get.under(f"model.layers.{n}.self_attn."), **options) for n in range(2)]
    return decoder(tokens, get, mixers, **SIZES, eps=1e-3)


MISTRAL = {
    **COMMON,
    **ATTENTION,
    "model_type": "mistral",
    "num_hidden_layers": 2,
    "head_dim": 8,
    "sliding_window": 5,
}


def hybrid_qwen3(tokens, get):
    options = {"heads": 4, "kv_heads": 2, "size": 8}
    delta = {**options, "v_size": 8, "eps": 3e-2, "a": "gk", "taps": 3, "bias": True, "negative": True}
    kinds = ["swa", "gdn", "gdn", "self_attn"]
    mixers = []
    for number, kind in enumerate(kinds):
        here = get.under(f"model.layers.{number}.{kind}.")
        if kind == "gdn":
            mixers.append(partial(equations.separate_gated_delta_net, get=here, **delta))
        else:
            window = 7 if kind == "swa" else None
            mixers.append(partial(attention, get=here, **options, theta=500.0, eps=1e-3, window=window))
    return decoder(tokens, get, mixers, **SIZES, eps=1e-3)


HYBRID_QWEN3 = {
    **COMMON,
    **ATTENTION,
    "model_type": "hybrid_qwen3",
    "num_hidden_layers": 4,
    "head_dim": 8,
    "hybrid_override_pattern": "SWA-GDN-GDN-*",
    "layer_types": ["SWA", "GDN", "GDN", "*"],
    "swa_config": {"window_size": 7},
    "gdn_config": {
        "hidden_size": 24,
        "head_dim": 8,
        "num_q_heads": 4,
        "num_k_heads": 2,
        "num_v_heads": 2,
        "use_gate": True,
        "use_short_conv": True,
        "allow_neg_eigval": True,
        "conv_size": 3,
        "conv_bias": True,
        "norm_eps": 3e-2,
        "kv_proj_rank": None,
        "kv_learnable_residual": False,
    },
}

KDA = ("beta_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj")


def apriel2(tokens, get):
    heads = {"heads": 4, "kv_heads": 2, "size": 8, "theta": 500.0}
    kinds = [
        ("mixer.", partial(attention, **heads, qkv_bias=True)),
        ("mixer.mixers.gdn.", partial(equations.joined_gated_delta_net, **GDN)),
        ("mixer.mixers.kda.", partial(kimi_delta_attention, heads=3, size=6, eps=2e-2, gate=equations.silu, names=KDA)),
        ("mixer.mixers.sliding_window.", partial(attention, **heads, window=5, o_bias=True)),
        ("mixer.", partial(attention, **heads, qkv_bias=True)),
    ]
    mixers = [partial(kind, get=get.under(f"model.decoder.blocks.{n}.{at}")) for n, (at, kind) in enumerate(kinds)]
    logits = decoder(tokens, get, mixers, **SIZES, eps=1e-3, layers="decoder.blocks")
    get("model.decoder.blocks.2.mixer.mixers.gdn.A_log", 4)  # what is set aside may be anything
    get("model.decoder.blocks.3.mixer.mixers.mamba.in_proj.weight", 5, 24)
    get("model.vision_encoder.embeddings.normalization.weight", 7)
    return logits


GDN = {"key_heads": 2, "heads": 4, "size": 6, "v_size": 10, "eps": 1e-2, "taps": 3}


def apriel2_block(mixer):
    return {
        "mixer": mixer,
        "mlp": {
            "type": "mlp",
            "intermediate_size": 40,
            "activation": "silu",
            "gated": True,
            "add_linear_biases": False,
        },
        "normalization": {"type": "rms_norm", "epsilon": 1e-3},
    }


def apriel2_table():
    full = {
        "type": "attention",
        "heads": 4,
        "head_groups": 2,
        "head_size": 8,
        "rotary": {"type": "mistral_1d", "theta": 500.0},
        "query_layer": {"bias": {"enabled": True}},
        "key_layer": {"bias": {"enabled": True}},
        "value_layer": {"bias": {"enabled": True}},
        "dense_layer": {"bias": {"enabled": False}},
    }
    window = {name: value for name, value in full.items() if not name.endswith("_layer")}
    window |= {"window_size": 5, "dense_layer": {"bias": {"enabled": True}}}
    gdn = {
        "type": "gdn",
        "key_heads": 2,
        "value_heads": 4,
        "key_head_dim": 6,
        "value_head_dim": 10,
        "convolution_layer": {"kernel_size": 3},
        "norm_eps": 1e-2,
    }
    kda = {"type": "kda", "heads": 3, "head_dim": 6, "convolution_layer": {}, "normalization": {"epsilon": 2e-2}}
    mixers = {"gdn": gdn, "attention": full, "sliding_window": window, "kda": kda, "mamba": {"type": "mamba"}}

    def choice(**main):
        return apriel2_block({"type": "stochastic", "mixers": mixers, "sampling_strategy": "uniform", **main})

    return {
        "model_type": "apriel2",
        "auto_map": {"AutoConfig": "configuration_made_up.Config"},
        "vocab_size": 61,
        "hidden_size": 24,
        "tie_word_embeddings": False,
        "embeddings": {"max_position_embeddings": 64},
        "head": {"normalization": {"type": "rms_norm", "epsilon": 1e-3}},
        "vision_encoder": {"decoder": {}},
        "decoder": {
            "type": "pattern",
            "num_blocks": 5,
            "pattern": ["full", "first", "kda", "window"],
            "blocks": {
                "full": apriel2_block(full),
                "first": choice(),
                "kda": choice(main_mixer_name="kda"),
                "window": choice(main_mixer_name="sliding_window"),
            },
        },
    }


def idiap(tokens, get):
    delta = {"heads": 3, "kv_heads": 3, "size": 8, "v_size": 12, "eps": 1e-3}
    mixers = [
        partial(equations.separate_gated_delta_net, get=get.under("model.layers.0.attn."), **delta),
        partial(attention, get=get.under("model.layers.1.attn."), heads=4, kv_heads=4, size=6, theta=1e4, window=7),
    ]
    return decoder(tokens, get, mixers, **SIZES, **FLA, eps=1e-3, tied=True)


FLA = {"embedding": "embeddings", "norms": ("attn_norm", "mlp_norm")}
IDIAP = {
    **COMMON,
    "model_type": "hybrid_gated_deltanet",
    "num_hidden_layers": 2,
    "num_heads": 3,
    "head_dim": 8,
    "expand_v": 1.5,
    "norm_eps": 1e-3,
    "tie_word_embeddings": True,
    "attn": {"layers": [1], "num_heads": 4, "qkv_bias": False, "window_size": 7},
}

MODELS = {
    "qwen2": (qwen2, QWEN2),
    "mistral": (mistral, MISTRAL),
    "hybrid_qwen3": (hybrid_qwen3, HYBRID_QWEN3),
    "apriel2": (apriel2, apriel2_table()),
    "hybrid_gated_deltanet": (idiap, IDIAP),
}
CODE = "configuration_made_up.py"
TOKENS = np.random.default_rng(1).integers(0, 61, (2, 20))


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A function: the folder of a checkpoint that is made up, and what it says to TOKENS."""
    done = {}

    def make(name):
        if name not in done:
            function, table = MODELS[name]
            get = Tensors()
            logits = np.stack([function(row, get) for row in TOKENS])
            folder = tmp_path_factory.mktemp(name) / name
            write(folder, table, get.there)
            (folder / CODE).write_text("raise AssertionError('it is never executed')\n")
            done[name] = folder, logits
        return done[name]

    return make


def write(folder, table, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table, indent=2) + "\n")
    kinds = {name: ("F32", numbers.shape) for name, numbers in tensors.items()}
    write_file(folder / "model.safetensors", kinds, lambda name: [tensors[name].tobytes()])


def logits_of(model, tokens):
    return jax.jit(lambda model, tokens: model(tokens))(model, tokens)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_the_same_files_again(name, made_up, tmp_path):
    folder, logits = made_up(name)
    model = load_pretrained(folder)
    assert relative_error(logits_of(model, TOKENS), logits) <= 2e-6
    save_pretrained(model, tmp_path / "again", like=folder)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_a_donor_without_a_past_is_written_as_its_class_would(name, made_up, tmp_path):
    folder, _ = made_up(name)
    model = load_pretrained(folder)
    save_pretrained(model, tmp_path / "new")
    assert open_checkpoint(tmp_path / "new").table["model_type"] == name
    assert set(tensors_of_folder(tmp_path / "new")) == set(tensors_of_folder(folder))
    again = load_pretrained(tmp_path / "new")
    for old, new in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("name", ["hybrid_qwen3", "apriel2"])
def test_a_hybrid_that_no_class_has_anew_is_refused(name, made_up, tmp_path):
    folder, _ = made_up(name)
    with pytest.raises(ValueError, match="no published class has such a model: "):
        save_pretrained(load_pretrained(folder), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_what_is_set_aside_is_said_and_kept(made_up, tmp_path, capsys):
    folder, _ = made_up("apriel2")
    assert set(open_checkpoint(folder).aside) == {
        "model.decoder.blocks.2.mixer.mixers.gdn.A_log",
        "model.decoder.blocks.3.mixer.mixers.mamba.in_proj.weight",
        "model.vision_encoder.embeddings.normalization.weight",
    }
    assert main(["import", str(folder), "--output", str(tmp_path / "run")]) == 0
    assert "3 tensors that the text model does not use, such as model.decoder.blocks.2" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "again")]) == 0
    for file in ("model.safetensors", CODE):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_a_run_begins_with_weights_whose_tokenizer_is_named(made_up, tmp_path):
    folder, _ = made_up("mistral")
    sizes = {"steps": 1, "batch_size": 1, "sequence_length": 8}
    table = {"initial": str(folder), "output": str(tmp_path / "run"), **sizes}
    with pytest.raises(ValueError, match=r"has no tokenizer\.json: name the tokenizer of these weights"):
        load_config(TrainConfig, table)
    config = load_config(TrainConfig, table | {"data": {"tokenizer": "bytes"}})
    assert (config.data.tokenizer, config.model.hidden_size) == ("bytes", 24)


def test_repeated_heads_are_written_only_while_they_are_equal(made_up, tmp_path):
    folder, _ = made_up("hybrid_qwen3")
    model = load_pretrained(folder)
    kernel = model.blocks[1].mixer.k_conv.kernel
    kernel[...] = kernel[...].at[0, 0, 0].add(0.5)
    with pytest.raises(
        ValueError, match=r"gdn\.k_conv1d\.weight stands for .*k_conv/kernel, whose repeated heads are no"
    ):
        save_pretrained(model, tmp_path / "again", like=folder)
    assert not list(tmp_path.iterdir())


def block_with(path, value):
    """The keys of apriel2 in which one of the block "full" has another value."""
    table = json.loads(json.dumps(apriel2_table()))
    *parents, last = path.split(".")
    inner = table["decoder"]["blocks"]["full"]
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return table


REFUSED = [
    ({**QWEN2, "attention_bias": False}, "attention_bias is False"),
    ({**QWEN2, "use_mrope": True}, "use_mrope is True"),
    ({**MISTRAL, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .* the layers are sliding"),
    ({**HYBRID_QWEN3, "hybrid_override_pattern": "*-GKA-GDN-*"}, r"only \*, SWA, GDN are known"),
    ({**HYBRID_QWEN3, "hybrid_override_pattern": "*-GDN-GDN*-*"}, "hybrid_override_pattern is"),
    ({**HYBRID_QWEN3, "hybrid_override_pattern": "*-GDN-*"}, "of 3 layers, but num_hidden_layers is 4"),
    ({**HYBRID_QWEN3, "gdn_config": {"kv_proj_rank": 8}}, "gdn_config: kv_proj_rank is 8"),
    ({**HYBRID_QWEN3, "gdn_config": {"num_v_heads": 4}}, "gdn_config: num_v_heads is 4"),
    ({**HYBRID_QWEN3, "gdn_config": {"gate_fn": "x"}}, "gdn_config: gate_fn is 'x', a key that is not known"),
    ({**HYBRID_QWEN3, "num_key_value_heads": 3}, "num_key_value_heads is 3, wanted a divisor"),
    ({**HYBRID_QWEN3, "swa_config": None}, "swa_config lacks the key window_size"),
    ({**IDIAP, "attn": {**IDIAP["attn"], "attn_type": "lte"}}, "attn_type is 'lte'"),
    (block_with("mixer.rotary.type", "yarn"), "mixer: rotary: type is 'yarn'"),
    (block_with("mixer.key_layer.bias.enabled", False), "key_layer: bias: enabled is False"),
    (block_with("mixer.causal", False), "mixer: causal is False"),
    (block_with("mixer.query_norm", {}), "mixer: query_norm is {}, a key that is not known"),
    (block_with("mixer", {"type": "mamba"}), "mixer: type is 'mamba'"),
    (
        block_with("mixer", {"type": "stochastic", "mixers": {"a": {}}, "main_mixer_name": "b"}),
        "main_mixer_name is 'b'",
    ),
    (block_with("mlp.gated", False), "mlp: gated is False"),
    (block_with("mlp.intermediate_size", 39), r"should have one width, not \[39, 40\]"),
    (block_with("normalization.epsilon", 1e-5), "epsilon is 1e-05, but that of head.normalization is 0.001"),
    ({**apriel2_table(), "decoder": {"type": "random"}}, "decoder lacks the key num_blocks"),
    ({"model_type": "nemotron_flash"}, "model_type is 'nemotron_flash', which cannot be read: memory_tokens"),
    ({"model_type": "mom"}, "a router gives each token to some of several states"),
]


@pytest.mark.parametrize(("table", "said"), REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(table, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"config\.json: .*{said}|^config\.json: {said}"):
        open_checkpoint(tmp_path)


def test_keys_that_are_missing_have_the_defaults_of_their_class():
    """Values that a checkpoint with visible ones does not show."""

    def options(table, layer):
        model = architecture_of(table).config(Keys(table))
        return options_of(model, model.layers[layer].mixer)

    primed = {"model_type": "hybrid_qwen3", "num_hidden_layers": 2, "hybrid_override_pattern": "*-GDN-"}
    found = options(primed, 1)
    assert (found["num_heads"], found["conv_size"], found["output_norm_eps"]) == (32, 4, 1e-5)
    assert options(primed, 0)["num_kv_heads"] == 32
    block = apriel2_block({"type": "gdn", "convolution_layer": {"kernel_size": 4}})
    table = apriel2_table() | {"decoder": {"num_blocks": 1, "block": block}}
    found = options(table, 0)
    assert (found["num_heads"], found["num_v_heads"], found["head_dim"], found["expand_v"]) == (8, 32, 64, 1.0)
    assert found["output_norm_eps"] == 1e-5
    block["mixer"] = {"type": "kda"}
    found = options(table, 0)
    assert (found["num_heads"], found["head_dim"], found["conv_size"]) == (32, 64, 4)
    assert (found["output_norm_eps"], found["output_gate_activation"]) == (1e-5, "silu")
    assert options({"model_type": "mistral", "num_hidden_layers": 1}, 0)["window"] == 4096
    assert options({"model_type": "mistral", "num_hidden_layers": 1, "sliding_window": None}, 0)["window"] is None
    assert options({"model_type": "mistral", "num_hidden_layers": 1}, 0)["num_kv_heads"] == 8


@pytest.mark.parametrize("name", ["qwen3", "fla_gated_deltanet_old", "fla_kda"])
def test_the_equations_are_those_of_the_classes(name):
    expected = np.load(CHECKPOINTS / name / "expected.npz")
    files = tensors_of_folder(CHECKPOINTS / name)
    there = {key: read_flat(t, 0, int(np.prod(t.shape))).reshape(t.shape) for key, t in files.items()}
    get = Tensors(there)
    if name == "qwen3":
        options = {"heads": 4, "kv_heads": 2, "size": 16, "theta": 1e6, "eps": 1e-6}
        mixers = [partial(attention, get=get.under(f"model.layers.{n}.self_attn."), **options) for n in range(4)]
        shape = {"vocabulary": 61, "width": 24, "inner": 40, "tied": True}
    elif name == "fla_kda":
        names = ("b_proj", "f_proj.0", "f_proj.1", "g_proj.0", "g_proj.1")
        options = {"heads": 2, "size": 8, "eps": 1e-6, "gate": equations.sigmoid, "names": names}
        options |= {"convs": "{}_conv1d", "norm": "o_norm", "bias": "g_proj.1.bias"}
        mixers = [partial(kimi_delta_attention, get=get.under(f"model.layers.{n}.attn."), **options) for n in range(3)]
        shape = {"vocabulary": 61, "width": 32, "inner": 40, **FLA}
    else:
        for key in [key for key in there if "gate_proj" in key]:  # both halves in one tensor
            get.there[key], get.there[key.replace("gate", "up")] = np.split(there[key], 2)
        options = {"heads": 2, "kv_heads": 2, "size": 8, "v_size": 16, "eps": 1e-6}
        mixers = [
            partial(equations.separate_gated_delta_net, get=get.under(f"model.layers.{n}.attn."), **options)
            for n in range(2)
        ]
        shape = {"vocabulary": 61, "width": 16, "inner": 256, **FLA}
    got = np.stack([decoder(row, get, mixers, **shape, eps=1e-6) for row in expected["tokens"]])
    assert relative_error(got, expected["logits"]) <= 5e-6
