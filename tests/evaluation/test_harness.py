"""Tasks of lm-evaluation-harness on a run: multiple choice, perplexity, generation, each against a plain loop; offline."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from flax import nnx

from delta_jax.cli import main
from delta_jax.data import ByteTokenizer, JsonTokenizer
from delta_jax.evaluation import harness
from delta_jax.evaluation.harness.conventions import Conventions, conventions
from delta_jax.training import restore_model
from tests.conftest import users_call
from tests.evaluation.plain import next_logits, plain_score

pytestmark = pytest.mark.xdist_group("harness")  # its trained run is made once

TASKS = Path(__file__).parent / "tasks"
LENGTH = 96  # shorter than some documents
CONFIG = """
steps = 24
evaluation_batches = 1
batch_size = 8
sequence_length = 48
output = "{folder}/run"

[model]
vocab_size = 257
hidden_size = 32
num_layers = 1
intermediate_size = 0
dtype = "float32"

[[model.pattern]]
mixer = "delta_net"
num_heads = 2

[optimizer]
learning_rate = 2e-2

[data]
path = "{folder}/*.txt"
validation_fraction = 0.2
shuffle_rows = 2
"""
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20
DOCUMENT = ByteTokenizer.document_id


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, data sets kept in a folder of the test, and tasks' files found from where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        import datasets
        import lm_eval.tasks.manager

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        # The harness looks for its own tasks, thousands, beside this file.
        patch.setattr(lm_eval.tasks.manager, "__file__", str(TASKS / "manager.py"))
        patch.chdir(TASKS)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has learnt one sentence."""
    folder = tmp_path_factory.mktemp("harness")
    for number in range(12):
        (folder / f"{number}.txt").write_text(TEXT + str(number))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    assert main(["train", str(folder / "config.toml")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    return restore_model(run)[1]


@pytest.fixture(scope="module")
def lm(run):
    return harness.load_lm(run, batch_size=4, max_length=LENGTH)


@pytest.fixture(scope="module")
def results(lm):
    """Of all three tasks, with what the model answered to every request."""
    names, options = ["fox_choice", "fox_rolling", "fox_generation"], {"log_samples": True, "bootstrap_iters": 0}
    return harness.evaluate_tasks(lm, names, include_path=TASKS, **options)


def documents(task):
    return [json.loads(line) for line in (TASKS / f"{task}.jsonl").read_text().splitlines()]


def samples(results, task):
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def text_score(model, context, continuation):
    """Of what the model reads of it."""
    answer = continuation.encode()
    return plain_score(model, [DOCUMENT, *context.encode()][-(LENGTH + 1 - len(answer)) :], answer)


def test_multiple_choice(model, results):
    docs = documents("fox_choice")
    right = right_per_character = 0
    for sample, doc in zip(samples(results, "fox_choice"), docs, strict=True):
        context = sample["arguments"][0][0]
        assert context.endswith(doc["text"]) and context.count("\n\n") == 2  # after two examples
        likely = []
        for choice, ((found, greedy),) in zip(doc["choices"], sample["resps"], strict=True):
            wanted = text_score(model, context, f" {choice}")
            assert float(found) == pytest.approx(wanted[0], abs=1e-3) and str(greedy) == str(wanted[1])
            likely.append(wanted[0])
        right += int(np.argmax(likely)) == doc["answer"]
        lengths = [len(choice) for choice in doc["choices"]]
        right_per_character += int(np.argmax(np.divide(likely, lengths))) == doc["answer"]
    measured = results["results"]["fox_choice"]
    assert measured["acc,none"] == right / len(docs) > 0.5
    assert measured["acc_norm,none"] == right_per_character / len(docs)


def test_rolling_perplexity(model, results):
    """Every window has as many tokens as the model reads; the last of a text scores those that are left."""
    nats, words, size = 0.0, 0, 0
    for doc in documents("fox_rolling"):
        tokens = [DOCUMENT, *doc["text"].encode()]
        for place in range(1, len(tokens)):
            first = (place - 1) // LENGTH * LENGTH  # of the window, in which the token before it stands
            end = min(first + LENGTH, len(tokens) - 1)
            nats -= plain_score(model, tokens[max(end - LENGTH, 0) : place], tokens[place : place + 1])[0]
        words, size = words + len(doc["text"].split(" ")), size + len(doc["text"].encode())
    measured = results["results"]["fox_rolling"]
    assert measured["byte_perplexity,none"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert measured["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert measured["word_perplexity,none"] > measured["byte_perplexity,none"]


def greedy_text(model, prompt, stops, most):
    """Byte by byte, until a text stands there that stops, or a document ends."""
    tokens, new = [DOCUMENT, *prompt.encode()][-(LENGTH - most) :], []
    while len(new) < most:
        token = int(np.argmax(next_logits(model, tokens + new)))
        text = bytes(new).decode(errors="replace")
        if token == DOCUMENT:
            return text
        new.append(token)
        text = bytes(new).decode(errors="replace")
        for stop in stops:
            if stop in text:
                return text[: text.index(stop)]
    return text


def test_generation(model, results):
    docs = documents("fox_generation")
    texts = [greedy_text(model, doc["text"], ["dog", "\n\n"], 20) for doc in docs]
    assert [sample["resps"][0][0] for sample in samples(results, "fox_generation")] == texts
    right = sum(text == doc["answer"] for text, doc in zip(texts, docs, strict=True))
    assert results["results"]["fox_generation"]["exact_match,none"] == right / len(docs) > 0


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def test_what_is_empty_and_spaces_between(lm, model):
    found = lm.loglikelihood(
        requests(("", ""), ("fox", ""), ("", "The"), ("  ", "fox"), ("The ", "fox"), ("The", " fox")), disable_tqdm=True
    )
    assert found[:2] == [(0.0, True)] * 2
    for (total, greedy), (context, answer) in zip(
        found[2:], [("", "The"), ("", "  fox"), ("The", " fox"), ("The", " fox")], strict=True
    ):
        wanted = text_score(model, context, answer)
        assert total == pytest.approx(wanted[0], abs=1e-3) and greedy == wanted[1]
    assert lm.loglikelihood_rolling(requests(("",)), disable_tqdm=True) == [0.0]


def test_a_uniform_model_through_the_harness(model):
    uniform = nnx.clone(model)
    uniform.lm_head.kernel[...] = 0 * uniform.lm_head.kernel[...]
    lm = harness.load_lm(model=uniform, tokenizer=ByteTokenizer(), batch_size=4, max_length=LENGTH)
    texts = ["fox jumps", "dog sleeps", "quick brown"]
    found = lm.loglikelihood(requests(*[("The quick brown", text) for text in texts]), disable_tqdm=True)
    for text, (total, _) in zip(texts, found, strict=True):
        assert total == pytest.approx(-len(text) * math.log(257), rel=1e-6)
    text = "x" * 150  # more than a window
    (total,) = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert total == pytest.approx(-150 * math.log(257), rel=1e-6)


def test_samples_are_drawn_again_alike(lm):
    told = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 3.0, "top_p": 0.99}
    prompts = requests(*[("The quick brown", told)] * 4, ("The", {**told, "do_sample": False}))
    first, second = (lm.generate_until(prompts, disable_tqdm=True) for _ in range(2))
    assert first == second and len(set(first[:4])) > 1
    assert first[4] == greedy_text(lm.model, "The", ["\n"], 8)


def test_what_generation_cannot_do(lm):
    for told, said in (
        ({"length_penalty": 2.0}, "length_penalty cannot be had"),
        ({"num_beams": 4}, "num_beams cannot be had"),
        ({"max_gen_toks": LENGTH}, "max_gen_toks, 96, leaves no room for a prompt"),
    ):
        with pytest.raises(ValueError, match=said):
            lm.generate_until(requests(("The", told)), disable_tqdm=True)
    with pytest.raises(ValueError, match="has neither chat_template"):
        lm.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_the_command_writes_a_table_and_json(run, results, tmp_path, capsys):
    output = tmp_path / "results.json"
    tasks = ["--tasks", "fox_choice,fox_gen*", "--include-path", str(TASKS), "--output", str(output)]
    assert main(["evaluate", str(run), *tasks, "--batch-size", "4", "--max-length", str(LENGTH)]) == 0
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    shown = {row[5]: row[6] for row in rows}
    written = json.loads(output.read_text())
    for task, metric in (("fox_choice", "acc"), ("fox_choice", "acc_norm"), ("fox_generation", "exact_match")):
        wanted = results["results"][task][f"{metric},none"]
        assert written["results"][task][f"{metric},none"] == wanted and shown[metric] == f"{wanted:.4f}"
    assert written["config"]["run"] == str(run) and written["config"]["shared_prefixes"] is True
    assert "samples" not in written


def test_examples_and_limits_and_nothing_shared(run, tmp_path):
    output = tmp_path / "results.json"
    tasks = ["--tasks", str(TASKS / "fox_choice.yaml"), "--output", str(output), "--no-shared-prefixes"]
    options = ["--num-fewshot", "1", "--limit", "4", "--batch-size", "4", "--max-length", str(LENGTH)]
    assert main(["evaluate", str(run), *tasks, *options]) == 0
    written = json.loads(output.read_text())
    assert written["n-samples"]["fox_choice"] == {"original": 6, "effective": 4}
    assert written["n-shot"]["fox_choice"] == 1 and written["config"]["shared_prefixes"] is False


def test_the_command_line_of_the_harness(run, monkeypatch, capsys):
    told = f"run={run},max_length={LENGTH}"
    options = ["--tasks", "fox_choice", "--include_path", str(TASKS), "--batch_size", "4", "--limit", "4"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", "delta_jax", "--model_args", told, *options])
    monkeypatch.setattr("lm_eval.utils.make_table", None)
    harness.main()
    assert "|fox_choice|1.0|none|2|acc|" in capsys.readouterr().out.replace(" ", "")


@pytest.fixture
def mistake(capsys):
    """Runs the command, which must fail; returns its one line."""

    def call(*arguments):
        capsys.readouterr()
        with users_call():
            assert main(["evaluate", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("delta-jax evaluate: error: ")
        return error.splitlines()[-1]

    return call


def test_mistakes_of_the_command(run, mistake, tmp_path, monkeypatch):
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: a\ndoc_to_target: b\n"
    )
    for arguments, said in (
        (["--tasks", "fox_choise"], "tasks: there is no 'fox_choise'; did you mean fox_choice"),
        (["--tasks", ","], "tasks must be the names of at least one task"),
        (["--tasks", "fox_choice", "--include-path", tmp_path / "no"], "include_path: there is no folder"),
        (
            ["--tasks", "far", "--include-path", tmp_path],
            "tasks: far cannot be loaded: its data set is fetched from the",
        ),
        (["--tasks", "fox_choice", "--limit", "0"], "limit must be at least 1, got 0"),
        (["--tasks", "fox_choice", "--data", "stdlib"], "--data describe a corpus"),
        (["--tasks", "fox_choice", "--output", tmp_path / "no" / "a.json"], "--output: there is no folder"),
        (["--tasks", "fox_choice", "--batch-size", "0"], "batch_size"),
        (["--tasks", "fox_choice", "--max-length", "-1"], "max_length"),
        (["--tasks", "fox_choice", "--apply-chat-template"], "neither chat_template.jinja nor one in"),
        (["--limit", "3", "--no-shared-prefixes"], "--limit, --shared-prefixes belong to tasks: give --tasks as well"),
    ):
        assert said in mistake(run, *arguments)
    assert "is not the output folder" in mistake(tmp_path, "--tasks", "fox_choice")
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    wanted = "this needs lm_eval, which is not installed: pip install 'delta_jax[eval]'"
    assert wanted in mistake(run, "--tasks", "fox_choice")
    with pytest.raises(ModuleNotFoundError, match="pip install 'delta_jax"):
        harness.load_lm(run)


SPECIAL = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def published(tmp_path):
    """Writes a tokenizer.json, whose special tokens are 0 to 4, and files beside it; returns its path."""

    def write(post=False, **files):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=257, special_tokens=SPECIAL, initial_alphabet=alphabet[:250], show_progress=False
        )
        tokenizer.train_from_iterator([TEXT], trainer)
        if post:
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, table in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(table))
        return tmp_path / "tokenizer.json"

    return write


@pytest.mark.parametrize(
    ("post", "files", "wanted"),
    [
        (False, {}, (2, 2, True)),  # trained here: every document began with the document id
        (True, {"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, (0, 1, True)),
        (False, {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}, (0, 1, False)),
        (False, {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": True}}, (0, 2, True)),
        (True, {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": False}}, (0, 2, False)),
        (False, {"tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>"}}, (4, 4, False)),
        (False, {"tokenizer_config": {}, "generation_config": {"bos_token_id": 0}}, (2, 2, False)),
        (False, {"generation_config": {"bos_token_id": 0, "eos_token_id": [4, 1]}}, (0, 4, False)),
    ],
)
def test_what_a_text_begins_with(published, post, files, wanted):
    path = published(post, **files)
    assert conventions(JsonTokenizer(path), path) == Conventions(*wanted)


def test_files_that_say_nonsense(published):
    for name, table, said in (
        ("tokenizer_config", {"bos_token": "<two tokens>"}, "which is no token of"),
        ("tokenizer_config", [], "is not a JSON object"),
        ("generation_config", {"bos_token_id": 999}, "wanted tokens of"),
    ):
        path = published(**{name: table})
        with pytest.raises(ValueError, match=said):
            conventions(JsonTokenizer(path), path)
        (path.parent / f"{name}.json").unlink()


def test_conversations_and_special_tokens(published, run, monkeypatch):
    table = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": TEMPLATE}
    path = published(tokenizer_config=table)
    config, model = restore_model(run)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(path)))
    monkeypatch.setattr("delta_jax.evaluation.harness.model.restore_model", lambda *_, **__: (config, model))
    lm = harness.load_lm(path.parent)
    text = lm.apply_chat_template([{"role": "user", "content": "The fox"}])
    assert text == "<|im_start|>user\nThe fox<|im_end|>\n<|im_start|>assistant\n"
    tokens = lm.tok_encode(text)
    assert tokens[:2] == [0, 3] and tokens.count(3) == 2 and tokens.count(4) == 1
    assert lm.tok_encode("<s>The") == lm.tok_encode("The") == [0, *lm.tok_encode("The", add_special_tokens=False)]
    assert harness.load_lm(path.parent, add_bos_token=False).tok_encode("<|im_end|>") == [4]
    begun = [{"role": "user", "content": "The"}, {"role": "assistant", "content": "Well, "}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant\nWell,")
    assert lm.chat_template(True) == TEMPLATE and lm.max_length == 48
    options, most = lm._options({"until": ["<|im_end|>", "dog", ""], "max_gen_toks": 8})
    assert options["stop_id"] == [1, 2, 4] and "dog" in options["stop"] and most == 40


def test_a_model_is_given_in_one_way(run, model):
    for arguments, said in (
        ({}, "give a run"),
        ({"run": run, "model": model}, "not both"),
        ({"run": run, "batch_size": "auto"}, "batch_size must be a positive integer"),
        ({"run": run, "prefix_token_id": 300}, "prefix_token_id must lie in"),
    ):
        with pytest.raises(ValueError, match=said):
            harness.load_lm(**arguments)
