"""A published model that also sees, fine-tuned and written back: what was trained has moved, its eyes have not."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from delta_jax.config import load_config
from delta_jax.interop import open_checkpoint
from delta_jax.interop.safetensors import raw_bytes
from delta_jax.training import TrainConfig, export_run, import_run, train


def of(checkpoint, name):
    return b"".join(raw_bytes(checkpoint.tensors[name]))


@pytest.mark.slow  # two models are compiled for training
@pytest.mark.parametrize("from_run", [True, False])
def test_fine_tuned_and_written_back(from_run, checkpoint, tmp_path):
    folder = checkpoint("qwen3_5_vlm")
    (folder / "expected.npz").unlink()
    words = {f"w{n}": n for n in range(60)} | {"<unk>": 60}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    random = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(f"w{n}" for n in random.integers(0, 60, 40))}) for _ in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    source = folder
    if from_run:
        import_run(folder, tmp_path / "imported")
        source = tmp_path / "imported"
    table = {
        "initial": str(source),
        "data": {"path": str(tmp_path / "text.jsonl"), "validation_fraction": 0.2, "shuffle_rows": 4},
        "optimizer": {"learning_rate": 1e-2, "groups": [{"pattern": "embed/", "frozen": True}]},
        "steps": 2,
        "batch_size": 2,
        "sequence_length": 16,
        "evaluation_batches": 1,
        "output": str(tmp_path / "tuned"),
    }
    train(load_config(TrainConfig, table), devices=jax.devices()[:1], progress=False)
    assert export_run(tmp_path / "tuned", tmp_path / "out") == "qwen3_5"
    old, new = open_checkpoint(folder), open_checkpoint(tmp_path / "out")
    assert new.table == old.table
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert old.tensors.keys() == new.tensors.keys() and len(old.aside) == 26
    frozen = {*old.aside, "model.language_model.embed_tokens.weight"}
    same = {name for name in old.tensors if of(old, name) == of(new, name)}
    assert same == frozen
