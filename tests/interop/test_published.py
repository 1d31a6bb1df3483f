"""Published checkpoints: their logits, their continuations, and the same files written again.

Made by transformers and by flash-linear-attention's kernels; see make_checkpoints.py for those made here.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from delta_jax.inference import generate
from delta_jax.interop import load_pretrained, save_pretrained
from delta_jax.interop.checkpoint import open_checkpoint
from delta_jax.interop.safetensors import read_flat, write_file
from delta_jax.testing import relative_error
from delta_jax.training import export_run, import_run
from tests.interop.conftest import CHECKPOINTS

NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())
# The logits of the file, in float32, are themselves so far from those in float64.
LIMITS = {"kimi_linear": 3e-6, "lara_mini": 6e-5, "bailing_hybrid": 1.2e-5, "qwen3_next_dense": 8e-6}
# Keys that say the same otherwise: which layers are dense, sections of an embedding that text does not use, windows that
# no layer has, a width that follows from others, heads of latent attention by another name.
FREE = (
    "rope_parameters",
    "decoder_sparse_step",
    "mlp_only_layers",
    "max_window_layers",
    "sliding_window",
    "intermediate_size",
    "num_v_heads",
    "head_dim",
    "dtype",
)
FRESH = {"qwen3_5_moe_text": "qwen3_next", "qwen3_5_vlm": "qwen3_5_text", "qwen3_5_moe_vlm": "qwen3_next"}


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_continuations(name):
    expected = np.load(CHECKPOINTS / name / "expected.npz")
    model = load_pretrained(CHECKPOINTS / name)
    got = jax.jit(lambda model, tokens: model(tokens))(model, expected["tokens"])
    want = expected["logits_float64"] if "logits_float64" in expected else expected["logits"]
    assert relative_error(got, want) <= LIMITS.get(name, 5e-6)
    prompts = [row.tolist() for row in expected["prompt"]]
    assert generate(model, prompts, max_new_tokens=expected["greedy"].shape[1]) == expected["greedy"].tolist()


@pytest.mark.parametrize("name", ["fla_deltaproduct", "fla_kda", "kimi_linear", "qwen3_5_text"])
def test_logits_by_the_plain_recurrence(name):
    expected = np.load(CHECKPOINTS / name / "expected.npz")
    model = load_pretrained(CHECKPOINTS / name)
    for block in model.blocks:
        if hasattr(block.mixer, "settings"):
            block.mixer.settings = dataclasses.replace(block.mixer.settings, implementation="recurrent")
    got = jax.jit(lambda model, tokens: model(tokens))(model, expected["tokens"])
    want = expected["logits_float64"] if "logits_float64" in expected else expected["logits"]
    assert relative_error(got, want) <= LIMITS.get(name, 5e-6)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "expected.npz"}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_files_are_written_again(name, tmp_path):
    import_run(CHECKPOINTS / name, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "again")
    assert files(tmp_path / "again") == files(CHECKPOINTS / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_a_past_is_written_as_its_class_would(name, tmp_path):
    model = load_pretrained(CHECKPOINTS / name)
    save_pretrained(model, tmp_path / "new", eos_token_id=5)
    table = json.loads((tmp_path / "new" / "config.json").read_text())
    source = json.loads((CHECKPOINTS / name / "config.json").read_text())
    assert table["model_type"] == FRESH.get(name, source["model_type"])
    assert (table["eos_token_id"], table["bos_token_id"]) == (5, None)
    again = load_pretrained(tmp_path / "new")
    for old, new in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(old, new)
    if name in FRESH or name == "fla_gated_deltanet_old":
        return  # other names than those it was read from
    there, here = open_checkpoint(CHECKPOINTS / name), open_checkpoint(tmp_path / "new")
    assert set(there.tensors) - set(there.aside) == set(here.tensors)
    assert all(there.tensors[key].shape == here.tensors[key].shape for key in here.tensors)
    known = {**source, **source.get("text_config", {})}
    changed = {key for key in table if key in known and known[key] != table[key]}
    assert changed <= {"transformers_version", "eos_token_id", "bos_token_id", "pad_token_id", *FREE}


def test_other_names_and_files_of_the_same_tensors(checkpoint):
    """Prefixes as in files of serving engines, experts one by one, files by any name."""
    for name, changes in {
        "qwen3_5_vlm": {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"},
        "qwen3_5_moe_vlm": {"model.language_model.": "model."},
    }.items():
        folder, old = checkpoint(name), open_checkpoint(CHECKPOINTS / name)
        data = {}
        for key, tensor in old.tensors.items():
            new = key
            for before, after in changes.items():
                new = after + key.removeprefix(before) if key.startswith(before) else new
            numbers = read_flat(tensor, 0, math.prod(tensor.shape)).reshape(tensor.shape)
            if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                data[new] = numbers
                continue
            stem = new.rsplit(".", 1)[0]
            for expert, matrix in enumerate(numbers):
                parts = (
                    {"down": matrix}
                    if new.endswith("down_proj")
                    else dict(zip(("gate", "up"), np.split(matrix, 2), strict=True))
                )
                data |= {f"{stem}.{expert}.{part}_proj.weight": values for part, values in parts.items()}
        tensors = {key: ("F32", values.shape) for key, values in data.items()}
        files = {"one.safetensors": sorted(tensors)[::2], "Zwei 2.safetensors": sorted(tensors)[1::2]}
        (folder / "model.safetensors").unlink()
        for file, keys in files.items():
            write_file(folder / file, {key: tensors[key] for key in keys}, lambda key, data=data: [data[key].tobytes()])
        where = {key: file for file, keys in files.items() for key in keys}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        for one, other in zip(
            jax.tree.leaves(nnx.state(load_pretrained(CHECKPOINTS / name))),
            jax.tree.leaves(nnx.state(model := load_pretrained(folder))),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
        save_pretrained(model, folder / "again", like=folder)
        for file in files:
            assert (folder / "again" / file).read_bytes() == (folder / file).read_bytes()
