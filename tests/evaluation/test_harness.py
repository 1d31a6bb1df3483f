"""Tasks of lm-evaluation-harness on a run: multiple choice, perplexity, generation, each against a plain loop; offline."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from flax import nnx

from delta_jax.cli import main
from delta_jax.data import ByteTokenizer, load_tokenizer
from delta_jax.evaluation import harness
from delta_jax.evaluation.harness.conventions import Conventions, conventions
from delta_jax.models import LanguageModel
from delta_jax.training import restore_model
from tests.conftest import users_call
from tests.evaluation.plain import next_logits, plain_score

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
mixer = "gated_delta_net"
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

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
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
def results(run):
    """Of all three tasks, with what the model answered to every request."""
    names, options = ["fox_choice", "fox_rolling", "fox_generation"], {"log_samples": True, "bootstrap_iters": 0}
    lm = harness.load_lm(run, batch_size=4, max_length=LENGTH)
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
