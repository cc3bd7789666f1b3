"""Training models with shared attention: with transformers' Trainer, and with the examples."""

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from cospadi.errors import CalibrationError, CheckpointError, RecipeError
from cospadi.masa import MasaConfig, MasaForCausalLM
from tiny import bos_tokenizer, byte_tokenizer, tiny_text, token_ids

EXAMPLES = Path(__file__).parents[2] / "examples" / "masa"
QUICK = ["--tiny", "--tokens", "640", "--sequence", "16", "--batch", "4", "--validation", "300", "--hidden", "24"]


@pytest.fixture(scope="module", autouse=True)
def examples():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
    for name in ("data", "train", "vision"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A compressed text file and a tokenizer, as the example takes them."""
    folder = tmp_path_factory.mktemp("text")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    with lzma.open(folder / "text.jsonl.xz", "wt", encoding="utf-8") as file:
        for seed in range(60):
            file.write(json.dumps({"text": tiny_text(60, seed=seed)}) + "\n")
    return ["--data", str(folder / "text.jsonl.xz"), "--tokenizer", str(folder / "tokenizer")]


def tiny_masa(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 6}
    return MasaForCausalLM(MasaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True, **fields))


def trainer(directory, fields=None, **options):
    ids = token_ids(16, 12)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    arguments = TrainingArguments(
        directory, per_device_train_batch_size=8, use_cpu=True, report_to=[], disable_tqdm=True, **settings, **options
    )
    return Trainer(tiny_masa(**(fields or {})), arguments, train_dataset=rows)


def test_trainer_in_bfloat16_learns_and_its_checkpoint_loads(tmp_path):
    run = trainer(tmp_path, max_steps=15, bf16=True, save_strategy="no", logging_steps=5)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] > 5 and losses[-1] < losses[0] - 0.3
    run.model.fold()
    run.save_model(tmp_path / "m")
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), token_ids(2, 12)
    assert loaded.config.folded
    with torch.no_grad():
        trained = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()
        assert torch.equal(loaded(ids).logits, trained(ids).logits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directory of a trained model, with its logits and what it generated before it was folded and saved."""
    directory = tmp_path_factory.mktemp("trained")
    run = trainer(directory, max_steps=20, save_strategy="no")
    run.train()
    model, ids = run.model.eval(), token_ids(2, 12)
    with torch.no_grad():
        wanted = {"ids": ids, "logits": model(ids).logits}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    wanted["generated"] = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, use_cache=True, **options), wanted["generated"])
    model.fold()
    model.save_pretrained(directory)
    save_file(wanted, directory / "wanted.safetensors")
    return directory


FRESH = """
import sys
{first}
{imported} as Auto
if Auto.__name__ == "AutoConfig":
    print(type(Auto.from_pretrained(sys.argv[1])).__name__)
else:
    import torch
    from safetensors.torch import load_file
    wanted, model = load_file(sys.argv[1] + "/wanted.safetensors"), Auto.from_pretrained(sys.argv[1])
    with torch.no_grad():
        assert torch.equal(model(wanted["ids"]).logits, wanted["logits"])
    for cached in (True, False):
        options = dict(max_new_tokens=8, do_sample=False, use_cache=cached, eos_token_id=None)
        found = model.generate(wanted["ids"], attention_mask=torch.ones_like(wanted["ids"]), **options)
        assert torch.equal(found, wanted["generated"]), cached
    print(type(model).__name__)
"""


@pytest.mark.parametrize(
    ("first", "imported", "name"),
    [
        ("", "from transformers import AutoModelForCausalLM", "MasaForCausalLM"),
        ("import torch", "from transformers import AutoModelForCausalLM", "MasaForCausalLM"),
        ("", "from transformers import AutoConfig", "MasaConfig"),
    ],
    ids=["model", "model-after-torch", "config"],
)
def test_a_fresh_process_loads_it_without_importing_the_package(trained, first, imported, name):
    code = FRESH.format(first=first, imported=imported)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code, str(trained)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=sys.prefix, env=environment)
    assert done.stdout.strip() == name, done.stderr


def test_trainer_resumes_to_the_same_weights(tmp_path):
    whole = trainer(tmp_path / "whole", max_steps=6, save_strategy="no")
    whole.train()
    trainer(tmp_path / "parts", max_steps=6, save_steps=3).train()
    resumed = trainer(tmp_path / "parts", max_steps=6, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)


def test_trainer_refuses_to_resume_with_another_configuration(tmp_path):
    trainer(tmp_path, max_steps=1, save_steps=1).train()
    for fields in ({"attention_sharing": "repeat"}, {"attention_sharing": "dense"}, {"folded": True}):
        with pytest.raises(CheckpointError, match="not that of the configured attention"):
            trainer(tmp_path, fields, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(RuntimeError, match=r"size mismatch for model.shared_attention.q.atoms"):
        trainer(tmp_path, {"num_atoms": 3}, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_example_trains_every_design_and_writes_one_table(text, tmp_path, capsys):
    import train

    named = ["--designs", *train.DESIGNS]
    rows = train.main([*QUICK, *text, *named, "--out", str(tmp_path)])
    assert [row["design"] for row in rows] == list(train.DESIGNS)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"] == rows and written["settings"]["hidden"] == 24
    removed = {row["design"]: row["attention_removed"] for row in rows}
    assert removed["dense"] == 0 and removed["sequential"] == removed["repeat"] == pytest.approx(2 / 3)
    assert removed["low_rank_third"] == pytest.approx(1 / 3) and removed["low_rank_sixth"] == pytest.approx(2 / 3)
    assert removed["masa_qkvo"] == pytest.approx(1 - 2 * (24 * 24 + 6) / (6 * 24 * 24))
    assert all(row["tokens"] == 640 and 5 < row["perplexity"] < 400 for row in rows)
    shown = capsys.readouterr().out
    assert all(design in shown for design in train.DESIGNS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "masa_qkvo-0" / "model")
    attention = sum(p.numel() for name, p in model.named_parameters() if "shared_attention" in name)
    assert attention == rows[-1]["attention_parameters"] and model.config.folded
    assert len(AutoTokenizer.from_pretrained(tmp_path / "masa_qkvo-0" / "model")) == 257
    before = (tmp_path / "dense-0" / "result.json").stat().st_mtime_ns
    assert train.main([*QUICK, *text, *named, "--out", str(tmp_path)]) == rows  # nothing is trained again
    assert (tmp_path / "dense-0" / "result.json").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"other settings \(rate 0.003, now 0.1"):
        train.main([*QUICK, *text, "--out", str(tmp_path), "--rate", "0.1"])


def test_processes_share_a_directory(text, tmp_path):
    import train

    command = [sys.executable, str(EXAMPLES / "train.py"), *QUICK, *text, "--out", str(tmp_path)]
    each = [["--designs", "dense"], ["--designs", "masa_qkvo", "repeat"], ["--designs", "dense", "--seeds", "1"]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen(
            [*command, *some], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        for some in each
    ]
    shown = [process.communicate(timeout=300)[0] for process in running]
    assert all(process.returncode == 0 for process in running), shown
    written = json.loads((tmp_path / "results.json").read_text())
    runs = [("dense", 0), ("repeat", 0), ("masa_qkvo", 0), ("dense", 1)]
    assert [(row["design"], row["seed"]) for row in written["rows"]] == runs
    assert any(all(design in output for design in ("dense", "repeat", "masa_qkvo")) for output in shown)
    one = ["--designs", "masa_qkvo", "--out", str(tmp_path / "alone")]
    row = train.main([*QUICK, *text, *one])[0]
    assert row["perplexity"] == pytest.approx(written["rows"][2]["perplexity"], rel=1e-6)  # however runs are spread
    everything = train.main([*QUICK, *text, "--designs", "masa_qkvo", "--out", str(tmp_path)])
    assert everything == written["rows"]  # with the rows of runs that this command does not name


def test_a_run_that_another_process_trains_is_refused_until_it_is_finished(text, tmp_path):
    import train
    from data import alone

    arguments = [*QUICK, *text, "--out", str(tmp_path), "--designs", "repeat"]
    (tmp_path / "repeat-0").mkdir()
    with alone(tmp_path / "repeat-0" / "lock", wait=False):
        with pytest.raises(RecipeError, match="repeat-0: another process is training this; leave it out of this one"):
            train.main(arguments)
        assert not (tmp_path / "repeat-0" / "result.json").exists()
    rows = train.main(arguments)
    with alone(tmp_path / "repeat-0" / "lock", wait=False):
        assert train.main(arguments) == rows


HOLDER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from data import alone
with alone(Path(sys.argv[2]), wait=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path):
    from data import alone

    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(EXAMPLES), str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match="another process"), alone(lock, wait=False):
            pass
        holder.kill()
        with alone(lock, wait=True):  # waits until the process is gone
            pass
    with pytest.raises(ValueError, match="stop"), alone(lock, wait=False):
        raise ValueError("stop")
    with alone(lock, wait=False):
        pass


def test_the_table_is_merged_by_seed_and_design(tmp_path):
    import train

    for design, seed in (("masa_qkvo", 0), ("dense", 10), ("repeat", 2), ("dense", 0)):
        (tmp_path / f"{design}-{seed}").mkdir()
        row = {"design": design, "seed": seed, "parameters": 1000, "attention_parameters": 10}
        row |= {"attention_removed": 0.0, "perplexity": 20.0 + seed, "tokens_per_second": None}
        (tmp_path / f"{design}-{seed}" / "result.json").write_text(json.dumps(row))
    (tmp_path / "gqa-0").mkdir()  # not finished
    rows = train.merged(tmp_path)
    assert [(row["design"], row["seed"]) for row in rows] == [
        ("dense", 0),
        ("masa_qkvo", 0),
        ("repeat", 2),
        ("dense", 10),
    ]
    lines = train.table(rows).splitlines()
    assert len(lines) == 4 and "25.00 ±7.07" in lines[1] and "22.00 " in lines[3]


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    from data import replace_text

    path = tmp_path / "a.json"
    replace_text(path, "one")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            replace_text(path, "two")
    assert path.read_text() == "one"
    replace_text(path, "two")
    assert path.read_text() == "two"


def test_example_resumes_to_the_same_model(text, tmp_path):
    import train
    from data import prepare

    options = train.parse([*QUICK, *text, "--out", str(tmp_path)])
    sizes = {name: getattr(options, name) or value for name, value in train.TINY.items()}
    settings = train.Settings(data=options.data, tokenizer="", precision="no", compiled=False, **sizes)
    tokenizer = byte_tokenizer()
    parts = prepare(options.data, tokenizer, tmp_path / "tokens", limit=640, validation=300)
    common = (settings, tokenizer, parts)
    accelerator = Accelerator(cpu=True)
    assert settings.steps == 10
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train.train("masa_qkvo", 3, *common, tmp_path / "whole", accelerator, 1e9)
    assert train.train("masa_qkvo", 3, *common, tmp_path / "parts", accelerator, 1e9, stop_at=4) is None
    assert (tmp_path / "parts" / "state.safetensors").exists()
    resumed = train.train("masa_qkvo", 3, *common, tmp_path / "parts", accelerator, 1e9)
    assert not (tmp_path / "parts" / "state.safetensors").exists()
    assert resumed["perplexity"] == whole["perplexity"]
    other = train.train("masa_qkvo", 4, *common, tmp_path, accelerator, 1e9)
    assert other["perplexity"] != whole["perplexity"]


def test_tokens_are_those_of_the_documents(text, tmp_path):
    from data import Batches, prepare

    tokenizer = byte_tokenizer()
    train, held = prepare(text[1], tokenizer, tmp_path, limit=2000, validation=100)
    documents = [[*tokenizer(tiny_text(60, seed=seed)).input_ids, 256] for seed in range(60)]
    stream = [token for index, document in enumerate(documents) if index not in (0, 50) for token in document]
    assert np.fromfile(train.path, train.dtype).tolist() == stream[:2000] and train.count == 2000
    assert np.fromfile(held.path, held.dtype).tolist() == (documents[0] + documents[50])[:100]
    with pytest.raises(RecipeError, match="holds the tokens of"):
        prepare(text[1], tokenizer, tmp_path, limit=1000, validation=100)
    blocks = train.blocks(30)
    assert blocks.shape == (66, 30) and blocks[1].tolist() == stream[30:60]
    batches = Batches(blocks, 8, seed=1)
    seen = torch.cat([batches(step) for step in range(8)])
    assert len({tuple(row) for row in seen.tolist()}) == 64  # no block twice in an epoch
    halves = [Batches(blocks, 8, 1, (rank, 2))(5).tolist() for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(batches(5).tolist())
    assert not torch.equal(batches(8), batches(0)) and torch.equal(batches(5), Batches(blocks, 8, 1)(5))
    with pytest.raises(CalibrationError, match="do not fill a batch"):
        Batches(blocks, 100, 0)
    with pytest.raises(CalibrationError, match="do not fill one block"):
        train.blocks(5000)


def test_blocks_begin_as_the_tokenizer_begins(text, tmp_path):
    from data import Batches, prepare

    train, _ = prepare(text[1], bos_tokenizer(), tmp_path, limit=2000, validation=100)
    blocks = train.blocks(30)
    assert train.begin == (257,) and blocks.shape == (2000 // 29, 29)
    batch = Batches(blocks, 8, seed=1, begin=train.begin)(0)
    assert batch.shape == (8, 30) and (batch[:, 0] == 257).all() and (batch[:, 1:] != 257).all()
    again, _ = prepare(text[1], bos_tokenizer(), tmp_path, limit=2000, validation=100)
    assert again == train


def test_unreadable_data(tmp_path):
    from data import documents

    (tmp_path / "a.jsonl.xz").write_bytes(b"no xz")
    with pytest.raises(CalibrationError, match="cannot be read"):
        list(documents(str(tmp_path / "a.jsonl.xz"), 10, byte_tokenizer()))
    with pytest.raises(CalibrationError, match="are read compressed"):
        list(documents(str(tmp_path / "a.csv.xz"), 10, byte_tokenizer()))
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as file:
        file.write('{"text": "x"}\n{"other": 1}\n')
    with pytest.raises(CalibrationError, match="line 2 has no field 'text'"):
        list(documents(str(tmp_path / "b.jsonl.xz"), 10, byte_tokenizer()))


def test_learning_rate_warms_up_and_falls_to_zero():
    import train

    sizes = dict.fromkeys(("hidden", "layers", "heads", "inner", "validation"), 1)
    settings = train.Settings(
        "", "", **sizes, tokens=10_000, sequence=10, batch=10, rate=2.0, precision="no", compiled=False
    )
    rates = [train.learning_rate(step, settings) for step in range(settings.steps)]
    assert len(rates) == 100 and max(rates) == rates[9] == 2.0 and rates[0] == 0.2
    assert rates[55] == pytest.approx(1.0) and 0 < rates[-1] < 0.01


def test_vision_example_beats_chance(tmp_path):
    import vision

    arguments = ["--designs", "dense", "masa_qkvo", "--seeds", "0", "--epochs", "4", "--layers", "3", "--hidden", "32"]
    arguments += ["--processes", "2"]
    out = tmp_path / "deep" / "digits.json"
    rows = vision.main([*arguments, "--batch", "32", "--rate", "4e-3", "--device", "cpu", "--out", str(out)])
    assert json.loads(out.read_text())["rows"] == rows
    assert all(row["accuracy"] > 0.3 for row in rows)
    assert rows[1]["attention_parameters"] == 4 * (32 * 32 + 3) and rows[0]["attention_parameters"] == 12 * 32 * 32
    assert rows[0]["parameters"] - rows[1]["parameters"] == 4 * (2 * 32 * 32 - 3)


def test_validation_leaves_the_test_images_unseen(monkeypatch):
    pytest.importorskip("sklearn")
    import vision

    monkeypatch.setattr(vision, "normalised", lambda *parts: parts)
    train, train_labels, test, _ = vision.digits(3)
    less, less_labels, held, held_labels = vision.digits(3, validate=True)
    assert (len(train), len(test), len(less), len(held)) == (1437, 360, 1149, 288)
    together = sorted(map(bytes, np.concatenate([less, held])))
    assert together == sorted(map(bytes, train))
    assert sorted([*less_labels, *held_labels]) == sorted(train_labels)
    with pytest.raises(CalibrationError, match="--validate is for the digits"):
        vision.main(["--images", "some/images", "--validate", "--device", "cpu", "--out", "x.json"])


def test_shifted_images_are_moved_by_at_most_one_pixel():
    import vision

    images = torch.zeros(200, 1, 8, 8)
    images[:, 0, 4, 3] = 1
    moved = vision.shifted(images, torch.Generator().manual_seed(0))
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert moved.shape == images.shape and moved.sum() == 200
    assert places == {(row, column) for row in (3, 4, 5) for column in (2, 3, 4)}
