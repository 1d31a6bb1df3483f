"""Prompts with completions and conversations: what is learnt, whole in a row, from every format, resumable anywhere."""

import dataclasses
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from delta_jax.data import (
    ChatTemplate,
    DataConfig,
    DataError,
    bigram_bits_per_byte,
    differences,
    fingerprint,
    load_documents,
    load_tokenizer,
    train_batches,
    validation_batches,
    validation_bytes,
)
from delta_jax.data.examples import TOO_LONG, _turns, encode_chat, encoder

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# A later turn takes the thoughts out of an earlier one, and the last one always has some; no turn at all is refused.
THINKING = """{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant
{% if loop.last %}<think>
{{ message.thoughts }}
</think>
{% endif %}{% else %}<|im_start|>{{ messages[0].role and message.role }}
{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if not messages %}{{ raise_exception('no turn') }}{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "hé <|im_end|>?"},
    {"role": "assistant", "content": "öne"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "two <|im_start|> three"},
]


def write(file, records):
    file.write_text("\n".join(map(json.dumps, records)))
    return str(file)


@pytest.fixture
def pairs(tmp_path):
    """Of prompts and completions of 0 to 30 bytes."""
    draws = np.random.default_rng(3)
    texts = ["".join(draws.choice(list("abcé"), draws.integers(0, 30))) for _ in range(60)]
    records = [{"n": n, "prompt": f"{n}?{texts[2 * n]}", "completion": texts[2 * n + 1]} for n in range(30)]
    path = write(tmp_path / "pairs.jsonl", records)
    return DataConfig(path=path, records="completion", validation_fraction=0.2, shuffle_rows=4), records


@pytest.fixture
def chat(tmp_path, write_tokenizer):
    """A function template -> configuration of conversations of that template."""

    def make(template=CHATML, records=({"messages": TURNS}, {"messages": TURNS[1:3]})):
        tokenizer = write_tokenizer("user assistant system one two three more s h", SPECIAL)
        (tmp_path / "chat_template.jinja").write_text(template)
        path = write(tmp_path / "chat.jsonl", records)
        return DataConfig(path=path, records="messages", tokenizer=tokenizer, validation_fraction=0.5)

    return make


def test_the_completion_alone_is_learnt(pairs):
    config, records = pairs
    tokens = encoder(config, 200)(load_documents(config)[0], "here")
    prompt, completion = records[0]["prompt"].encode(), records[0]["completion"].encode()
    assert tokens[0].tolist() == [256, *prompt, *completion, 256]
    assert tokens[2].tolist() == [0] * (1 + len(prompt)) + [1] * (len(completion) + 1)
    assert tokens[1].tolist() == [0] * (1 + len(prompt)) + [1] * len(completion) + [0]


def test_rows_hold_examples_whole_and_each_once(pairs):
    config, records = pairs
    batches = list(validation_batches(config, batch_size=2, sequence_length=160, part="all"))
    found = []
    for row in range(2 * len(batches)):
        batch = {name: array[row % 2] for name, array in batches[row // 2].items()}
        for segment in range(1, batch["segment_ids"].max() + 1):
            here = batch["segment_ids"] == segment
            ids = np.append(batch["inputs"][here], batch["targets"][here][-1])
            learnt = batch["targets"][here][batch["mask"][here] > 0]
            np.testing.assert_array_equal(ids[-len(learnt) :], learnt)
            found.append((bytes(ids[1 : -len(learnt)].tolist()), bytes(learnt[:-1].tolist())))
            assert batch["bytes"][here].sum() == len(learnt) - 1
        assert not batch["mask"][batch["segment_ids"] == 0].any()
    assert sorted(found) == sorted((record["prompt"].encode(), record["completion"].encode()) for record in records)


def test_resume_is_exact_and_what_is_cut_away_is_counted(pairs):
    config, _ = pairs
    sizes = {"batch_size": 2, "sequence_length": 24}
    stream = train_batches(config, **sizes)
    batches, states = [], [stream.get_state()]
    for _ in range(30):
        batches.append(next(stream))
        states.append(json.loads(json.dumps(stream.get_state())))
    stream.close()
    assert set(stream.skipped) == {TOO_LONG}
    documents, make = load_documents(config), encoder(config, 24)
    too_long = sum(isinstance(make(documents[n], ""), str) for n in range(30))
    assert 0 < stream.skipped[TOO_LONG] <= too_long
    for taken in (1, 7, 20):
        other = train_batches(config, **sizes)
        other.set_state(states[taken])
        np.testing.assert_equal([next(other) for _ in range(5)], batches[taken : taken + 5])
        other.close()


def test_every_format_holds_the_same(tmp_path, pairs):
    config, records = pairs
    chats = [{"messages": TURNS}, {"messages": [{**TURNS[1], "name": "x"}, TURNS[2]]}]
    for kind, rows in (("completion", records), ("messages", chats)):
        folder = tmp_path / kind
        folder.mkdir()
        write(folder / "a.jsonl", rows)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
        writer = ArrayRecordWriter(str(folder / "a.arrayrecord"), "group_size:1")
        for row in rows:
            writer.write(json.dumps(row).encode())
        writer.close()
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        files = ("a.jsonl", "a.parquet", "a.arrayrecord", "saved")
        first, *others = [
            list(load_documents(dataclasses.replace(config, path=str(folder / name), records=kind))) for name in files
        ]
        assert len(first) == len(rows) and [first] * 3 == others
        field = "prompt" if kind == "completion" else kind
        assert json.loads(first[1])[field] == rows[1][field]


def learnt(config, length=400, number=0):
    """What the tokenizer makes of the learnt tokens and of all, specials named."""
    tokens = encoder(config, length)(load_documents(config)[number], "here")
    library = load_tokenizer(config.tokenizer)._tokenizer

    def text(ids):
        return library.decode(ids.tolist(), skip_special_tokens=False).replace("\ufdd0", "")

    return text(tokens[0][tokens[2] > 0]), text(tokens[0]), tokens


def test_turns_of_the_assistant_alone_are_learnt_with_the_token_that_ends_them(chat):
    config = chat()
    answers, whole, tokens = learnt(config)
    assert answers == "öne<|im_end|>\ntwo <|im_start|> three<|im_end|>\n"
    assert whole == ChatTemplate(source=CHATML).render(TURNS)
    ends = load_tokenizer(config.tokenizer)._tokenizer.token_to_id("\ufdd0<|im_end|>")
    assert (tokens[0] == ends).sum() == len(TURNS)  # what the user wrote is text
    assert tokens[1].sum() == len("öne\ntwo <|im_start|> three\n".encode())


def test_a_conversation_is_made_tokens_of_as_for_generation(chat):
    config = chat()
    tokenizer, template = load_tokenizer(config.tokenizer), ChatTemplate(source=CHATML)
    prompt = encode_chat(tokenizer, template, TURNS[:2], add_generation_prompt=True)
    _, _, tokens = learnt(config)
    np.testing.assert_array_equal(tokens[0][: len(prompt)], prompt)
    assert tokens[2][: len(prompt)].sum() == 0 and tokens[2][len(prompt)] == 1


def test_a_template_that_writes_earlier_turns_otherwise(chat):
    turns = [{**turn, "thoughts": f"about {turn['content']}"} for turn in TURNS]
    answers, whole, _ = learnt(chat(THINKING, [{"messages": turns}] * 2))
    assert "öne<|im_end|>\n<think>" in answers and whole.count("<think>") == 1
    assert answers == (
        "öne<|im_end|>\n<think>\nabout two <|im_start|> three\n</think>\ntwo <|im_start|> three<|im_end|>\n"
    )
    # The assistant begins, and the template refuses to write nothing.
    _, spans = _turns(ChatTemplate(source=THINKING), [{"role": "assistant", "content": "hi"}])
    assert spans[0][0] == 0


def test_a_turn_that_is_not_found_is_a_fault(chat):
    config = chat("{% for message in messages %}{{ message.content | upper }}{{ loop.last }}{% endfor %}")
    with pytest.raises(DataError, match="writes turn 2, of the assistant, so that it is not found"):
        encoder(config, 100)(load_documents(config)[0], "here")


def test_a_conversation_is_cut_at_its_end_and_left_out_where_nothing_to_learn_is_left(chat):
    config = chat()
    *_, tokens = learnt(config)
    first = int(np.flatnonzero(tokens[2])[0])
    make, text = encoder(config, first), load_documents(config)[0]
    np.testing.assert_array_equal(make(text, "here"), tokens[:, : first + 1])
    assert encoder(config, first - 1)(text, "here") == TOO_LONG


def test_the_day_is_always_the_same(chat):
    config = chat("{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert learnt(config)[1].startswith("01 Jan 2025<|im_start|>")


def test_the_chat_template_is_part_of_the_fingerprint(chat):
    before, after = fingerprint(chat()), fingerprint(chat(CHATML + " "))
    assert differences(before, before) == []
    assert differences(before, after) == ["the chat template is another than before"]


@pytest.mark.parametrize(
    ("kind", "record", "said"),
    [
        ("completion", {"prompt": "a"}, "has no field 'completion'; it has prompt"),
        ("completion", {"prompt": "a", "completion": None}, "field 'completion' holds null"),
        ("completion", {"prompt": ["a"], "completion": "b"}, "field 'prompt' holds a list"),
        ("messages", {"messages": "hello"}, "holds no list of turns"),
        ("messages", {"messages": []}, "holds no list of turns"),
        ("messages", {"messages": [{"content": "a"}]}, "turn 0 is no object with a role"),
        ("messages", {"messages": TURNS[:2]}, "no turn is the assistant's"),
        ("messages", {"messages": [{"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_a_record_that_holds_something_else_is_named(tmp_path, kind, record, said):
    path = write(tmp_path / "bad.jsonl", [record, record])
    with pytest.raises(DataError) as error:
        load_documents(DataConfig(path=path, records=kind))
    assert said in str(error.value) and "bad.jsonl, line 1" in str(error.value)


def test_what_does_not_go_together_is_one_sentence(tmp_path, pairs):
    config, _ = pairs
    with pytest.raises(ValueError, match=r"data\.records: messages are written by a chat template"):
        train_batches(dataclasses.replace(config, records="messages"), batch_size=1, sequence_length=8)
    with pytest.raises(DataError, match=r"data\.records: 'stdlib' is plain text, which holds no messages"):
        load_documents(DataConfig(records="messages"))
    with pytest.raises(ValueError, match="records must be one of text, completion, messages"):
        DataConfig(records="chat")
    for measure in (validation_bytes, bigram_bits_per_byte):
        with pytest.raises(ValueError, match=r"data\.records: wanted text, got completion"):
            measure(config)
