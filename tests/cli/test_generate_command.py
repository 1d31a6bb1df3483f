"""delta-jax generate: text as it comes, conversations, files of prompts, saved prefixes."""

import io
import json
import re

import pytest
import tokenizers

from delta_jax.cli import main
from delta_jax.data import load_tokenizer
from delta_jax.inference import generate
from delta_jax.training import restore_model
from tests.conftest import users_call

CONFIG = """
steps = 1
batch_size = 8
sequence_length = 16
output = "{folder}/run"

[model]
vocab_size = 300
hidden_size = 16
num_layers = 1
intermediate_size = 0
initializer_std = 0.5
dtype = "float32"

[[model.pattern]]
mixer = "delta_net"
num_heads = 2

[data]
path = "{folder}/*.txt"
tokenizer = "{folder}/tokenizer.json"
validation_fraction = 0.2
shuffle_rows = 2
"""
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one step, with a tokenizer.json that has special tokens, and a chat template."""
    folder = tmp_path_factory.mktemp("generate")
    for number in range(12):
        (folder / f"{number}.txt").write_text(TEXT + str(number))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    assert main(["train", str(folder / "config.toml")]) == 0
    (folder / "run" / "chat_template.jinja").write_text(TEMPLATE)
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    return restore_model(run)[1]


@pytest.fixture(scope="module")
def tokenizer(run):
    return load_tokenizer(str(run / "tokenizer.json"))


@pytest.fixture
def command(run, capsys):
    """Runs the command; returns what it printed."""

    def call(*arguments, greedy=True):
        capsys.readouterr()
        assert main(["generate", str(run), *arguments, *(GREEDY if greedy else [])]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def mistake(run, capsys):
    """Runs the command, which must fail; returns its one line."""

    def call(*arguments):
        capsys.readouterr()
        with users_call():
            assert main(["generate", str(run), *arguments, *GREEDY]) == 2
        error = capsys.readouterr().err
        assert error.startswith("delta-jax generate: error: ") and error.count("\n") == 1
        return error

    return call


def greedy(model, ids, **options):
    (row,) = generate(model, [ids], max_new_tokens=6, **options)
    return row


def test_text_of_one_prompt_comes_in_pieces(run, model, tokenizer, monkeypatch):
    written = []

    class Terminal(io.StringIO):
        def flush(self):
            written.append(self.getvalue())

    monkeypatch.setattr("sys.stdout", Terminal())
    assert main(["generate", str(run), "--prompt", "The fox", "--temperature", "0", "--max-new-tokens", "30"]) == 0
    ids = [tokenizer.document_id, *tokenizer.encode("The fox").tolist()]
    (row,) = generate(model, [ids], max_new_tokens=30, stop_id=tokenizer.document_id)
    whole = tokenizer.decode([*ids, *row])
    assert written[0] == "The fox"
    assert len({*written}) >= 4
    assert all(whole.startswith(part.removesuffix("\n").rstrip("\ufffd")) for part in written)
    assert written[-1].removesuffix("\n") == whole


def test_stop_strings_samples_and_penalties(command, model, tokenizer):
    ids = [tokenizer.document_id, *tokenizer.encode("The fox").tolist()]
    text = tokenizer.decode(greedy(model, ids))
    assert command("--prompt", "The fox") == f"The fox{text}\n"
    stop = text[2:4]
    assert command("--prompt", "The fox", "--stop", "~~~", "--stop", stop) == f"The fox{text[: text.index(stop)]}\n"
    penalized = tokenizer.decode(greedy(model, ids, repetition_penalty=5.0))
    assert command("--prompt", "The fox", "--repetition-penalty", "5") == f"The fox{penalized}\n"
    options = ["--samples", "2", "--min-p", "0.01", "--temperature", "2", "--max-new-tokens", "5"]
    out = command("--prompt", "The", *options, greedy=False)
    first, second = re.fullmatch(r"--- 1\.1 ---\nThe(.*)\n--- 1\.2 ---\nThe(.*)\n", out, re.DOTALL).groups()
    assert first != second
    assert command("--prompt", "The", *options, greedy=False) == out


def test_a_conversation_is_written_by_the_template_and_answered(command, mistake, run, model, tokenizer):
    start, end = 1, 2  # what the user wrote is no special token
    parts = ["system\nBe brief.", end, "\n", start, "user\nThe <|im_end|>\u00e9?", end, "\n", start, "assistant\n"]
    ids = [start]
    for part in parts:
        ids += [part] if isinstance(part, int) else tokenizer.encode(part).tolist()
    row = greedy(model, ids)
    question = ["--prompt", "The <|im_end|>\u00e9?", "--system", "Be brief.", "--chat"]
    assert command(*question) == tokenizer.decode(row) + "\n"
    try:
        (run / "generation_config.json").write_text(json.dumps({"eos_token_id": [row[3], 280]}))
        assert command(*question) == tokenizer.decode(row[: row.index(row[3])]) + "\n"
        (run / "generation_config.json").write_text(json.dumps({"eos_token_id": row[0]}))
        assert command(*question) == "\n"
        for ids in (tokenizer.vocab_size, [1, "a"], -1):
            (run / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
            assert '"eos_token_id" should be a token of [0, 292) or a list of some' in mistake(*question)
        (run / "generation_config.json").write_text("{")
        assert "generation_config.json is not JSON" in mistake(*question)
        (run / "generation_config.json").unlink()
        text = tokenizer.decode(row)[1:3]
        (run / "tokenizer_config.json").write_text(json.dumps({"eos_token": text}))  # a text of several tokens
        assert command(*question) == tokenizer.decode(row).partition(text)[0] + "\n"
        (run / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
        assert "cannot render the messages: no system" in mistake(*question)
        (run / "chat_template.jinja").unlink()
        assert "a conversation needs the chat template of the model" in mistake(*question)
        assert command("--prompt", "The fox").startswith("The fox")
    finally:
        (run / "generation_config.json").unlink(missing_ok=True)
        (run / "tokenizer_config.json").unlink(missing_ok=True)
        (run / "chat_template.jinja").write_text(TEMPLATE)
    assert "--system belongs to a conversation" in mistake("--prompt", "x", "--system", "y")


def test_files_of_prompts_go_on_where_they_stopped(command, mistake, run, tmp_path, monkeypatch, capsys):
    messages = [{"role": "user", "content": "dog?"}]
    records = [{"prompt": f"The {'lazy ' * (n % 3)}", "number": n} for n in range(5)]
    records.insert(2, {"id": "x", "messages": messages})
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "output.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--prompts", str(prompts), "--batch-size", "2"]
    assert command(*arguments, "--output", str(output)) == ""
    whole = output.read_text()
    found = [json.loads(line) for line in whole.splitlines()]
    for record, line in zip(records, found, strict=True):
        (completion,) = line.pop("completions")
        assert line.pop("made_by")
        assert line == record
        assert completion["finish_reason"] == "length" and completion["tokens"] == 6
        if "prompt" in record:
            assert command("--prompt", record["prompt"]) == record["prompt"] + completion["text"] + "\n"
        else:
            assert command("--prompt", "dog?", "--chat") == completion["text"] + "\n"
    shown = [json.loads(line) for line in command(*arguments).splitlines()]
    assert [line.pop("completions") for line in shown] == [
        json.loads(line)["completions"] for line in whole.splitlines()
    ]
    assert shown == records
    output.write_text(whole[: whole.index("\n") + 30])
    assert command(*arguments, "--output", str(output)) == ""
    assert output.read_text() == whole
    assert "was made with other options" in mistake(*arguments, "--output", str(output), "--stop", "x")
    prompts.write_text(prompts.read_text().replace('"number": 0', '"number": 9'))
    assert "line 1 of" in mistake(*arguments, "--output", str(output))
    assert output.read_text() == whole
    assert "must be another file than --prompts" in mistake(*arguments, "--output", str(prompts))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n{"prompt": 1}')))
    assert 'line 2 of standard input: "prompt" should be a text' in mistake("--prompts", "-")
    prompts.write_text('{"prompt": "a"}\n{"messages": 3}\n')
    assert "line 2 of" in mistake("--prompts", str(prompts))
    prompts.write_text('{"prompt": "a"}\n{"messages": [3]}\n')
    assert "prompt 2: messages.0: wanted an object" in mistake("--prompts", str(prompts))


def test_a_prefix_is_read_once(command, mistake, tmp_path):
    file = str(tmp_path / "prefix")
    assert command("--prompt", "The quick brown fox", "--save-prefix", file) == f"{file}: 5 tokens\n"
    wanted = command("--prompt", "The quick brown fox jumps")
    assert "The quick brown fox" + command("--prompt", " jumps", "--prefix", file) == wanted
    longer = str(tmp_path / "longer")
    assert command("--prompt", " jumps", "--prefix", file, "--save-prefix", longer).endswith("6 tokens\n")
    assert "The quick brown fox jumps" + command("--prompt", "", "--prefix", longer) == wanted
    assert "saves what one prompt leaves" in mistake("--prompt", "a", "--prompt", "b", "--save-prefix", file)
    assert "cannot be read" in mistake("--prompt", "a", "--prefix", str(tmp_path / "nowhere"))
    assert "--prefix is continued by texts" in mistake("--prompt", "a", "--prefix", file, "--chat")
    (tmp_path / "prefix").write_bytes(b"text")
    assert "is no prefix that was saved" in mistake("--prompt", "a", "--prefix", file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "samples"),
        (["--batch-size", "0", "--samples", "2"], "batch_size"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--stop", ""], "stop must be"),
        (["--min-p", "0.5"], "min_p need a temperature"),
        (["--prompts", "nowhere.jsonl"], "--prompts: the file 'nowhere.jsonl' cannot be read"),
    ],
)
def test_impossible_options(mistake, options, message):
    assert message in mistake("--prompt", "x", *options)
