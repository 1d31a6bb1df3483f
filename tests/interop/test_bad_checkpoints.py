"""Damaged and foreign checkpoints: one sentence that names what is wrong, and nothing is written, run or unpickled."""

import json
import pickle
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from delta_jax.cli import main
from delta_jax.interop import load_pretrained, save_pretrained, write
from delta_jax.interop.checkpoint import architecture_of, expected_layout, open_checkpoint
from delta_jax.interop.keys import Keys
from delta_jax.interop.safetensors import INDEX, raw_bytes, tensors_of_folder, write_file
from delta_jax.models import ExpertsConfig, MixerSpec, ModelConfig
from delta_jax.training import import_run
from tests.interop.conftest import CHECKPOINTS

FILE = "model.safetensors"
NORM = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def refusal(source, *arguments, call=load_pretrained, **options):
    """The sentence with which something is refused."""
    with pytest.raises(ValueError) as caught:
        call(source, *arguments, **options)
    said = str(caught.value)
    assert said and said.isprintable() and len(said) < 500, said
    return said


# Damages of a file by its bytes: the header's length, the header, the data.


def with_length(length):
    def damage(raw):
        return length.to_bytes(8, "little") + raw[8:]

    return damage


def with_header(change):
    """The header as text, or its table, changed."""

    def damage(raw):
        length = int.from_bytes(raw[:8], "little")
        header = change(json.loads(raw[8 : 8 + length]))
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return damage


def entry(name=NORM, **changes):
    return with_header(lambda header: header | {name: header[name] | changes})


def moved(by, **changes):
    """The offsets of the last tensor, moved."""

    def change(header):
        begin, end = header[NORM]["data_offsets"]
        return header | {NORM: header[NORM] | {"data_offsets": [begin + by, end + by]} | changes}

    return with_header(change)


def without_header_entry(name):
    return with_header(lambda header: {key: value for key, value in header.items() if key != name})


FILES = {
    "empty": (lambda raw: b"", "no whole safetensors file"),
    "seven bytes": (lambda raw: raw[:7], "no whole safetensors file"),
    "cut in the header": (lambda raw: raw[:100], "no whole safetensors file"),
    "cut in the data": (lambda raw: raw[:-100], "cut off or damaged"),
    "longer than it says": (lambda raw: raw + b"more", "4 bytes more than its tensors take"),
    "length zero": (with_length(0), "the header is no JSON"),
    "length short": (with_length(40), "the header is no JSON"),
    "length long": (with_length(2**20), "its header would take 1048576 of"),
    "length of 64 bits": (with_length(2**64 - 1), "its header would take"),
    "not JSON": (with_header(lambda header: b"{model"), "the header is no JSON"),
    "not UTF-8": (with_header(lambda header: b'{"\xff": 1}'), "the header is no JSON"),
    "deep": (with_header(lambda header: b"[" * 100_000), "the header is no JSON"),
    "a list": (with_header(lambda header: []), "the header is no JSON object"),
    "a name twice": (
        with_header(lambda h: json.dumps(h)[:-1].encode() + b',"lm_head.weight": {}}'),
        "lm_head.weight twice",
    ),
    "a name of two lines": (with_header(lambda h: h | {"a\nb": h[NORM]}), "is no name of a tensor"),
    "an entry of another kind": (with_header(lambda h: h | {NORM: 3}), "lacks dtype, shape or data_offsets"),
    "an entry without a shape": (with_header(lambda h: h | {NORM: {"dtype": "F32"}}), "lacks dtype, shape or"),
    "overlapping": (moved(-4), "norm.weight shares bytes with another tensor"),
    "a gap": (without_header_entry(QUERY), "does not follow the tensor before it"),
    "beyond the end": (moved(4), "norm.weight lies at"),
    "offsets reversed": (entry(data_offsets=[8, 0]), "norm.weight lies at [8, 0]"),
    "offsets negative": (entry(data_offsets=[-96, 0]), "norm.weight lies at [-96, 0]"),
    "offsets of 70 bits": (entry(data_offsets=[0, 2**70]), "norm.weight lies at"),
    "offsets no numbers": (entry(data_offsets=["0", "96"]), "norm.weight lies at"),
    "offsets no pair": (entry(data_offsets=96), "norm.weight lies at 96"),
    "a negative size": (entry(shape=[-24]), "norm.weight has the shape [-24]"),
    "no rows": (entry(shape=[0, 24], data_offsets=[0, 0]), "norm.weight has the shape [0, 24]"),
    "a size of NaN": (entry(shape=[float("nan")]), "norm.weight has the shape [nan]"),
    "a huge size": (entry(shape=[2**70]), "norm.weight has the shape"),
    "a huge product": (entry(shape=[2**40, 2**40]), "norm.weight has 96 bytes, but"),
    "a boolean size": (entry(shape=[True, 24]), "norm.weight has the shape [True, 24]"),
    "a float size": (entry(shape=[24.0]), "norm.weight has the shape [24.0]"),
    "a shape of another kind": (entry(shape="24"), "norm.weight has the shape '24'"),
    "another number of bytes": (entry(shape=[23]), "norm.weight has 96 bytes, but F32[23] takes 92"),
    "a wider dtype": (entry(dtype="I64"), "norm.weight has 96 bytes, but I64[24] takes 192"),
    "integers": (entry(dtype="I32"), "norm.weight is of the dtype I32; known are F64, F32, F16, BF16"),
    "eight bits": (entry(dtype="F8_E4M3", shape=[96]), "norm.weight has the shape [96], but by config.json it is [24]"),
    "a dtype of another kind": (entry(dtype=32), "norm.weight has the dtype 32"),
    "transposed": (entry("model.layers.1.mlp.up_proj.weight", shape=[24, 40]), "has the shape [24, 40], but by config"),
    "one tensor as a vector": (entry(QUERY, shape=[576]), "has the shape [576], but by config.json it is [24, 24]"),
    "a scalar": (entry(shape=[], dtype="F32", data_offsets=[0, 4]), "shares bytes"),
    "another name": (
        with_header(lambda h: {k.replace("model.norm", "norm"): v for k, v in h.items()}),
        "norm.weight is missing",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused(name, checkpoint):
    damage, words = FILES[name]
    folder = checkpoint("llama")
    (folder / FILE).write_bytes(damage((folder / FILE).read_bytes()))
    said = refusal(folder)
    assert words in said and str(folder) in said


def rewritten(folder, *, drop=(), dtypes=None, more=None):
    """The file of a checkpoint with tensors left out, of other dtypes, or added as copies of others."""
    found = {name: tensor for name, tensor in tensors_of_folder(folder).items() if name not in drop}
    found |= {name: found[other] for name, other in (more or {}).items()}
    data = {name: np.frombuffer(b"".join(raw_bytes(tensor)), "<f4") for name, tensor in found.items()}
    names = {"F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16, "F64": "<f8"}
    kinds = {name: (dtypes or {}).get(name, "F32") for name in found}
    (folder / FILE).unlink()
    wanted = {name: (kinds[name], tensor.shape) for name, tensor in found.items()}
    write_file(folder / FILE, wanted, lambda name: [data[name].astype(names[kinds[name]]).tobytes()])
    return folder


def test_a_tensor_missing_and_tensors_left_over(checkpoint):
    folder = rewritten(checkpoint("llama"), drop=[QUERY])
    assert f"the tensor {QUERY} is missing" in refusal(folder)
    shutil.rmtree(folder)
    folder = rewritten(checkpoint("llama"), more={"model.layers.3.extra": QUERY, "model.b": QUERY})
    assert "the tensor model.layers.3.extra, and 1 more belongs to nothing" in refusal(folder)
    shutil.rmtree(folder)
    folder = rewritten(checkpoint("llama"), more={"model.layers.1.self_attn.q_proj.bias": NORM})
    assert "q_proj.bias belongs to nothing" in refusal(folder)


@pytest.fixture(scope="module")
def llama():
    return load_pretrained(CHECKPOINTS / "llama")


def test_tensors_may_differ_in_dtype(checkpoint, llama):
    mixed = load_pretrained(
        rewritten(checkpoint("llama"), dtypes={NORM: "BF16", QUERY: "F16", "lm_head.weight": "F64"})
    )
    np.testing.assert_array_equal(mixed.lm_head.kernel[...], llama.lm_head.kernel[...])
    scale = llama.final_norm.scale[...].astype(jnp.bfloat16)
    np.testing.assert_array_equal(mixed.final_norm.scale[...], scale.astype(jnp.float32))
    kernel = llama.blocks[0].mixer.q_proj.kernel[...]
    rounded = kernel.at[1].set(kernel[1].astype(jnp.float16).astype(jnp.float32))
    np.testing.assert_array_equal(mixed.blocks[0].mixer.q_proj.kernel[...], rounded)


def test_a_tied_head_may_be_there_but_not_another_one(checkpoint):
    folder = rewritten(checkpoint("llama", tie_word_embeddings=True))
    assert "lm_head.weight is not model.embed_tokens.weight, to which config.json ties it" in refusal(folder)
    rewritten(folder, more={"lm_head.weight": "model.embed_tokens.weight"})
    assert load_pretrained(folder).config.tie_embeddings


# Damages of a folder of several files.


def index(**files):
    def damage(folder):
        table = json.loads((folder / INDEX).read_text())
        table["weight_map"] |= files
        (folder / INDEX).write_text(json.dumps(table))

    return damage


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def loop(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").symlink_to(folder / "other.json")
    (folder / "other.json").symlink_to(folder / "config.json")


def looped_shard(folder):
    (folder / "model-00002-of-00004.safetensors").unlink()
    (folder / "model-00002-of-00004.safetensors").symlink_to(folder / "model-00002-of-00004.safetensors")


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def only_a_pickle(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "executed")))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def as_a_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def outside(name):
    def damage(folder):
        shutil.copyfile(folder / "model-00001-of-00004.safetensors", folder.parent / "x.safetensors")
        index(**{NORM: name.format(folder.parent)})(folder)

    return damage


FOLDERS = {
    "a file missing": (lambda f: (f / "model-00002-of-00004.safetensors").unlink(), "names model-00002-of-00004"),
    "a file that is a folder": (as_a_folder("model-00002-of-00004.safetensors"), "names model-00002-of-00004"),
    "a file that is a loop": (looped_shard, "names model-00002-of-00004"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "holds 4 safetensors files but no model.safetensors.index"),
    "index is a list": (text(INDEX, b"[]"), "weight_map must map names of tensors to files"),
    "index without a map": (text(INDEX, b"{}"), "weight_map must map names of tensors to files"),
    "index of numbers": (text(INDEX, b'{"weight_map": {"a": 1}}'), "weight_map must map names of tensors to files"),
    "index no JSON": (text(INDEX, b"{"), "is no JSON"),
    "a file above": (outside("../x.safetensors"), "'../x.safetensors', which is not a safetensors file in the same"),
    "a file by its whole path": (outside("{}/x.safetensors"), "which is not a safetensors file in the same folder"),
    "a file of another kind": (index(**{NORM: "config.json"}), "'config.json', which is not a safetensors file"),
    "another file than it says": (index(**{NORM: "model-00001-of-00004.safetensors"}), "looks for it in model-00001"),
    "a tensor that no file holds": (index(**{"model.b": "model-00001-of-00004.safetensors"}), "which does not hold it"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "config.json a folder": (as_a_folder("config.json"), "holds no config.json"),
    "config.json a list": (text("config.json", b"[1]"), "config.json is no table"),
    "config.json not UTF-8": (text("config.json", b'{"model_type": "\xff"}'), "config.json is no JSON"),
    "config.json too deep": (text("config.json", b"[" * 100_000), "config.json is no JSON"),
    "an empty folder": (emptied, "holds no config.json"),
    "a loop": (loop, "holds no config.json"),
    "a pickle": (only_a_pickle, "pytorch_model.bin is a pickle, which is never read"),
    "a description without the rest": (text("tensors.json", b"[]"), "aside.safetensors cannot be read"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_damaged_folder_is_refused(name, checkpoint):
    damage, words = FOLDERS[name]
    folder = checkpoint("qwen3")
    damage(folder)
    assert words in refusal(folder)
    assert not (folder / "executed").exists()


def test_what_is_no_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("words")
    assert "there is no folder or file" in refusal(tmp_path / "nowhere")
    assert "holds no config.json" in refusal(tmp_path / "file")
    assert "there is no folder or file" in refusal(tmp_path / "file" / "inside")
    assert "cannot be read (File name too long)" in refusal(tmp_path / ("a" * 300))

    def denied(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read (Permission denied)" in refusal(CHECKPOINTS / "llama")


@pytest.mark.parametrize(
    "rows",
    [
        "3",
        "[3]",
        '[["../../x.safetensors", "a", "F32", [2]]]',
        '[["x.safetensors", "a", "F32", [-2]]]',
        '[["x", 1, 2, 3]]',
    ],
)
def test_a_run_that_does_not_say_where_it_came_from_is_refused(rows, checkpoint):
    folder = checkpoint("llama")
    write_file(folder / "aside.safetensors", {}, lambda name: [])
    (folder / "tensors.json").write_text(rows)
    assert "tensors.json does not describe tensors" in refusal(folder)


# Keys. Each row: the checkpoint, what changes in its config.json, words of the sentence.

KEYS = [
    ("llama", {"model_type": None}, "model_type is None; known are"),
    ("llama", {"model_type": "lama"}, "model_type is 'lama' (did you mean llama?); known are"),
    ("llama", {"model_type": ["llama"]}, "model_type is ['llama']"),
    ("llama", {"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    ("llama", {"hidden_size": -24}, "hidden_size must be a positive integer, got -24"),
    ("llama", {"hidden_size": "24"}, "hidden_size: wanted an integer, got '24'"),
    ("llama", {"hidden_size": 2**70}, "hidden_size: wanted a number of at most 64 bits"),
    ("llama", {"hidden_size": 2**40}, "hidden_size must be below 2^31"),
    ("llama", {"hidden_size": 2**20}, "the tensor model.embed_tokens.weight has the shape [61, 24]"),
    ("llama", {"hidden_size": True}, "hidden_size: wanted an integer, got True"),
    ("llama", {"hidden_size": 24.0}, "hidden_size: wanted an integer, got 24.0"),
    (
        "llama",
        {"intermediate_size": 0},
        "intermediate_size is 0, but no published class leaves the feed-forward layer out",
    ),
    ("llama", {"vocab_size": 60}, "embed_tokens.weight has the shape [61, 24], but by config.json it is [60, 24]"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0, wanted a positive integer"),
    ("llama", {"num_attention_heads": 5}, "num_kv_heads must divide num_heads, got 2 and 5"),
    ("llama", {"num_hidden_layers": 4}, "the tensor model.layers.3.input_layernorm.weight is missing"),
    ("llama", {"num_hidden_layers": 2}, "belongs to nothing that config.json describes"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, wanted an integer from 1 to 10,000"),
    ("llama", {"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776, wanted an integer from 1"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps: wanted a finite number"),
    ("llama", {"rms_norm_eps": -1e-6}, "norm_eps must be a positive number"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', which this library does not have, only 'silu'"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True, which this library does not have"),
    ("llama", {"attention_bias": True}, "q_proj.bias is missing"),
    ("llama", {"attention_bias": 1}, "attention_bias: wanted true or false, got 1"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: wanted true or false"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic"}},
        "rope_type is 'dynamic', which this library does not have",
    ),
    ("llama", {"rope_parameters": [1]}, "rope_parameters is [1], wanted a table"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5",
    ),
    (
        "llama",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is 0.5, but the classes of this architecture turn all",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
        "mscale is 0.7, a key that is not",
    ),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
    ("llama", {"sliding_window": 5}, "sliding_window is 5, a key that is not known here"),
    ("llama", {"a\nb": 5}, "is 5, a key that is not known here"),
    ("llama", {"new_key": list(range(1000))}, "name it in ignore_keys if it does not"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types is ['full_attention'], of 1 layers"),
    ("qwen3", {"layer_types": "full_attention"}, "layer_types: wanted an array"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "but the layers are full_attention or sliding_attention"),
    (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": True, "sliding_window": 0},
        "window must be",
    ),
    (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 4},
        "but by use_sliding_window and sliding_window there is no window",
    ),
    ("qwen3_5_text", {"linear_num_value_heads": 3}, "num_v_heads must be a"),
    ("qwen3_5_text", {"linear_key_head_dim": 0}, "linear_key_head_dim is 0"),
    ("qwen3_5_text", {"linear_conv_kernel_dim": 5}, "conv1d.weight has the shape"),
    ("qwen3_5_text", {"full_attention_interval": 0, "layer_types": None}, "full_attention_interval is 0"),
    ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate is False"),
    ("qwen3_5_text", {"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'"),
    ("qwen3_5_vlm", {"text_config": "qwen3_5_text"}, "text_config is 'qwen3_5_text', wanted a table"),
    (
        "qwen3_5_moe_text",
        {"num_experts": 2**30},
        "gate.weight has the shape [5, 24], but by config.json it is [1073741824, 24]",
    ),
    ("qwen3_5_moe_text", {"num_experts_per_tok": 6}, "num_experts_per_token"),
    ("qwen3_5_moe_vlm", {"text_config": {}}, "has the shape"),
    ("qwen3_next", {"norm_topk_prob": 1}, "norm_topk_prob: wanted true or false, got 1"),
    ("qwen3_next", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("lara_mini", {"attention_bias": True}, "attention_bias is True"),
    ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope is False"),
    ("kimi_linear", {"num_expert_group": 2}, "num_expert"),
    ("kimi_linear", {"moe_router_activation_func": "softmax"}, "moe_router_activation_func is 'softmax'"),
    (
        "kimi_linear",
        {"linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3]}},
        "kda_layers is [1, 2, 3]",
    ),
    ("kimi_linear", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is"),
    ("kimi_linear", {"tie_word_embeddings": True}, "tie_word_embeddings is True, which this library does not have"),
    ("bailing_hybrid", {"tie_word_embeddings": True}, "tie_word_embeddings is True, which this library does not have"),
    ("bailing_hybrid", {"use_qkv_bias": True}, "use_qkv_bias is True"),
    ("bailing_hybrid", {"n_group": None, "num_expert_group": 4}, "num_expert_groups"),
    ("bailing_hybrid", {"kda_lower_bound": 5.0}, "gate_lower_bound must be"),
    ("olmo_hybrid", {"linear_num_key_heads": 0}, "linear_num_key_heads is 0"),
    ("olmo_hybrid", {"norm_placement": "pre"}, "norm_placement is 'pre', a key that is not known here"),
    ("fla_delta_net", {"share_conv_kernel": True}, "share_conv_kernel is True"),
    ("fla_delta_net", {"attnres_block_size": 4}, "attnres_block_size is 4"),
    ("fla_delta_net", {"num_heads": 3}, "expand_k is 1.0, which makes no whole number of channels a head"),
    ("fla_delta_net", {"qk_norm": "max"}, "qk_norm must be"),
    ("fla_gated_deltanet", {"attn": {"layers": [9], "num_heads": 2}}, "layers is [9], wanted numbers from 0"),
    ("fla_gated_deltanet", {"attn": 3}, "attn is 3, wanted a table, or a list of tables"),
    ("fla_kda", {"safe_gate": True, "lower_bound": None}, "safe_gate is True, but lower_bound is missing"),
]


@pytest.mark.parametrize(("name", "changes", "words"), KEYS)
def test_a_key_that_cannot_be_is_refused(name, changes, words, checkpoint):
    assert words in refusal(checkpoint(name, **changes), call=open_checkpoint)


def test_null_is_no_default_where_it_says_something(checkpoint):
    """Where code asks whether a key is true, null says no; a window that is null is none."""
    folder = checkpoint("qwen3_next")
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"norm_topk_prob": None}))
    assert "norm_topk_prob is None, wanted true or false" in refusal(folder, call=open_checkpoint)
    folder = checkpoint("qwen3", layer_types=None)
    table = json.loads((folder / "config.json").read_text())
    windows = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(table | windows))
    assert all("window" not in dict(layer.mixer.options) for layer in open_checkpoint(folder).model.layers)
    (folder / "config.json").write_text(json.dumps(table | windows | {"sliding_window": 3}))
    assert all(dict(layer.mixer.options)["window"] == 3 for layer in open_checkpoint(folder).model.layers)


def test_an_unknown_key_passes_where_the_caller_says_so(checkpoint):
    folder = checkpoint("llama", sliding_window=5, quantization_config={"bits": 4})
    assert "sliding_window" in refusal(folder, ignore_keys=["quantization_config"])
    assert open_checkpoint(folder, ["quantization_config", "sliding_window"]).model.num_layers == 3


def test_code_beside_a_checkpoint_is_never_run(checkpoint, tmp_path):
    executed = tmp_path / "executed"
    folder = checkpoint(
        "llama", auto_map={"AutoModelForCausalLM": "modeling_llama.Model", "AutoConfig": "modeling_llama.C"}
    )
    (folder / "modeling_llama.py").write_text(f"open({str(executed)!r}, 'w').close()\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(executed)))
    load_pretrained(folder)
    assert not executed.exists()


# Through the command: one line, exit code 2, and the folder is not there.


def command(capsys, *words):
    code = main([str(word) for word in words])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return code, said


def test_the_command_refuses_in_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    folder = checkpoint("llama", hidden_act="gelu")
    assert command(capsys, "import", folder, "--output", run) == (
        2,
        "delta-jax import: error: config.json: hidden_act is 'gelu', which this library does not have, only 'silu'\n",
    )
    shutil.rmtree(folder)
    folder = checkpoint("llama")
    cut = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(cut[:-1])
    code, said = command(capsys, "import", folder, "--output", run)
    assert code == 2 and "cut off or damaged" in said
    (folder / FILE).write_bytes(cut)
    code, said = command(capsys, "import", folder, "--output", folder)
    assert code == 2 and "is there already and not empty" in said
    code, said = command(capsys, "import", folder, "--output", folder / FILE / "run")
    assert code == 2 and "cannot be written" in said

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("delta_jax.training.published.keep_tokenizer", full)
    code, said = command(capsys, "import", folder, "--output", run)
    assert code == 2 and "cannot be written (No space left on device)" in said
    code, said = command(capsys, "export", folder, "--output", tmp_path / "exported")
    assert code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(checkpoint, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = checkpoint("llama")
    words = {"<unk>": 0} | {f"w{index}": index for index in range(1, 61)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    said = refusal(folder, tmp_path / "run", call=import_run)
    assert "tokenizer.json has 62 ids, but vocab_size in config.json is 61" in said
    (folder / "tokenizer.json").write_text("{")
    assert "is not a tokenizer.json" in refusal(folder, tmp_path / "run", call=import_run)
    assert not (tmp_path / "run").exists()


# Writing.


def model_of(*mixers, **options):
    pattern = tuple(MixerSpec(mixer=name, options=tuple(given.items())) for name, given in mixers)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_layers": len(mixers), "intermediate_size": 12}
    return ModelConfig(**sizes | {"pattern": pattern, "dtype": "float32"} | options)


LATENT = {"num_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
KIMI = [
    ("kimi_delta_attention", {"num_heads": 2, "use_output_gate_bias": False}),
    ("latent_attention", {**LATENT, "kv_norm_eps": 1e-6}),
]
EXPERTS = ExpertsConfig(expert_size=4, num_experts=3, num_experts_per_token=2, shared_expert_size=4)
NO_CLASS = [
    (model_of(("gated_delta_net_2", {"num_heads": 2})), "gated_delta_net_2"),
    (
        model_of(("gated_delta_net", {"num_heads": 2}), ("kimi_delta_attention", {"num_heads": 2})),
        "kimi_delta_attention",
    ),
    (model_of(*KIMI, experts=EXPERTS, tie_embeddings=True), "tie_word_embeddings is True"),
    (model_of(("delta_net", {"num_heads": 2}), zero_centered_norms=True), "zero_centered_norms"),
    (model_of(("delta_net", {"num_heads": 2, "conv_size": 3}), ("delta_net", {"num_heads": 2})), "conv_size"),
    (model_of(("attention", {"num_heads": 2, "use_output_gate": True})), "use_output_gate"),
    (model_of(("delta_net", {"num_heads": 2}), intermediate_size=0), "intermediate_size"),
]


@pytest.mark.parametrize(("model", "words"), NO_CLASS)
def test_a_model_that_no_class_has_is_refused(model, words):
    said = refusal(model, call=write.published_table)
    assert said.startswith("no published class has such a model") and words in said


def test_where_it_cannot_go_it_is_not_written(llama, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        assert "is there already and not empty" in refusal(llama, tmp_path / name, call=save_pretrained)
    assert "cannot be written (Not a directory)" in refusal(llama, tmp_path / "file" / "new", call=save_pretrained)
    assert "dtype must be one of" in refusal(llama, tmp_path / "new", dtype="int8", call=save_pretrained)
    assert "format must be" in refusal(llama, tmp_path / "new", format="gguf", call=save_pretrained)
    said = refusal(llama, tmp_path / "new", like=CHECKPOINTS / "qwen3", call=save_pretrained)
    assert said.startswith("the model is not that of")
    said = refusal(llama, tmp_path / "new", like=CHECKPOINTS / "llama", format="fla", call=save_pretrained)
    assert "is in the format of transformers" in said
    said = refusal(llama, tmp_path / "new", like=CHECKPOINTS / "llama", eos_token_id=5, call=save_pretrained)
    assert said.startswith("eos_token_id is a key of config.json")

    count = 0

    def full(*arguments):
        nonlocal count
        for piece in rows(*arguments):
            count += 1
            if count == 5:
                raise OSError(28, "No space left on device")
            yield piece

    rows = write._tensor_bytes
    monkeypatch.setattr(write, "_tensor_bytes", full)
    assert "cannot be written (No space left on device)" in refusal(llama, tmp_path / "new", call=save_pretrained)
    assert count == 5 and sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_bias_of_the_router_that_the_files_have_not_is_refused(tmp_path):
    model = load_pretrained(CHECKPOINTS / "qwen3_5_moe_text")
    bias = model.blocks[0].mlp.expert_bias
    bias[...] = bias[...].at[0, 1].set(0.25)
    for options in ({}, {"like": CHECKPOINTS / "qwen3_5_moe_text"}):
        said = refusal(model, tmp_path / "new", call=save_pretrained, **options)
        assert said == "blocks/0/mlp/expert_bias is not zero, and the published format has no such tensor"
    assert not (tmp_path / "new").exists()


@pytest.fixture
def primed(tmp_path):
    """A tiny hybrid of the kind of Amazon's, whose keys and values stand for two heads each."""
    table = {
        "model_type": "hybrid_qwen3",
        "hybrid_override_pattern": "*-GDN-",
        "num_hidden_layers": 2,
        "vocab_size": 11,
    }
    table |= {
        "hidden_size": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 20,
    }
    folder = tmp_path / "primed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table))
    architecture = architecture_of(table)
    config = architecture.config(Keys(table))
    layout, _ = expected_layout(architecture, config, table, None)
    random = np.random.default_rng(0)
    shapes = {name: ("F32", target.shapes[0]) for name, target in layout.targets.items()}
    write_file(folder / FILE, shapes, lambda name: [random.normal(size=shapes[name][1]).astype("<f4").tobytes()])
    return folder


def test_repeated_heads_must_be_equal_to_be_written(primed, tmp_path):
    model = load_pretrained(primed)
    assert tensors_of_folder(primed)["model.layers.1.gdn.k_proj.weight"].shape == (12, 12)
    save_pretrained(model, tmp_path / "again", like=primed)
    assert (tmp_path / "again" / FILE).read_bytes() == (primed / FILE).read_bytes()
    kernel = next(b for b in model.blocks if hasattr(b.mixer, "k_conv")).mixer.v_proj.kernel
    kernel[...] = kernel[...].at[0, 0, 7].add(1e-3)
    said = refusal(model, tmp_path / "third", like=primed, call=save_pretrained)
    assert said == (
        "model.layers.1.gdn.v_proj.weight stands for blocks/1/mixer/v_proj/kernel, whose repeated heads are no longer equal"
    )
    assert not (tmp_path / "third").exists()
    table = json.loads((primed / "config.json").read_text())
    for heads in (0, 3):
        (primed / "config.json").write_text(json.dumps(table | {"num_key_value_heads": heads}))
        assert f"num_key_value_heads is {heads}, wanted a divisor" in refusal(primed)
