"""The command line: a round trip through all commands, and one clear line for every mistake."""

import io
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import delta_jax
from delta_jax.cli import main
from delta_jax.data import validation_batches, validation_bytes
from delta_jax.evaluation import evaluate
from delta_jax.training import restore_model

CONFIG = """
steps = 4
batch_size = 8
sequence_length = 32
log_every = 1
evaluate_every = 4
evaluation_batches = 2
output = "{output}"

[model]
vocab_size = 257
hidden_size = 32
num_layers = 1
intermediate_size = 32
dtype = "float32"

[[model.pattern]]
mixer = "delta_net"
num_heads = 2
head_dim = 16

[data]
path = "{corpus}"
validation_fraction = 0.2
shuffle_rows = 8
"""


def write_config(folder):
    """A tiny configuration with a corpus of its own; returns the path of the TOML file."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(10):
        (corpus / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 5)
    config = folder / "tiny.toml"
    config.write_text(CONFIG.format(output=folder / "run", corpus=corpus))
    return str(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(configuration file, run folder) of a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    config = write_config(folder)
    assert main(["train", config]) == 0
    return config, str(folder / "run")


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def mistake(capsys, *arguments):
    """Runs a command that must fail; returns its one line."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"delta-jax {arguments[0]}: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_evaluate_prints_what_the_library_measures(trained, capsys):
    _, folder = trained
    assert main(["evaluate", folder]) == 0
    shown = dict(re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines())
    config, model = restore_model(folder)
    batches = validation_batches(config.data, batch_size=8, sequence_length=32)
    result = evaluate(model, batches, bytes=validation_bytes(config.data))
    assert shown["loss"] == f"{result.loss:.4f} nats per token"
    assert shown["bits per byte"] == f"{result.bits_per_byte:.4f}"
    assert shown["perplexity"] == f"{result.perplexity:.3f} per token"
    assert shown["bytes"] == f"{result.bytes:,}"


def test_a_document_that_is_no_text_is_named(config, tmp_path, capsys):
    lines = [json.dumps({"text": f"good {number}"}) for number in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "half an emoji \\ud83d here"}', *lines]))
    error = mistake(capsys, "train", config, f"data.path={tmp_path}/a.jsonl")
    assert re.search(r"a\.jsonl, line 1: character 14 is U\+D83D", error)


def test_evaluate_on_another_corpus(trained, tmp_path, capsys):
    _, folder = trained
    (tmp_path / "other.data").write_text("".join(json.dumps({"body": f"{number}" * 50}) + "\n" for number in range(10)))
    arguments = ["--data", str(tmp_path / "other.data"), "--format", "jsonl", "--text-field", "body"]
    arguments += ["--batch-size", "1", "--sequence-length", "16"]
    held_out = ["--split", "validation"]
    for more, size in (([], 10), (held_out, 3), ([*held_out, "--validation-fraction", "0.5"], 5)):
        assert main(["evaluate", folder, *arguments, *more]) == 0
        assert re.search(rf"bytes +{50 * size}\n", capsys.readouterr().out)


def test_evaluate_on_one_document_and_on_every_part(trained, tmp_path, capsys):
    _, folder = trained

    def counted(*arguments):
        assert main(["evaluate", folder, "--batch-size", "2", "--sequence-length", "16", *arguments]) == 0
        out = capsys.readouterr().out
        return int(re.search(r"bytes +([\d,]+)\n", out).group(1).replace(",", "")), "byte bigram" in out

    (tmp_path / "one.txt").write_text("x" * 70)
    assert counted("--data", str(tmp_path / "one.txt")) == (70, False)
    parts = {split: counted("--split", split) for split in ("train", "validation", "all")}
    assert parts["train"][0] + parts["validation"][0] == parts["all"][0]
    assert [bigram for _, bigram in parts.values()] == [False, True, False]
    assert counted() == parts["validation"]
    held_out = ["--data", str(tmp_path / "one.txt"), "--split", "validation"]
    assert "one document" in mistake(capsys, "evaluate", folder, *held_out)


def test_prompts_from_files_and_from_standard_input(trained, tmp_path, capsys, monkeypatch):
    _, folder = trained
    (tmp_path / "prompt").write_text("def f\n  é")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"return")))
    options = ["--max-new-tokens", "2", "--temperature", "0", "--stop-id", "3", "--stop-id", "7"]
    files = ["--prompt-file", str(tmp_path / "prompt"), "--prompt-file", "-"]
    assert main(["generate", folder, "--prompt", "x", *files, *options]) == 0
    assert re.match(r"--- 1 ---\nx.*--- 2 ---\ndef f\n  é.*--- 3 ---\nreturn", capsys.readouterr().out, re.DOTALL)
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    assert "not text in UTF-8" in mistake(capsys, "generate", folder, *files[:2])
    assert "cannot be read" in mistake(capsys, "generate", folder, "--prompt-file", str(tmp_path))
    assert "--prompt" in mistake(capsys, "generate", folder)


def test_generate_continues_every_prompt_and_repeats_itself(trained, capsys):
    _, folder = trained
    command = [
        "generate",
        folder,
        "--prompt",
        "def f",
        "--prompt",
        "return",
        "--max-new-tokens",
        "12",
        "--seed",
        "3",
    ]
    shown = []
    for _ in range(2):
        assert main(command) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert re.match(r"--- 1 ---\ndef f.*--- 2 ---\nreturn", shown[0], re.DOTALL)
    assert main([*command[:4], "--max-new-tokens", "12", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("def f")


def test_training_again_with_more_steps_goes_on(trained, capsys):
    config, folder = trained
    assert main(["train", config, "steps=6"]) == 0
    assert restore_model(folder)[0].steps == 6
    for command in (["evaluate", folder], ["generate", folder, "--prompt", "x", "--max-new-tokens", "1"]):
        assert main([*command, "--step", "4"]) == 0
        assert "there is no checkpoint 5" in mistake(capsys, *command, "--step", "5")
        assert "only 4, 6" in mistake(capsys, *command, "--step", "-1")
    (first, old), (last, new) = restore_model(folder, 4), restore_model(folder)
    assert (first.steps, last.steps) == (4, 6)
    assert not jnp.array_equal(old.embed.embedding[...], new.embed.embedding[...])


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^delta_jax +{re.escape(delta_jax.__version__)}$", out, re.MULTILINE)
    assert re.search(rf"^jax +{re.escape(jax.__version__)}$", out, re.MULTILINE)
    assert re.search(r'^"xla" +can run here$', out, re.MULTILINE)
    assert len(re.findall(r"^device \d", out, re.MULTILINE)) == len(jax.devices())
    for name, reason in delta_jax.ops.implementations().items():
        if reason is not None:
            assert re.search(rf'^"{name}" +cannot run here: {re.escape(reason)}$', out, re.MULTILINE)


def test_config_prints_every_key_with_its_meaning(capsys, tmp_path):
    assert main(["config", "tiny", "steps=70", "optimizer.warmup_steps=7"]) == 0
    shown = capsys.readouterr().out
    assert "# optimizer steps of the whole run.\nsteps = 70\n" in shown
    assert "# heads of q and k.\nnum_heads = " in shown
    file = tmp_path / "tiny.toml"
    file.write_text(shown)
    assert main(["config", str(file)]) == 0
    assert capsys.readouterr().out == shown
    assert "name a TOML file or a preset" in mistake(capsys, "config")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "delta-jax config PRESET" in " ".join(capsys.readouterr().out.split())


def test_unknown_key(config, capsys):
    error = mistake(capsys, "train", config, "model.hidden_sise=64")
    assert "model.hidden_sise" in error
    assert "hidden_size" in error


def test_wrong_type(config, capsys):
    assert "batch_size" in mistake(capsys, "train", config, "batch_size=many")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed should lie in [0, 2^32), got -1"),
        (f"seed={2**40}", "seed should lie in [0, 2^32)"),
        (f"seed={10**30}", "seed: wanted a number of at most 64 bits"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate: wanted a finite number, got inf"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: wanted a finite number, got nan"),
        (f"optimizer.learning_rate={'9' * 5000}", "optimizer.learning_rate: wanted a number"),
        ("optimizer.learning_rate=-1", "learning_rate should be positive"),
        ("optimizer.learning_rate=true", "optimizer.learning_rate: wanted a number, got True"),
        (f"steps={2**31}", "steps should be below 2^31"),
        ("model.vocab_size=99999999999999", "vocab_size must be below 2^31"),
        ("model.pattern.0.num_heads=true", "model.pattern.0: num_heads: wanted an integer, got True"),
        ("model.pattern.0.expand_v=inf", "model.pattern.0: expand_v: wanted a finite number"),
        ("model.pattern.0.implementation=fast", "implementation='fast' cannot run here"),
        ("model.pattern.0.implementation=3", "implementation: wanted a string, got 3"),
        ("model.pattern.0.implementation=pallas", "this is a cpu"),
        ("model.pattern.0.chunk_size=24", "chunk_size must be"),
        ("model.pattern.0.mixer=nowhere.to:be_found", "cannot be imported: No module named 'nowhere'"),
    ],
)
def test_impossible_runs_are_refused_before_the_data_is_read(config, capsys, monkeypatch, override, message):
    def read(*_, **__):
        raise AssertionError("the data was read")

    monkeypatch.setattr("delta_jax.training.loop.train_batches", read)
    assert message in mistake(capsys, "train", config, override)


@pytest.mark.parametrize("module", ["orbax", "flax", "matplotlib"])
def test_what_is_not_installed_is_named_with_its_extra(module):
    """In a process of its own, where nothing is imported yet."""
    program = (
        f"import sys; sys.modules[{module!r}] = None\nfrom delta_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", program, "train", "tiny"], capture_output=True, text=True)
    wanted = f"delta-jax train: error: this needs {module}, which is not installed: pip install 'delta_jax[train]'\n"
    assert (done.returncode, done.stderr) == (2, wanted)


def test_a_module_of_no_extra_is_named_too(monkeypatch, capsys):
    monkeypatch.setattr("delta_jax.cli._config", lambda _: __import__("no_such_module"))
    assert "this needs no_such_module, which is not installed" in mistake(capsys, "train", "tiny")


def test_no_configuration_names_the_presets(capsys):
    assert "there are: delta_net_1.3b, " in mistake(capsys, "train")


def test_unknown_preset_and_missing_file(capsys):
    error = mistake(capsys, "train", "tinny")
    assert "tinny" in error
    assert "tiny" in error.replace("tinny", "")
    assert "nowhere.toml" in mistake(capsys, "train", "nowhere.toml")


def test_missing_corpus(config, tmp_path, capsys):
    assert "no/corpus" in mistake(capsys, "train", config, f"data.path={tmp_path}/no/corpus")


def test_empty_corpus(config, tmp_path, capsys):
    (tmp_path / "void").mkdir()
    error = mistake(capsys, "train", config, f"data.path={tmp_path}/void")
    assert "data.path" in error
    assert "is empty" in error


def test_vocabulary_smaller_than_the_tokenizer(config, capsys):
    error = mistake(capsys, "train", config, "model.vocab_size=256")
    assert "model.vocab_size" in error
    assert "257" in error


def test_missing_tokenizer(config, capsys):
    assert "data.tokenizer" in mistake(capsys, "train", config, "data.tokenizer=nothing.json")


def test_unwritable_output(config, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in mistake(capsys, "train", config, f"output={tmp_path}/file/run")


def test_checkpoint_of_another_model(trained, capsys):
    config, folder = trained
    error = mistake(capsys, "train", config, "model.hidden_size=64")
    assert "hidden_size" in error
    assert folder in error


def test_folder_that_is_no_run(tmp_path, capsys):
    for command in (["generate", str(tmp_path), "--prompt", "x"], ["evaluate", str(tmp_path)]):
        assert str(tmp_path) in mistake(capsys, *command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--top-k", "0"], "top_k"),
        (["--top-p", "1.5"], "top_p"),
        (["--top-p", "0"], "top_p"),
        (["--temperature", "nan"], "temperature"),
        (["--seed", "-1"], "--seed must lie in [0, 2^32)"),
        (["--seed", str(2**40)], "--seed must lie in [0, 2^32)"),
        (["--stop-id", "257"], "stop_id must lie in [0, 257)"),
    ],
)
def test_impossible_generation(trained, capsys, options, message):
    assert message in mistake(capsys, "generate", trained[1], "--prompt", "x", *options)


def test_impossible_evaluation(trained, capsys):
    folder = trained[1]
    assert "no file, folder or glob" in mistake(capsys, "evaluate", folder, "--data", "no/corpus")
    assert "batch_size" in mistake(capsys, "evaluate", folder, "--batch-size", "0")
    assert "not enough memory" in mistake(capsys, "evaluate", folder, "--batch-size", str(10**13))
    assert "--data" in mistake(capsys, "evaluate", folder, "--format", "text")


def test_what_a_user_cannot_cause_is_not_hidden(monkeypatch):
    monkeypatch.setattr("delta_jax.cli._config", lambda _: {}["a fault of ours"])
    with pytest.raises(KeyError, match="a fault of ours"):
        main(["train", "tiny"])


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "tinny", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["trian", "tiny"], ["generate"], ["evaluate", "run", "--batch-size", "x"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: delta-jax" in capsys.readouterr().err


def test_as_a_process(tmp_path):
    command = [sys.executable, "-m", "delta_jax.cli"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("train", "generate", "evaluate", "info"))
    failed = subprocess.run([*command, "train", "tinny"], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert failed.stdout == ""
