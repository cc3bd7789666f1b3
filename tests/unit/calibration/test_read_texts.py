import json
import sys
import types

import pyarrow
import pytest
from pyarrow import parquet

from cospadi.calibration import read_texts
from cospadi.errors import CalibrationError

DOCUMENTS = ("first\r\nline", "zwei é\u2028日本", '{"not": "parsed"}')


def refusal(source, **options):
    with pytest.raises(CalibrationError) as caught:
        read_texts(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("form", ["list", "json", "json_records", "jsonl", "jsonl_strings", "parquet"])
@pytest.mark.parametrize("as_string", [True, False])
def test_every_format_gives_the_documents(tmp_path, form, as_string):
    records = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
    source = tmp_path / f"texts.{form.split('_')[0]}"
    if form == "list":
        assert read_texts(list(DOCUMENTS)).documents == DOCUMENTS
        return
    if form == "json":
        write(source, json.dumps(DOCUMENTS))
    elif form == "json_records":
        write(source, json.dumps(records))
    elif form == "jsonl":  # an unescaped U+2028 within a line, an empty line and no newline at the end
        write(source, "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    elif form == "jsonl_strings":
        write(source, "\r\n".join(map(json.dumps, DOCUMENTS)))
    else:
        parquet.write_table(pyarrow.table({"text": DOCUMENTS}), source)
    texts = read_texts(str(source) if as_string else source)
    assert texts.documents == DOCUMENTS and texts.source == str(source)


def test_txt_is_one_document_with_plain_newlines(tmp_path):
    content = "a\n\n b\u2028é \n"
    assert read_texts(write(tmp_path / "a.TXT", content)).documents == (content,)
    assert read_texts(write(tmp_path / "b.txt", b"\xef\xbb\xbf" + content.encode())).documents == (content,)
    for line_end in ("\r\n", "\r"):
        assert read_texts(write(tmp_path / "c.txt", content.replace("\n", line_end))).documents == (content,)


def test_texts_pass_through_and_blank_documents_are_left_out():
    texts = read_texts(["a", " \n", "b"])
    assert texts.documents == ("a", "b") and len(texts) == 2
    assert texts.notes == ("1 empty documents left out",)
    assert read_texts(texts) is texts


def test_another_field(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}')
    assert read_texts(path, field="body").documents == ("yes",)


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.jsonl", "/nowhere/at/all", "./nowhere", "a/b/c"])
def test_missing(name):
    assert name in refusal(name) and "no such file" in refusal(name)


@pytest.mark.parametrize("name", ["a.tsv", "a.gz", "a", "a.tar.gz", "a.jsonl.xz"])
def test_unknown_suffixes(tmp_path, name):
    assert ".jsonl, .json, .csv" in refusal(write(tmp_path / name, "text\nb"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("a.txt", " \n\t"), ("a.json", "[]"), ("a.jsonl", "\n"), ("a.jsonl", '{"text": ""}')],
)
def test_empty(tmp_path, name, content):
    assert "no text" in refusal(write(tmp_path / name, content))


def test_empty_list():
    assert "no text" in refusal([])


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl"])
def test_not_utf8_names_the_byte(tmp_path, suffix):
    message = refusal(write(tmp_path / f"a.{suffix}", "äb".encode() + b"\xff\n"))
    assert "offset 3" in message and "0xff" in message


def test_malformed_json_names_the_line(tmp_path):
    assert "line 3" in refusal(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": \n{"text": "b"}'))
    assert "line 2" in refusal(write(tmp_path / "a.json", '["a",\n b]'))


def test_records_without_the_field_name_line_and_keys(tmp_path):
    message = refusal(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"title": 1, "body": 2}'))
    assert "line 2" in message and "'title', 'body'" in message and "'text'" in message
    assert "entry 1" in refusal(write(tmp_path / "a.json", '[{"x": "y"}]'))
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    assert "'body'" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"text": 3}', "a number"),
        ('{"text": null}', "null"),
        ('["a"]', "a list"),
        ("7", "a number"),
        ("true", "a truth"),
    ],
)
def test_values_that_are_no_text(tmp_path, content, what):
    message = refusal(write(tmp_path / "a.jsonl", content))
    assert "line 1" in message and what in message


def test_half_a_surrogate_pair(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "fine \\ud83d\\ude00"}\n{"text": "ab\\ud83d"}')
    assert "line 2: character 2" in refusal(path)
    assert "item 1" in refusal(["\udc00"])


def test_json_that_is_no_list(tmp_path):
    assert "a record" in refusal(write(tmp_path / "a.json", '{"text": "a"}'))


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a" * 1000]}), path)
    for content in (b"nonsense", path.read_bytes()[:-30]):
        assert "parquet" in refusal(write(path, content))


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset(name, configuration, split, streaming):
        calls.append((name, configuration, split, streaming))
        if name == "broken":
            raise ConnectionError("no network\nat all")
        return ({"text": f"{i:04d} " * 20} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub_names_are_streamed_and_bounded(hub):
    texts = read_texts("owner/name", characters=1000)
    assert len(texts) == 10 and hub == [("owner/name", None, "train", True)]
    assert "first 10 documents" in texts.notes[0]
    read_texts("name:test", characters=1)
    read_texts("owner/name:config-1.0:validation", characters=1)
    assert hub[1:] == [("name", None, "test", True), ("owner/name", "config-1.0", "validation", True)]


def test_hub_errors_are_one_line(hub):
    assert "neither a local file nor a reachable hub dataset" in refusal("broken")
    assert "record 1" in refusal("owner/name", field="body")


def test_local_files_come_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "name.txt", "local")
    assert read_texts("name.txt").documents == ("local",) and not hub


def test_what_python_may_give():
    assert read_texts(("a", "b")) == read_texts(["a", "b"])
    with pytest.raises(CalibrationError, match=r"'One day .*…: there is no such file; .* put it into a list"):
        read_texts("One day a bear went to the river to fish. " * 200)
    with pytest.raises(CalibrationError, match="not 3"):
        read_texts(3)
