"""Fine-tuning from the command line: from a run's weights on completions, and the moving average that it keeps."""

import json

import pytest
from test_cli import mistake, write_config

from delta_jax.cli import main

TUNE = """
initial = "{initial}"
steps = 6
batch_size = 8
sequence_length = 48
log_every = 1
evaluate_every = 6
output = "{output}"
ema_decay = 0.5

[data]
path = "{path}"
records = "completion"
validation_fraction = 0.3
shuffle_rows = 2

[optimizer]
learning_rate = 0.02

[[optimizer.groups]]
pattern = "^embed/"
frozen = true
"""


@pytest.mark.slow
def test_fine_tuning_from_a_run(tmp_path, capsys):
    assert main(["train", write_config(tmp_path), "evaluation_batches=1"]) == 0
    records = [{"prompt": f"{n} is", "completion": " a number"} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    names = {"initial": tmp_path / "run", "output": tmp_path / "tuned", "path": tmp_path / "pairs.jsonl"}
    (tmp_path / "tune.toml").write_text(TUNE.format(**names))
    tune, tuned = str(tmp_path / "tune.toml"), str(tmp_path / "tuned")

    capsys.readouterr()
    assert main(["train", tune, "model.remat=block"]) == 0
    said = capsys.readouterr().out
    assert f"beginning with the weights of {tmp_path / 'run'}; model.remat: 'none' there, 'block' here" in said
    first, last = map(json.loads, (tmp_path / "tuned" / "evaluation.jsonl").read_text().splitlines())
    assert last["loss"] < 0.9 * first["loss"]

    assert main(["evaluate", tuned]) == 0
    shown = capsys.readouterr().out
    assert main(["evaluate", tuned, "--ema"]) == 0
    average = capsys.readouterr().out
    lines = [dict(line.split("  ", 1) for line in text.splitlines()) for text in (shown, average)]
    assert lines[0]["loss"] != lines[1]["loss"] and lines[0]["tokens"] == lines[1]["tokens"]
    assert int(lines[0]["tokens"]) % 10 == 0 and "byte bigram" not in shown  # of " a number" and its end

    corpus = str(tmp_path / "corpus")
    assert "plain text, which holds no completion" in mistake(capsys, "evaluate", tuned, "--data", corpus)
    assert main(["evaluate", tuned, "--data", corpus, "--records", "text"]) == 0
    assert main(["generate", tuned, "--ema", "--prompt", "7 is", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert "has no moving average" in mistake(capsys, "evaluate", str(tmp_path / "run"), "--ema")
    assert "does not fit the weights of initial" in mistake(
        capsys, "train", tune, f"output={tmp_path / 'new'}", "model.hidden_size=16"
    )
    assert "matches no parameter" in mistake(
        capsys, "train", tune, f"output={tmp_path / 'new'}", "optimizer.groups.0.pattern=nothing"
    )
