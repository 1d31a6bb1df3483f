"""What corpora hold that is no text: each fault is one sentence with file and place, or is left out and counted."""

import collections
import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from delta_jax.data import (
    DataConfig,
    DataError,
    load_documents,
    split,
    train_batches,
    validation_batches,
    validation_bytes,
)

GOOD = [f"document {number}" for number in range(40)]

# A line of a JSONL file, or a record, with what is said of it and the kind it is counted as.
BAD_JSON = {
    rb'{"text": "half an emoji \ud83d here"}': ("character 14 is U\\+D83D, half of a surrogate pair", "lone surrogate"),
    rb'{"text": "\udc00"}': ("character 0 is U\\+DC00", "lone surrogate"),
    b'{"text": null}': ("field 'text' holds null, not text", "null"),
    b'{"text": 3}': ("field 'text' holds a number, not text", "not text"),
    b'{"text": ["a"]}': ("field 'text' holds a list, not text", "not text"),
    b'{"text": true}': ("field 'text' holds a boolean, not text", "not text"),
    b'{"body": "a"}': ("has no field 'text'; it has body", "no text field"),
    b"{}": ("has no field 'text'; it has none", "no text field"),
    b'["text"]': ("not a JSON object but a list", "not an object"),
    b'"text"': ("not a JSON object but a string", "not an object"),
    b"17": ("not a JSON object but a number", "not an object"),
    b"null": ("not a JSON object but null", "not an object"),
    b'{"text": "cut o': ("not a JSON object \\(Unterminated string starting at column 10\\)", "not JSON"),
    b'{"text": "a"}{"text": "b"}': ("not a JSON object \\(Extra data at column 14\\)", "not JSON"),
    b'{"text": "\x00"}': ("not a JSON object \\(Invalid control character at column 11\\)", "not JSON"),
    b"\x00\x00\x00": ("not a JSON object \\(Expecting value at column 1\\)", "not JSON"),
    b"[" * 100_000: ("not a JSON object that can be read", "not JSON"),
    b"9" * 5000: ("not a JSON object that can be read", "not JSON"),
    b'{"text": "caf\xe9"}': ("not UTF-8 text", "not UTF-8"),
    b"\xff\xfe{\x00}\x00": ("not UTF-8 text; it begins like UTF-16", "not UTF-8"),
    b"\x1f\x8b\x08\x00\xc3\xc3": ("not UTF-8 text; it begins like gzip", "not UTF-8"),
}


def config_of(path, **options):
    return DataConfig(**{"path": str(path), "validation_fraction": 0.3, "shuffle_rows": 4} | options)


def fault(documents, index):
    """What is said of a document."""
    with pytest.raises(DataError) as caught:
        documents[index]
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence, caught.value.kind


def lines_of(texts):
    return [json.dumps({"text": text}).encode() for text in texts]


def write_records(file, records):
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return file


def strings(values):
    """An Arrow column of strings whose bytes nobody has looked at; None is null."""
    binary = pyarrow.array(values, pyarrow.binary())
    return pyarrow.StringArray.from_buffers(len(binary), binary.buffers()[1], binary.buffers()[2], binary.buffers()[0])


def write_parquet(file, values, **options):
    pyarrow.parquet.write_table(pyarrow.table({"text": strings(values)}), file, **options)
    return file


def every_text(config):
    """All documents of both sides."""
    return sorted(part[index] for part in split(config) for index in range(len(part)))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def skipped_in_training(config, length=32):
    """The counts after more than an epoch."""
    batches = train_batches(config, batch_size=2, sequence_length=length)
    take(batches, 24)
    return batches.skipped


@pytest.mark.parametrize("form", ["jsonl", "arrayrecord"])
def test_a_bad_json_document_is_named_or_left_out_and_counted(tmp_path, form):
    records = [line for pair in itertools.zip_longest(lines_of(GOOD), BAD_JSON) for line in pair if line]
    if form == "jsonl":
        file, place, first = tmp_path / "corpus.jsonl", "line", 1
        file.write_bytes(b"\n".join(records))
    else:
        file, place, first = write_records(tmp_path / "corpus.array_record", records), "record", 0
    documents = load_documents(config_of(file))
    for index, record in enumerate(records):
        if record in BAD_JSON:
            problem, kind = BAD_JSON[record]
            sentence, found = fault(documents, index)
            assert found == kind
            assert f"{file}, {place} {index + first}" in sentence
            with pytest.raises(DataError, match=problem):
                documents[index]
    skip = config_of(file, on_error="skip")
    assert every_text(skip) == sorted(GOOD)
    assert skipped_in_training(skip) == collections.Counter(kind for _, kind in BAD_JSON.values())
    with pytest.raises(DataError, match=rf"corpus\.\w+, {place} \d+"):
        split(config_of(file))


def test_blank_lines_byte_order_marks_and_windows_line_ends_read_right(tmp_path):
    file, bom = tmp_path / "a.jsonl", b"\xef\xbb\xbf"
    lines = [
        bom + b'{"text": "one\\r\\n"}',
        b"",
        b"   ",
        b"\t \x0b",
        bom,
        b"\xc2\xa0",
        b' {"text": "\\ufefftwo"} ',
        bom + b'{"text": ""}',
    ]
    for end in (b"\n", b"\r\n"):
        file.write_bytes(end.join([*lines, b'{"text": "\\u0000 and\\ttabs"}', b" ", b'{"text": 1}']))
        documents = load_documents(config_of(file))
        assert [documents[index] for index in range(4)] == ["one\r\n", "two", "", "\0 and\ttabs"]
        assert len(documents) == 5
        assert "line 11: field" in fault(documents, 4)[0]


def test_lines_at_the_edges_of_the_blocks_of_the_scan(tmp_path):
    """Blocks are 2^24 bytes: the second begins with a line, with a line end and inside a line."""
    for shift in (-1, 0, 1):
        first = json.dumps({"text": "x" * ((1 << 24) - 13 + shift)}).encode()
        (tmp_path / "big.jsonl").write_bytes(first + b'\n{"text": "b"}\n\n{"text": 5}\n')
        documents = load_documents(config_of(tmp_path / "big.jsonl"))
        assert len(documents) == 3 and documents[1] == "b" and len(documents[0]) == (1 << 24) - 13 + shift
        assert "line 4: field" in fault(documents, 2)[0]


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\0two\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "c.txt").write_bytes(b"fine\r\nfine\r\ncaf\xe9\n")
    (tmp_path / "d.txt").write_bytes("UTF-16".encode("utf-16"))
    (tmp_path / "e.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "f.txt").write_text("more")
    documents = load_documents(config_of(tmp_path, on_error="skip"))
    assert [documents[index] for index in (0, 1, 5)] == ["one\r\n\0two\n", "", "more"]
    assert fault(documents, 2) == (f"data.path: {tmp_path / 'c.txt'}, line 3: not UTF-8 text.", "not UTF-8")
    assert "d.txt, line 1: not UTF-8 text; it begins like UTF-16" in fault(documents, 3)[0]
    assert "e.txt cannot be read: No such file or directory" in fault(documents, 4)[0]
    with pytest.raises(DataError, match=r"e\.txt cannot be read"):
        load_documents(config_of(tmp_path))
    for number in range(20):
        (tmp_path / f"g{number}.txt").write_text(f"{number}")
    skip = config_of(tmp_path, on_error="skip")
    assert every_text(skip) == sorted(["one\r\n\0two\n", "more", *map(str, range(20))])
    assert skipped_in_training(skip) == {"not UTF-8": 2, "unreadable": 1}


@pytest.mark.filterwarnings("ignore")  # of datasets, while it is imported
@pytest.mark.parametrize("form", ["parquet", "huggingface"])
def test_a_bad_row_is_named_or_left_out_and_counted(tmp_path, form):
    values = [text.encode() for text in GOOD]
    values[3:3] = [
        b"caf\xe9",
        None,
        b"\xef\xbb\xbfmarked",
        b"\xed\xa0\xbd",
    ]  # the last: a surrogate, as if it were UTF-8
    path = tmp_path / "rows.parquet"
    if form == "parquet":
        write_parquet(path, values, row_group_size=4)
    else:
        import datasets

        path = tmp_path / "rows"
        datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table({"text": strings(values)}))).save_to_disk(path)
    documents = load_documents(config_of(path))
    assert documents[5] == "marked"
    assert fault(documents, 3) == (f"data.path: {path}, row 3: not UTF-8 text.", "not UTF-8")
    assert fault(documents, 4) == (f"data.text_field: {path}, row 4: field 'text' holds null, not text.", "null")
    assert fault(documents, 6) == (f"data.path: {path}, row 6: not UTF-8 text.", "not UTF-8")
    skip = config_of(path, on_error="skip")
    assert every_text(skip) == sorted([*GOOD, "marked"])
    assert skipped_in_training(skip) == {"not UTF-8": 2, "null": 1}
    column = pyarrow.table({"text": pyarrow.array([[1]] * 9)})
    pyarrow.parquet.write_table(column, tmp_path / "lists.parquet")
    with pytest.raises(DataError, match=r"lists\.parquet, row 0: field 'text' holds a list, not text"):
        load_documents(config_of(tmp_path / "lists.parquet"))


def test_cut_off_and_damaged_files(tmp_path):
    generator = np.random.default_rng(0)
    long = ["".join(map(chr, generator.integers(97, 123, 3000))) for _ in range(40)]
    for name in "ab":
        texts = [text.encode() for text in long]
        write_parquet(tmp_path / f"{name}.parquet", texts, row_group_size=10, write_page_checksum=True)
    whole = (tmp_path / "b.parquet").read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 3):
        (tmp_path / "b.parquet").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"b\.parquet is not a readable Parquet file: .*\.$"):
            load_documents(config_of(tmp_path))
    skip = config_of(tmp_path, on_error="skip")
    assert every_text(skip) == sorted(long)
    assert skipped_in_training(skip, length=4096) == {"unreadable": 1}
    damaged = bytearray(whole)
    damaged[2000:4000] = bytes(2000)
    (tmp_path / "b.parquet").write_bytes(damaged)
    documents = load_documents(config_of(tmp_path / "b.parquet", on_error="skip"))
    assert documents[10] == long[10]
    assert "b.parquet, row 9: its row group cannot be read: " in fault(documents, 9)[0]


def test_cut_off_and_damaged_records(tmp_path):
    generator = np.random.default_rng(0)
    records = ["".join(map(chr, generator.integers(97, 123, 1500))) for _ in range(60)]
    file = write_records(tmp_path / "a.array_record", [record.encode() for record in records])
    whole = file.read_bytes()
    for cut in (0, 10, len(whole) // 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a\.array_record is not a readable ArrayRecord: .*\.$"):
            load_documents(config_of(file))
    damaged = bytearray(whole)
    damaged[20_000:20_100] = bytes(100)
    file.write_bytes(damaged)
    documents = load_documents(config_of(file))
    faults = [index for index in range(60) if _raises(documents, index)]
    assert 0 < len(faults) < 30
    assert f"{file}, record {faults[0]} cannot be read: " in fault(documents, faults[0])[0]
    skip = config_of(file, on_error="skip")
    assert every_text(skip) == sorted(text for index, text in enumerate(records) if index not in faults)


def _raises(documents, index):
    try:
        documents[index]
    except DataError:
        return True
    return False


@pytest.mark.filterwarnings("ignore")  # of datasets, while it is imported
def test_a_cut_off_arrow_file_is_named(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": GOOD}).save_to_disk(str(tmp_path / "rows"), num_shards=2)
    (file,) = (tmp_path / "rows").glob("*1-of*.arrow")
    whole = file.read_bytes()
    for cut in (0, 10, len(whole) // 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"{file.name} is not a readable Arrow file: .*\.$"):
            load_documents(config_of(tmp_path / "rows"))
    file.unlink()
    with pytest.raises(DataError, match="rows is not a Hugging Face dataset saved on disk: "):
        load_documents(config_of(tmp_path / "rows"))


def test_records_are_json_though_the_first_is_cut_off(tmp_path):
    records = [b'{"text": "cut o', *lines_of(GOOD[:5])]
    skip = config_of(write_records(tmp_path / "a.array_record", records), on_error="skip")
    assert every_text(skip) == GOOD[:5]
    with pytest.raises(DataError, match=r"a\.array_record, record 0: not a JSON object"):
        load_documents(config_of(tmp_path / "a.array_record"))


def test_compressed_files_are_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is compressed; .*decompress it\.$"):
        load_documents(config_of(tmp_path))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz, line 1: not UTF-8 text; it begins like gzip\.$|not a JSON"):
        load_documents(config_of(tmp_path / "a.jsonl.gz", format="jsonl"))


def test_no_document_with_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    for make in (split, lambda config: validation_batches(config, batch_size=1, sequence_length=8)):
        with pytest.raises(DataError, match=r"the corpus at .*a\.jsonl' holds no document with text\.$"):
            make(config_of(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(b"  \n\t\r\n\xef\xbb\xbf")
    with pytest.raises(DataError, match="is empty: it holds no document"):
        split(config_of(tmp_path / "a.jsonl"))


def test_nothing_but_faults(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([b'{"body": "x"}'] * 3 + [b'{"text": null}', b'{"text": ""}']))
    for make in (split, lambda config: train_batches(config, batch_size=1, sequence_length=8)):
        with pytest.raises(DataError) as caught:
            make(config_of(file, on_error="skip"))
        assert str(caught.value) == (
            f"data.path: the corpus at '{file}' holds no document with text (left out: 3 no text field, 1 null; the "
            f"first: data.text_field: {file}, line 1 has no field 'text'; it has body)."
        )


def test_what_is_left_out_survives_a_resume_and_is_counted_once(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([*lines_of(GOOD), b'{"text": null}', b"[]", b'{"text": null}', b"{"]))
    config = config_of(file, on_error="skip")
    wanted = {"null": 2, "not an object": 1, "not JSON": 1}
    batches = train_batches(config, batch_size=2, sequence_length=16)
    take(batches, 12)
    state = json.loads(json.dumps(batches.get_state()))
    rest = take(batches, 40)
    assert batches.skipped == wanted
    resumed = train_batches(config, batch_size=2, sequence_length=16)
    resumed.set_state(state)
    assert resumed.get_state() == state
    np.testing.assert_equal(take(resumed, 40), rest)
    assert resumed.skipped == wanted
    again = train_batches(config, batch_size=2, sequence_length=16)
    again.set_state(json.loads(json.dumps(resumed.get_state())))
    assert again.skipped == wanted
    np.testing.assert_equal(next(again), take(resumed, 1)[0])


def test_validation_leaves_out_and_raises_as_training_does(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([*lines_of(GOOD), b'{"text": null}']))
    skip = config_of(file, on_error="skip")
    batches = validation_batches(skip, batch_size=2, sequence_length=16)
    assert sum(int(batch["bytes"].sum()) for batch in batches) == validation_bytes(skip)
    with pytest.raises(DataError, match=r"a\.jsonl, line 41: field 'text' holds null"):
        list(validation_batches(config_of(file), batch_size=2, sequence_length=16))


def test_files_that_vanish_do_not_make_the_stream_wait_for_ever(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 9)
    batches = train_batches(config_of(tmp_path, on_error="skip"), batch_size=1, sequence_length=8)
    next(batches)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(DataError, match="documents held none that could be used"):
        take(batches, 500)
