"""Every format yields its documents, and every unreadable corpus one clear error."""

import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from delta_jax.data import DataConfig, load_documents

TEXTS = ["alpha", "b\u00eata\nzwei Zeilen\n", "gamma " * 100]


def texts_of(path, **options):
    documents = load_documents(DataConfig(path=str(path), **options))
    return [documents[index] for index in range(len(documents))]


def write_jsonl(file: pathlib.Path, texts, field="text"):
    file.write_text("".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts)))
    return file


def write_records(file: pathlib.Path, records):
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return file


def write_parquet(file: pathlib.Path, texts, **options):
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "text": texts}), file, **options)
    return file


def test_text_folder_is_searched_in_order_without_hidden_and_empty_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "z.txt").write_text("not me")
    (tmp_path / "b.txt").write_bytes(TEXTS[1].encode())
    (tmp_path / "a.md").write_text(TEXTS[0])
    (tmp_path / "sub" / "c.py").write_text(TEXTS[2])
    (tmp_path / "empty.txt").touch()
    assert texts_of(tmp_path) == TEXTS
    assert texts_of(tmp_path / "*.txt") == [TEXTS[1]]
    assert texts_of(tmp_path / "**" / "*.py") == [TEXTS[2]]
    assert texts_of(tmp_path / "a.md") == [TEXTS[0]]


def test_text_keeps_line_endings(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r")
    assert texts_of(tmp_path) == ["one\r\ntwo\r"]


def test_jsonl_over_several_files_with_blank_lines(tmp_path):
    write_jsonl(tmp_path / "1.jsonl", TEXTS[:2])
    (tmp_path / "2.ndjson").write_text("\n\r\n" + json.dumps({"text": TEXTS[2]}) + "\n\n" + json.dumps({"text": ""}))
    assert texts_of(tmp_path) == [*TEXTS, ""]


def test_jsonl_that_changed_is_indexed_again(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS[:1])
    assert texts_of(file) == TEXTS[:1]
    assert texts_of(write_jsonl(file, TEXTS)) == TEXTS


def test_jsonl_lines_longer_than_a_block_of_the_scan(tmp_path):
    long = "x" * (1 << 24)
    assert texts_of(write_jsonl(tmp_path / "big.jsonl", ["a", long, "b"])) == ["a", long, "b"]


def test_parquet_over_row_groups_and_files(tmp_path):
    write_parquet(tmp_path / "1.parquet", TEXTS, row_group_size=2)
    write_parquet(tmp_path / "2.parquet", TEXTS[::-1])
    assert texts_of(tmp_path) == TEXTS + TEXTS[::-1]


def test_arrayrecord_of_text_and_of_json(tmp_path):
    plain = write_records(tmp_path / "plain.array_record", [text.encode() for text in TEXTS])
    assert texts_of(plain) == TEXTS
    objects = write_records(tmp_path / "objects.arrayrecord", [json.dumps({"body": text}).encode() for text in TEXTS])
    assert texts_of(objects, text_field="body") == TEXTS
    with pytest.raises(ValueError, match=r"text_field: .*objects.*no field 'text'; it has body"):
        texts_of(objects)


def test_arrayrecord_of_json_does_not_turn_to_text_midway(tmp_path):
    file = write_records(tmp_path / "mixed.array_record", [b'{"text": "a"}', b"plain"])
    with pytest.raises(ValueError, match="record 1: not a JSON object"):
        texts_of(file)


@pytest.mark.filterwarnings("ignore")  # of the library, while it is imported
def test_hugging_face_dataset_on_disk(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS, "n": [0, 1, 2]})
    rows.save_to_disk(str(tmp_path / "rows"))
    assert texts_of(tmp_path / "rows") == TEXTS
    with pytest.raises(ValueError, match=r"no field 'content'; it has text, n"):
        texts_of(tmp_path / "rows", text_field="content")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(ValueError, match="several splits"):
        texts_of(tmp_path / "dict")
    assert texts_of(tmp_path / "dict" / "test", format="huggingface") == TEXTS
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="not a Hugging Face dataset"):
        texts_of(tmp_path / "nothing", format="huggingface")


def test_embedded_corpus_is_the_standard_library_without_its_tests():
    documents = load_documents(DataConfig())
    texts = [documents[index] for index in range(len(documents))]
    assert len(texts) > 300
    assert sum(map(len, texts)) > 5_000_000
    assert pathlib.Path(json.__file__).read_bytes().decode() in texts
    assert not any("unittest.main()" in text and "class Test" in text for text in texts[:50])


def test_explicit_format_overrides_the_suffix(tmp_path):
    file = write_jsonl(tmp_path / "data.json", TEXTS)
    with pytest.raises(ValueError, match=r"data.format: cannot tell .*\.json"):
        texts_of(file)
    assert texts_of(file, format="jsonl") == TEXTS


def test_a_folder_of_several_formats_is_ambiguous_until_told(tmp_path):
    write_parquet(tmp_path / "rows.parquet", TEXTS)
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(ValueError, match="cannot tell the format"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, format="parquet") == TEXTS


@pytest.mark.parametrize("path", ["nothing/here", "nothing/*.txt"])
def test_missing_path(tmp_path, path):
    with pytest.raises(ValueError, match=r"data\.path: no file, folder or glob match at .*nothing"):
        load_documents(DataConfig(path=str(tmp_path / path)))


def test_empty_corpora(tmp_path):
    with pytest.raises(ValueError, match=r"is empty: no file\."):
        texts_of(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="is empty: it holds no document"):
        texts_of(tmp_path)
    with pytest.raises(ValueError, match=r"is empty: no file with a suffix of \.parquet"):
        texts_of(tmp_path, format="parquet")
    with pytest.raises(ValueError, match="is empty: it holds no document"):
        texts_of(write_parquet(tmp_path / "none.parquet", pyarrow.array([], pyarrow.string())))
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="is empty: it holds no document"):
        texts_of(tmp_path / "none.jsonl")


def test_text_that_is_not_utf8_names_the_file(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt, line 1: not UTF-8 text\."):
        texts_of(tmp_path)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a readable Parquet file"):
        texts_of(tmp_path / "bad.parquet")
    (tmp_path / "bad.array_record").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.array_record is not a readable ArrayRecord"):
        texts_of(tmp_path / "bad.array_record")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not a JSON object \(Expecting ',' delimiter"):
        texts_of(tmp_path / "bad.jsonl")


def test_missing_field_and_wrong_type_name_the_field(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS, field="body")
    with pytest.raises(ValueError, match=r"data\.text_field: .*no field 'text'; it has id, body"):
        load_documents(DataConfig(path=str(file)))
    with pytest.raises(ValueError, match=r"field 'id' holds a number, not text"):
        load_documents(DataConfig(path=str(file), text_field="id"))
    parquet = write_parquet(tmp_path / "b.parquet", TEXTS)
    with pytest.raises(ValueError, match=r"no field 'body'; it has n, text"):
        load_documents(DataConfig(path=str(parquet), text_field="body"))
    null = write_parquet(tmp_path / "c.parquet", ["a", None])
    with pytest.raises(ValueError, match=r"c\.parquet, row 1: field 'text' holds null"):
        texts_of(null)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "format must be one of"),
        ({"validation_fraction": 0.0}, "validation_fraction must"),
        ({"validation_fraction": 1.0}, "validation_fraction must"),
        ({"seed": -1}, "seed must"),
        ({"shuffle_rows": 0}, "shuffle_rows must"),
    ],
)
def test_impossible_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
