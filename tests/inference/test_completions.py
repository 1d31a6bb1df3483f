"""Many prompts come out in their order, whatever the batches, and a file of them goes on where it stopped."""

import json

import jax
import pytest

from delta_jax.inference import Completion, complete, generate, stream
from delta_jax.inference.generate import _decode
from delta_jax.inference.reading import _read
from delta_jax.inference.records import Results, read_records
from tests.inference.conftest import make

PROMPTS = [[1 + (7 * n + i) % 38 for i in range(9 + (5 * n) % 8)] for n in range(11)]
OPTIONS = {"max_new_tokens": 5, "temperature": 1.0, "key": jax.random.key(1)}


@pytest.fixture(scope="module")
def model():
    return make("delta_net")


def test_batches_by_length_give_what_one_batch_gives_in_order(model, syllables):
    wanted = [[[], [], []] for _ in range(0, len(PROMPTS), 3)]
    for first in range(0, 9, 3):
        for pieces in stream(model, PROMPTS[first : first + 3], streams=range(first, first + 3), **OPTIONS):
            wanted[first // 3] = [row + piece.tokens for row, piece in zip(wanted[first // 3], pieces, strict=True)]
    options = OPTIONS | {"tokenizer": syllables}
    found = list(complete(model, PROMPTS, batch_size=3, **options))
    assert [one.tokens for (one,) in found][:9] == [row for rows in wanted[:3] for row in rows]
    assert len(found) == len(PROMPTS)
    assert all(one.text == syllables.decode(one.tokens) for (one,) in found)
    assert {one.finish_reason for (one,) in found} == {"length"}
    counts = _read._cache_size(), _decode._cache_size()
    assert list(complete(model, PROMPTS, batch_size=3, first=8, **options)) == found[8:]
    assert list(complete(model, PROMPTS[:10], batch_size=3, **options)) == found[:10]
    assert (_read._cache_size(), _decode._cache_size()) == counts
    assert list(complete(model, PROMPTS, batch_size=3, first=11, **options)) == []


def test_samples(model):
    wanted = generate(model, PROMPTS[:2], samples=2, **OPTIONS)
    found = list(complete(model, PROMPTS[:3], batch_size=2, samples=2, **OPTIONS))
    assert [[one.tokens for one in rows] for rows in found][:2] == wanted
    assert [len(rows) for rows in found] == [2] * 3


def test_what_is_ready_comes_before_the_rest_is_begun(model):
    before = next(complete(model, [*PROMPTS[:2], *PROMPTS * 20], batch_size=3, **OPTIONS))
    assert before == next(complete(model, PROMPTS[:3], batch_size=3, **OPTIONS))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"first": -1}, "first"),
        ({"samples": 0}, "samples"),
        ({"top_k": 0}, "top_k"),
        ({"streams": [1]}, "streams must be integers, one for each of 11 prompts"),
    ],
)
def test_mistakes_are_named_at_once(model, options, words):
    with pytest.raises(ValueError, match=words):
        complete(model, PROMPTS, **OPTIONS | options)


def test_records():
    text = '\ufeff{"prompt": "a", "id": 3}\n\n{"messages": [{"role": "user", "content": "b"}]}\r\n'
    assert read_records(text, "file") == [{"prompt": "a", "id": 3}, {"messages": [{"role": "user", "content": "b"}]}]
    for line, words in (
        ("{", "line 2 of file is not JSON"),
        ('{"prompt": NaN}', "line 2 of file is not JSON: NaN is no number"),
        ("[]", "line 2 of file should be an object"),
        ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ('{"id": 1}', 'either "prompt" or "messages"'),
        ('{"prompt": 1}', '"prompt" should be a text'),
        ('{"messages": "a"}', '"messages" should be a list of objects'),
        ('{"prompt": "a", "completions": 1}', 'has "completions"'),
    ):
        with pytest.raises(ValueError, match=words):
            read_records(f'{{"prompt": "a"}}\n{line}\n', "file")
    with pytest.raises(ValueError, match="file holds no prompt"):
        read_records("\n", "file")


RECORDS = [{"prompt": "a", "id": 3}, {"prompt": "\u65e5\ud800", "x": None}, {"prompt": "c"}]
TOKENS = [[1], [2, 3], [4]]
DONE = [[Completion(f"t\n{n}", [7] * n, "length")] for n in range(3)]


def results(path, records=RECORDS, tokens=TOKENS, options=("x",)):
    return Results(str(path), records, tokens, list(options))


def test_results_go_on_where_they_stopped(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    with results(whole) as all_of_them:
        for row in DONE:
            all_of_them.write(row)
    lines = whole.read_bytes().splitlines(keepends=True)
    first = json.loads(lines[0])
    assert first.pop("made_by")
    assert first == RECORDS[0] | {"completions": [{"text": "t\n0", "tokens": 0, "finish_reason": "length"}]}
    for size in range(0, len(whole.read_bytes()), 30):
        part.write_bytes(whole.read_bytes()[:size])
        again = results(part)
        assert again.done == whole.read_bytes()[:size].count(b"\n")
        with again:
            for row in DONE[again.done :]:
                again.write(row)
        assert part.read_bytes() == whole.read_bytes()
    assert results(whole).done == 3


def test_results_of_something_else_are_left_alone(tmp_path):
    path = tmp_path / "results"
    with results(path) as first:
        first.write(DONE[0])
    there = path.read_bytes()
    for changes, words in (
        ({"options": ("y",)}, "line 1 of .* was made with other options or another model; name another file"),
        ({"tokens": [[9], *TOKENS[1:]]}, "was made with other options"),
        ({"records": [{"prompt": "a", "id": 4}, *RECORDS[1:]]}, "line 1 of .* is no completion of prompt 1"),
    ):
        with pytest.raises(ValueError, match=words):
            results(path, **changes)
    path.write_bytes(there + b"text\n")
    with pytest.raises(ValueError, match=r"line 2 of .* is no completion of prompt 2"):
        results(path)
    for rest in (b"notes without a line's end", there[:-1]):
        path.write_bytes(there + rest)
        with pytest.raises(ValueError, match=r"line 2 of .* is no completion of prompt 2"):
            results(path)
    path.write_bytes(there * 2)
    with pytest.raises(ValueError, match=r"line 2 of .* is no completion of prompt 2"):
        results(path, records=RECORDS[:1], tokens=TOKENS[:1])
    with pytest.raises(ValueError, match=r"output: .* cannot be read"):
        results(tmp_path)
    with pytest.raises(ValueError, match=r"output: .* cannot be written"):
        results(tmp_path / "no" / "folder").__enter__()
