"""Every place that text may come from, and every shape of record."""

import csv
import gzip
import io
import json
import os
import sys
import threading

import pyarrow
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from pyarrow import parquet

from cospadi.calibration import read_texts
from cospadi.calibration.texts import Conversation
from cospadi.errors import CalibrationError

DOCUMENTS = ("first, line", 'zwei "é"\n日本', "x" * 140_000)  # the last one is longer than csv's limit
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def refusal(source, **options):
    with pytest.raises(CalibrationError) as caught:
        read_texts(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows(form, records):
    """A file's bytes in a format."""
    if form == "jsonl":
        return "\n".join(map(json.dumps, records)).encode()
    if form == "json":
        return json.dumps(records).encode()
    buffer = io.BytesIO()
    if form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
        return buffer.getvalue()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def pack(data, packing):
    if packing == ".gz":
        return gzip.compress(data)
    if packing == ".zst":  # two frames, as parallel compressors and appending write them
        half = len(data) // 2
        return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))
    return data


@pytest.mark.parametrize("packing", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_files_of_records(tmp_path, form, packing):
    path = tmp_path / f"some.name.{form}{packing}"
    path.write_bytes(pack(rows(form, [{"id": "7", "text": text} for text in DOCUMENTS]), packing.lower()))
    texts = read_texts(path)
    assert texts.documents == DOCUMENTS and texts.fields == ("text",)
    path.write_bytes(pack(rows(form, [{"prompt": "ab ", "completion": "cd"}]), packing.lower()))
    texts = read_texts(path)
    assert texts.documents == ("ab cd",) and texts.fields == ("prompt", "completion")
    assert read_texts(path, field="completion").documents == ("cd",)
    message = refusal(path, field="nope")
    assert "no " in message and "'nope'" in message and "'prompt', 'completion'" in message


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["txt", "md"])
def test_files_of_plain_text(tmp_path, form, packing):
    path = tmp_path / f"a.{form}{packing}"
    path.write_bytes(pack("\ufeff# One\r\n\r\ntwo é".encode(), packing))
    assert read_texts(path).documents == ("# One\n\ntwo é",) and read_texts(path).fields == ()


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    "record, messages, fields",
    [
        ({"messages": CHAT}, CHAT, ("messages",)),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT, ("prompt", "completion")),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            CHAT,
            ("conversations",),
        ),
        ({"prompt": "hi", "prompt_id": "7", "messages": CHAT}, CHAT, ("messages",)),
    ],
)
def test_conversations(tmp_path, form, record, messages, fields):
    path = tmp_path / f"a.{form}"
    path.write_bytes(rows(form, [record]))
    texts = read_texts(path)
    (found,) = texts.documents
    assert isinstance(found, Conversation) and list(found.messages) == messages and texts.fields == fields
    assert read_texts(path, field=fields[0]).documents[0].messages == tuple(
        messages if len(fields) == 1 else messages[:1]
    )


def test_text_comes_before_messages_and_tools_go_along():
    assert read_texts([{"text": "a", "messages": CHAT}]).documents == ("a",)
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        assert read_texts([{"messages": CHAT, "tools": tools}]).documents[0].tools == ({"name": "f"},)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": "hi"}, None),
        ({"messages": 3}, "item 1: field 'messages' is a number, not a string or a list of messages"),
        ({"messages": ["hi"]}, "item 1: field 'messages' is a list"),
        ({"messages": [{"content": "hi"}]}, "item 1: message 1 has no 'role' (it has 'content')"),
        ({"messages": [CHAT[0], {"role": "user"}]}, "item 1: message 2 has no 'content'"),
        (
            {"prompt": "a", "completion": CHAT},
            "item 1: field 'prompt' is a string, not a list of messages as the other",
        ),
        ({"prompt": "a"}, "has no field 'text', 'messages', or 'prompt' and 'completion' (it has 'prompt')"),
        ({"messages": CHAT, "tools": 3}, "item 1: field 'tools' is a number, not a list"),
        ({"messages": CHAT, "tools": "{"}, "item 1: field 'tools': malformed JSON"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "item 1: message 1: character 0"),
        ({}, "(it has nothing)"),
    ],
)
def test_records_that_hold_no_text(record, words):
    if words is None:
        assert read_texts([record]).documents == ("hi",)
    else:
        assert words in refusal([record])


def test_csv_names_the_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,id\n"two\nlines",1\n', encoding="utf-8")
    assert read_texts(path).documents == ("two\nlines",)
    limit = csv.field_size_limit()
    path.write_text('text,id\nfine,1\n"never closed,2\n', encoding="utf-8")
    assert "malformed CSV on line" in refusal(path) and csv.field_size_limit() == limit
    path.write_text("id,text\n1,a\n2\n", encoding="utf-8")
    assert "line 3: field 'text' is null" in refusal(path)
    path.write_text("text\n", encoding="utf-8")
    assert "no text" in refusal(path)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_damaged_packing(tmp_path, packing):
    data = pack(b"".join(b'{"text": "%d"}\n' % i for i in range(99999)), packing)
    for content in (b"nonsense", data[: len(data) // 3]):
        path = tmp_path / f"a.jsonl{packing}"
        path.write_bytes(content)
        assert f"{path}: cannot be read: " in refusal(path)


def test_json_lines_under_the_wrong_suffix(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert read_texts(path).documents == ("a", "b")
    path.write_text('{"text": "a"}\n{"body": "b"}\n', encoding="utf-8")
    assert "line 2" in refusal(path)


def test_a_directory_is_read_in_order_without_what_is_hidden_or_no_text(tmp_path):
    for name, content in {
        "b/one.txt": "2", "a/z.jsonl.gz": gzip.compress(b'{"text": "1"}'), "c.md": "3", ".hidden.txt": "no",
        ".git/x.txt": "no", "README.md": "# describes the records", "image.png": "no", "a/.x/y.txt": "no",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    texts = read_texts(tmp_path)
    assert texts.documents == ("1", "2", "3") and texts.source == str(tmp_path)
    assert texts.notes == ("3 files: 1 .jsonl.gz, 1 .md, 1 .txt", "2 files of other kinds left out")
    (tmp_path / "a" / "z.jsonl.gz").unlink()
    assert read_texts(str(tmp_path)).documents == ("# describes the records", "2", "3")
    (tmp_path / "b" / "two.jsonl").write_text('{"body": "x"}', encoding="utf-8")
    assert "two.jsonl: line 1 has no field 'text'" in refusal(tmp_path)


def test_a_directory_without_text(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    assert f"{tmp_path}: this directory has no text" in refusal(tmp_path)


def test_what_save_to_disk_wrote(tmp_path):
    data = Dataset.from_dict({"id": [1, 2], "messages": [CHAT, CHAT[:1]]})
    data.save_to_disk(tmp_path / "one")
    texts = read_texts(tmp_path / "one")
    assert [list(found.messages) for found in texts.documents] == [CHAT, CHAT[:1]] and texts.fields == ("messages",)
    assert "has no column 'text' (it has 'id', 'messages')" in refusal(tmp_path / "one", field="text")
    DatasetDict(train=data).save_to_disk(tmp_path / "alone")
    assert len(read_texts(tmp_path / "alone")) == 2
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    assert "splits test, train" in refusal(tmp_path / "two")
    assert len(read_texts(tmp_path / "two" / "test")) == 2
    (tmp_path / "one" / "state.json").write_text("{}", encoding="utf-8")
    assert "cannot be read by datasets" in refusal(tmp_path / "one")


@pytest.mark.parametrize(
    "content, documents",
    [
        ('{"text": "a"}\n{"text": "b"}\n', ("a", "b")),
        ('"a"\n"b"', ("a", "b")),
        ('\n["a", "b"]', ("a", "b")),
        ('[\n"a",\n"b"\n]', ("a", "b")),
        ('{"prompt": "a", "completion": "b"}', ("ab",)),
        ('"Quoted," he said.\nMore.', ('"Quoted," he said.\nMore.',)),
        ("{not json\r\nat all", ("{not json\nat all",)),
        ("plain\n", ("plain\n",)),
    ],
)
def test_standard_input_and_pipes(monkeypatch, tmp_path, content, documents):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    texts = read_texts("-")
    assert texts.documents == documents and texts.source == "standard input"
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content.encode(),))
    writer.start()
    assert read_texts(tmp_path / "pipe").documents == documents
    writer.join()


def test_standard_input_that_is_no_text(monkeypatch):
    for content, words in ((b"", "no text"), (b'{"text": "a"}\n{', "line 2"), (b"\x8b", "not UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        message = refusal("-")
        assert message.startswith("standard input: ") and words in message


def test_what_python_holds():
    data = Dataset.from_dict({"text": ["a", "b"], "other": [1, 2]})
    stream = IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": "b"}]))
    sources = {
        "a Dataset": data,
        "an IterableDataset": stream,
        "a Column": data["text"],
        "an IterableColumn": stream["text"],
        "a generator": (text for text in "ab"),
        "a DataFrame": data.to_pandas(),
        "a Series": data.to_pandas()["text"],
        "a list of documents": [{"text": "a"}, "b"],
    }
    for name, source in sources.items():
        texts = read_texts(source)
        assert (texts.documents, texts.source) == (("a", "b"), name)
    assert "the Dataset: item 1 has no field 'body'" in refusal(data, field="body")
    assert "the Dataset: item 1: field 'other' is a number" in refusal(data, field="other")
    assert "DatasetDict (it has 'train'): pass one of its splits" in refusal(DatasetDict(train=data))
    for wrong in (b"bytes", 3, None):
        assert "a text must be" in refusal(wrong)


def test_endless_iterables_are_bounded_and_lists_are_not():
    texts = read_texts(("x" * 100 for _ in iter(int, 1)), characters=1000)
    assert len(texts) == 10 and texts.notes == ("the first 10 documents of a generator",)
    assert len(read_texts(["x" * 100] * 20, characters=1000)) == 20


def test_the_digest_knows_documents_and_messages():
    digests = {
        read_texts(source).sha256
        for source in (
            ["ab", "c"],
            ["a", "bc"],
            [{"messages": CHAT}],
            [{"messages": CHAT[:1]}],
            [{"messages": CHAT, "tools": "[1]"}],
        )
    }
    assert len(digests) == 5
    assert read_texts(iter(["ab", "c"])).sha256 == read_texts([{"text": "ab"}, "c"]).sha256
