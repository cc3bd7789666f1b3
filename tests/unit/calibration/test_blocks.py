import pytest
import torch

from cospadi.calibration import token_blocks
from cospadi.errors import CalibrationError
from tiny import byte_tokenizer, tiny_text

DOCUMENTS = [tiny_text(700, seed=1), "short é", tiny_text(431, seed=2)]
STREAM = b"\x00".join(text.encode() for text in DOCUMENTS)  # byte 0 stands where the end token belongs


def stream():
    ids = list(STREAM)
    return [256 if byte == 0 else byte for byte in ids]


def blocks_of(**options):
    return token_blocks(DOCUMENTS, byte_tokenizer(), **{"samples": 7, "seq_len": 50} | options)


def test_blocks_are_pieces_of_the_stream_in_order_without_overlap():
    blocks = blocks_of()
    assert blocks.ids.shape == (7, 50) and blocks.ids.dtype == torch.int64 and len(blocks) == 7
    pieces = [stream()[i : i + 50] for i in range(0, len(STREAM) - 49, 50)]
    positions = [pieces.index(row) for row in blocks.ids.tolist()]
    assert positions == sorted(set(positions)) and len(positions) == 7


def test_all_blocks_make_the_stream_without_special_tokens():
    with pytest.warns(UserWarning, match="22 of the 99 requested sequences"):
        blocks = blocks_of(samples=99)
    assert blocks.ids.flatten().tolist() == stream()[: 22 * 50]
    assert (blocks.ids == 256).sum() == 2
    report = blocks.report
    assert (report["samples_asked"], report["samples_used"]) == (99, 22)
    assert any("all are used" in note for note in report["notes"])


def test_report():
    assert blocks_of().report == {
        "source": "a list of documents",
        "documents": 3,
        "tokens_available": len(STREAM),
        "tokens_used": 350,
        "longest_document": 700,
        "truncated_tokens": len(STREAM) - 22 * 50,
        "samples_asked": 7,
        "samples_used": 7,
        "seq_len": 50,
        "seed": 0,
        "bos": "auto",
        "begins_with": "",
        "fields": [],
        "chat_template": "",
        "notes": [],
    }


def test_the_seed_decides():
    first, again, other = blocks_of(seed=3), blocks_of(seed=3), blocks_of(seed=4)
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256
    assert not torch.equal(first.ids, other.ids) and first.sha256 != other.sha256


def test_the_digest_knows_shape_and_content():
    digests = {blocks_of(seq_len=n, samples=m).sha256 for n, m in ((50, 4), (25, 8), (100, 2), (50, 5))}
    assert len(digests) == 4


def test_every_block_can_be_drawn():
    drawn = {tuple(row) for seed in range(40) for row in blocks_of(seed=seed, samples=3).ids.tolist()}
    assert len(drawn) == 22


def test_too_little_text():
    with pytest.raises(CalibrationError, match=rf"its {len(STREAM)} tokens do not fill one sequence of 5000"):
        blocks_of(seq_len=5000)
    assert len(token_blocks(["x" * 50], byte_tokenizer(), samples=1, seq_len=50)) == 1


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"seq_len": 0}])
def test_wrong_numbers(wrong):
    with pytest.raises(CalibrationError, match="positive"):
        blocks_of(**wrong)


def test_without_an_end_token_documents_follow_each_other():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    blocks = token_blocks(["ab", "cd", "e"], tokenizer, samples=1, seq_len=5)
    assert bytes(blocks.ids[0].tolist()) == b"abcde"
    assert any("no end token" in note for note in blocks.report["notes"])


def test_progress_reaches_the_end(monkeypatch):
    monkeypatch.setattr("cospadi.calibration.blocks._CHUNK_CHARACTERS", 500)
    seen = []
    chunked = blocks_of(progress=lambda done, total, detail: seen.append((done, total, detail)))
    assert seen == [(1, 3, "a list of documents"), (3, 3, "a list of documents")]
    monkeypatch.undo()
    assert chunked.sha256 == blocks_of().sha256
