"""Needles in a haystack: oracle, chance, texts, where needles stand, what is asked."""

import re

import numpy as np
import pytest
from promises import check_promises, close

from delta_jax.config import to_dict
from delta_jax.data import ByteTokenizer
from delta_jax.data.tasks import Needles
from delta_jax.data.tasks.examples import IGNORED
from delta_jax.data.tasks.words import ADJECTIVES, NOUNS

DOCUMENTS = tuple(
    f"Chapter {chapter} begins. "
    + " ".join(f"Line {line} of it, caf\u00e9 {chapter * line}! Is it {line * 7}?" for line in range(30))
    + "\n\nAnd so it ends."
    for chapter in range(8)
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = re.compile(r"One of the special magic (?:number|uuid)s for (\w+-\w+) is: ([0-9a-f-]+)\.[ \n]")
ASKED = re.compile(r"(?:number|uuid) for (\w+-\w+) mentioned")
SHORT = {"opening": "", "needle": "{key}={value};", "question": "{key}?"}


def text_of(row):
    assert row[0] == 256
    return ByteTokenizer().decode_bytes(row).decode(errors="replace")


def reader(task, row):
    text = text_of(row)
    if task.opening:
        values, wanted = dict(NEEDLE.findall(text)), ASKED.findall(text)[-1]
    else:
        values, wanted = dict(re.findall(r"(\w+-\w+)=([0-9a-f-]+);", text)), re.findall(r"(\w+-\w+)\?", text)[-1]
    value = values[wanted]
    fixed = [8, 13, 14, 18, 23] if task.uuids else []
    answer = [IGNORED if place in fixed else ord(digit) for place, digit in enumerate(value)]
    return [IGNORED] * (len(row) - len(answer)) + answer


def digits_guess(rng, examples):
    """Guesses as one knows them: hexadecimal where a UUID stands, else decimal with no leading zero."""
    asked = examples.targets != IGNORED
    letters = np.frombuffer(b"123456789", np.uint8)
    guess = rng.integers(ord("0"), ord("9") + 1, examples.targets.shape)
    if examples.targets.max() > ord("9"):
        letters = np.frombuffer(b"0123456789abcdef", np.uint8)
        guess = rng.choice(letters, examples.targets.shape)
        guess[:, -17] = rng.choice(np.frombuffer(b"89ab", np.uint8), len(guess))
    first = (np.arange(len(guess)), asked.argmax(axis=1))
    guess[first] = rng.choice(letters, len(guess))
    return guess


@pytest.mark.parametrize(
    "task",
    [
        Needles(haystack_bytes=300),
        Needles(haystack_bytes=2000, needles=5, digits=3),
        Needles(haystack_bytes=500, haystack="needles", digits=4),
        Needles(haystack_bytes=500, haystack="text", documents=DOCUMENTS),
        Needles(haystack_bytes=500, haystack="text", documents=DOCUMENTS, needles=4, uuids=True),
        Needles(haystack_bytes=64, haystack="needles", digits=1, **SHORT),
    ],
    ids=lambda task: f"{task.haystack}-{task.needles}-{task.length}",
)
def test_promises(task):
    check_promises(task, reader, digits_guess)


def test_the_passkey_text():
    task = Needles(haystack_bytes=3 * len(NOISE), digits=7)
    row = task.sample(np.random.default_rng(0), 1, "train").inputs[0]
    [(key, value)] = NEEDLE.findall(text_of(row))
    lines = text_of(row).split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    needle = f"One of the special magic numbers for {key} is: {value}."
    assert sorted(lines[1:-1]) == sorted([needle, *[NOISE[:-1]] * 3])
    assert lines[-1] == (
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is {value[:-1]}"
    )
    assert len(value) == 7 and value[0] != "0"


def test_needles_stand_before_any_line():
    task = Needles(haystack_bytes=5 * len(NOISE), needles=2, digits=2)
    starts = np.zeros((5, 5))
    for row in task.sample(np.random.default_rng(0), 1500, "train").inputs:
        lines = text_of(row).split("\n")[1:-1]
        one, two = (place for place, line in enumerate(lines) if line.startswith("One of"))
        starts[one, two - 1] += 1
    assert close(starts[np.triu_indices(5, 1)], np.full(10, 0.1)) and starts[np.tril_indices(5)].sum() == 0


def test_text_is_left_as_it_is_and_needles_stand_between_sentences():
    task = Needles(haystack_bytes=600, haystack="text", documents=DOCUMENTS, needles=3)
    whole, depths = "\n".join(DOCUMENTS), []
    opening = len(task.opening.format(kind="number"))
    for row in task.sample(np.random.default_rng(0), 400, "test").inputs:
        context = text_of(row)[opening:].rpartition("\nWhat is")[0]
        places = [match.start() for match in NEEDLE.finditer(context)]
        assert all(place == 0 or re.search(r"([.!?]|\n)\s*$", context[:place]) for place in places)
        hay = NEEDLE.sub("", context)
        assert hay.rstrip("\ufffd") in whole and len(hay.encode()) in (599, 601)  # a character may be cut
        depths.append([len(NEEDLE.sub("", context[:place])) / len(hay) for place in places])
    # Depths are spread evenly; the move back to a sentence's start takes half a sentence, 20 of 600 bytes.
    middles = np.mean(depths, axis=0)
    np.testing.assert_allclose(middles, np.array([0.25, 0.5, 0.75]) - 0.02, atol=0.035)


def test_names_and_values():
    task = Needles(haystack="needles", haystack_bytes=700, digits=3)
    found = [NEEDLE.findall(text_of(row)) for row in task.sample(np.random.default_rng(0), 800, "train").inputs]
    assert {len(pairs) for pairs in found} == {
        700 // len("One of the special magic numbers for green-apple is: 123.\n")
    }
    assert all(len({key for key, _ in pairs}) == len(pairs) for pairs in found)
    first, second = zip(*(key.split("-") for pairs in found for key, _ in pairs), strict=True)
    assert set(first) == set(ADJECTIVES) and set(second) == set(NOUNS)
    values = np.array([[*value] for pairs in found for _, value in pairs], int)
    assert close(np.bincount(values[:, 0], minlength=10), np.array([0] + [1] * 9) / 9)
    assert close(np.bincount(values[:, 1:].ravel(), minlength=10), np.full(10, 0.1))


def test_any_needle_may_be_asked_for():
    task = Needles(needles=4, haystack_bytes=900, digits=2)
    asked = np.zeros(4)
    for row in task.sample(np.random.default_rng(0), 800, "train").inputs:
        keys = [key for key, _ in NEEDLE.findall(text_of(row))]
        asked[keys.index(ASKED.findall(text_of(row))[-1])] += 1
    assert close(asked, np.full(4, 0.25))


def test_uuids():
    task = Needles(uuids=True, haystack_bytes=200)
    examples = task.sample(np.random.default_rng(0), 400, "train")
    values = [value for row in examples.inputs for _, value in NEEDLE.findall(text_of(row))]
    form = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    assert len(values) == 400 and all(form.fullmatch(value) for value in values)
    assert close(np.unique([value[19] for value in values], return_counts=True)[1], np.full(4, 0.25))
    assert close(np.unique([value[0] for value in values], return_counts=True)[1], np.full(16, 1 / 16))
    assert ((examples.targets != IGNORED).sum(axis=1) == 31).all()


def test_words_are_of_one_size_and_different():
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) == 64 and {len(word) for word in words} == {5}
    assert not set(ADJECTIVES) & set(NOUNS)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"haystack": "essays"}, "haystack"),
        ({"haystack_bytes": 0}, "haystack_bytes"),
        ({"haystack_bytes": 180, "needles": 3}, "needles must be at most 2"),
        ({"digits": 0}, "digits"),
        ({"haystack": "text"}, "documents"),
        ({"documents": DOCUMENTS}, "documents"),
        ({"haystack": "text", "documents": ("Too short.",)}, "haystack_bytes"),
        ({"haystack": "text", "documents": DOCUMENTS, "needles": 41}, "needles"),
        ({"haystack": "needles", "haystack_bytes": 20}, "haystack_bytes"),
        ({"haystack": "needles", "haystack_bytes": 400_000}, "haystack_bytes"),
        ({"needle": "{key} is it."}, "needle"),
        ({"question": "What now?"}, "question"),
        ({"opening": "{wrong}"}, "opening"),
        ({"opening": "{key}"}, "opening"),
        ({"needle": "{key} {value} {"}, "needle"),
    ],
)
def test_refusals(options, named):
    with pytest.raises(ValueError) as error:
        Needles(**options)
    assert named in str(error.value)


def test_a_file_of_results_names_the_documents_by_digest():
    table = to_dict(Needles(haystack_bytes=500, haystack="text", documents=DOCUMENTS))
    other = to_dict(Needles(haystack_bytes=500, haystack="text", documents=(*DOCUMENTS, "More.")))
    assert table["documents"][0] == len("\n".join(DOCUMENTS).encode())
    assert {name: value for name, value in table.items() if name != "documents"} == {
        name: value for name, value in other.items() if name != "documents"
    }
    assert table["documents"] != other["documents"]
    assert len(str(table)) < 1000
