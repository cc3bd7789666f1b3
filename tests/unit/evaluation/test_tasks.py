import builtins
import json
import math
import sys

import pytest
import torch
from torch.nn import functional

from cospadi.errors import CalibrationError, ResourceError
from cospadi.evaluation import evaluate
from cospadi.evaluation.tasks import find_tasks, read_task_file, run_tasks
from tiny import bos_tokenizer, byte_tokenizer, save_tiny, tiny_model, tiny_text

WORDS = [word[:5] for word in tiny_text(3000, seed=3).split()]


def write(path, records):
    path.write_text("\n".join(json.dumps(r) if isinstance(r, dict) else r for r in records) + "\n", encoding="utf-8")
    return path


def sentence(i, words=3):
    return " ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(words))


def pairs(count, paradigms=3):
    return [
        {"task": f"p{i % paradigms}", "good": sentence(i), "bad": sentence(i + 40, 3 + i % 2)} for i in range(count)
    ]


def log_likelihood(model, context, text):
    """Sum of log p(text | context), token by token in float64, and whether every token is the likeliest."""
    head, tail = list(context.encode()) or [256], list(text.encode())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([head + tail])).logits[0].double()
    scores = functional.log_softmax(logits[len(head) - 1 : -1], 1)
    chosen = scores.gather(1, torch.tensor(tail)[:, None])
    return float(chosen.sum()), bool((scores.argmax(1) == torch.tensor(tail)).all())


def test_minimal_pairs_and_their_paradigms(tmp_path):
    model, records = tiny_model(seed=2), pairs(11)
    expected = {}
    for r in records:
        good, bad = (log_likelihood(model, "", " " + r[key])[0] for key in ("good", "bad"))
        expected.setdefault(r["task"], []).append(good > bad)
    found = run_tasks(model, byte_tokenizer(), [str(write(tmp_path / "minimal.jsonl", records))], batch=3)
    scores = found["tasks"]["minimal"]
    means = {name: sum(right) / len(right) for name, right in expected.items()}
    assert scores["paradigms"] == pytest.approx(means) and 0 < scores["acc"] < 1
    assert scores["paradigm_mean"] == pytest.approx(sum(means.values()) / 3)
    share = sum(map(sum, expected.values())) / 11
    assert scores["acc"] == pytest.approx(share)
    assert scores["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 10))
    assert scores["samples"] == 11
    assert found["harness"]["batch"] == 3 and found["harness"]["lm_eval"].startswith("0.4")


def test_multiple_choice_and_last_word(tmp_path):
    model = tiny_model(seed=5)
    questions = [
        {"question": sentence(i), "choices": [WORDS[i], WORDS[i + 9] + WORDS[i + 2], WORDS[i + 5]], "answer": i % 3}
        for i in range(9)
    ]
    likely = plain = 0
    for q in questions:
        context = f"Question: {q['question']}\nAnswer:"
        sums = [log_likelihood(model, context, " " + choice)[0] for choice in q["choices"]]
        plain += max(range(3), key=sums.__getitem__) == q["answer"]
        per = [score / len(choice) for score, choice in zip(sums, q["choices"], strict=True)]
        likely += max(range(3), key=per.__getitem__) == q["answer"]
    texts = [sentence(i, 5) for i in range(6)]
    # one whose last word is what the model would say, so that not all are wrong
    head = sentence(20, 3)
    with torch.no_grad():
        token = int(model(input_ids=torch.tensor([list((head + " ").encode())])).logits[0, -1, :256].argmax())
    texts.append(f"{head} {chr(token)}" if chr(token).isalnum() else f"{head} x")
    outcomes = [log_likelihood(model, t.rpartition(" ")[0], " " + t.rpartition(" ")[2]) for t in texts]
    write(tmp_path / "quiz.jsonl", questions)
    write(tmp_path / "last.jsonl", [{"text": t} for t in texts])
    calls = []
    found = run_tasks(model, byte_tokenizer(), [str(tmp_path)], progress=lambda *a: calls.append(a))["tasks"]
    assert set(found) == {"quiz", "last"}
    assert found["quiz"]["acc"] == pytest.approx(plain / 9) and found["quiz"]["acc_norm"] == pytest.approx(likely / 9)
    assert found["last"]["acc"] == pytest.approx(sum(greedy for _, greedy in outcomes) / len(texts))
    loss = -sum(score for score, _ in outcomes) / len(texts)
    assert found["last"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert calls and all(done <= total for done, total, _ in calls)


@pytest.mark.parametrize("bos", ["auto", "on", "off"])
def test_examples_begin_with_the_begin_token_where_the_tokenizer_adds_it(tmp_path, bos):
    model, tokenizer = tiny_model(seed=5, vocab_size=258), bos_tokenizer()
    texts = [sentence(i, 5) for i in range(6)]
    loss = 0.0
    for text in texts:
        word = text.rpartition(" ")[2]
        ids = torch.tensor([*([] if bos == "off" else [257]), *text.encode()])
        with torch.no_grad():
            scores = functional.log_softmax(model(input_ids=ids[None]).logits[0].double(), 1)
        at = len(ids) - len(word) - 1
        loss -= float(scores[at - 1 : -1].gather(1, ids[at:, None]).sum()) / len(texts)
    path = str(write(tmp_path / "last.jsonl", [{"text": t} for t in texts]))
    assert run_tasks(model, tokenizer, [path], bos=bos)["tasks"]["last"]["perplexity"] == pytest.approx(
        math.exp(loss), rel=1e-4
    )
    if bos != "off":  # a text that has it already does not get a second one
        marked = str(write(tmp_path / "marked.jsonl", [{"text": "<bos>" + t} for t in texts]))
        found = run_tasks(model, tokenizer, [marked], bos=bos)["tasks"]["marked"]
        assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_limit_takes_every_paradigm_in_turn(tmp_path):
    path = write(tmp_path / "p.jsonl", [r | {"task": "abc"[i // 5]} for i, r in enumerate(pairs(15))])
    chosen = read_task_file(path, 7).records
    assert [r["paradigm"] for r in chosen] == ["a", "a", "a", "b", "b", "c", "c"]
    assert read_task_file(path).records[:3] == chosen[:3]
    other = write(tmp_path / "t.jsonl", [{"text": sentence(i)} for i in range(5)])
    assert read_task_file(other, 2).records == read_task_file(other).records[:2]


def test_the_hash_is_that_of_the_records(tmp_path):
    first = read_task_file(write(tmp_path / "a.jsonl", pairs(4)))
    same = read_task_file(write(tmp_path / "b.jsonl", ["", *pairs(4), ""]))
    other = read_task_file(write(tmp_path / "c.jsonl", pairs(5)))
    assert first.sha256 == same.sha256 != other.sha256
    assert first.sha256 != read_task_file(tmp_path / "a.jsonl", 3).sha256


PAIR, QUESTION = {"task": "t", "good": "a b", "bad": "b a"}, {"question": "q", "choices": ["x", "y"], "answer": 1}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([PAIR, "", {"task": "t", "good": "a b"}], r'bad\.jsonl, line 3 has no "bad" \(minimal pairs'),
        ([{"good": "a", "bad": "b"}], 'line 1 has no "task"'),
        ([QUESTION, {"question": "q", "choices": ["x", "y"]}], 'line 2 has no "answer"'),
        ([{"question": "q", "answer": 0}], 'line 1 has no "choices"'),
        ([{"text": "some text"}, {"txt": "no"}], 'line 2 has no "text"'),
        ([{"sentence": "a"}], "line 1 is not a known kind of record"),
        (["[1, 2]"], "line 1 is not a known kind of record"),
        ([PAIR, "7"], 'line 2 has no "task"'),
        ([PAIR, "{not json}"], "line 2 is not JSON"),
        ([QUESTION | {"answer": 2}], r'line 1: "answer" must be .* 0 to 1, not 2'),
        ([QUESTION | {"answer": True}], '"answer" must be'),
        ([QUESTION | {"choices": ["x"]}], '"choices" must be a list of at least two'),
        ([{"text": "word"}], "at least two words"),
        ([PAIR | {"good": ""}], '"good" must be a non-empty string'),
        ([""], "contains no records"),
    ],
)
def test_bad_records_are_named(tmp_path, records, message):
    with pytest.raises(CalibrationError, match=message):
        read_task_file(write(tmp_path / "bad.jsonl", records))


def test_paths_and_names(tmp_path):
    write(tmp_path / "one.jsonl", [PAIR])
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.md").write_text("no task")
    files, names = find_tasks([str(tmp_path), "arc_easy"])
    assert [f.name for f in files] == ["one"] and names == ["arc_easy"]
    write(tmp_path / "sub" / "one.jsonl", [QUESTION])
    with pytest.raises(CalibrationError, match="same name: one"):
        find_tasks([str(tmp_path), str(tmp_path / "sub")])
    for wrong, message in (("two.jsonl", "no such task file"), ("sub/two", "no such task file")):
        with pytest.raises(CalibrationError, match=message):
            find_tasks([str(tmp_path / wrong)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="contains no task files"):
        find_tasks([str(tmp_path / "empty")])
    with pytest.raises(CalibrationError, match="at least 1"):
        find_tasks([], 0)


def test_a_task_that_lm_eval_does_not_know(monkeypatch):
    from lm_eval import tasks

    class Few:
        all_tasks = ("arc_easy", "piqa")

        def __init__(self, include_defaults):
            assert include_defaults  # reading all of them takes a while, so it is done for names only

    monkeypatch.setattr(tasks, "TaskManager", Few)
    with pytest.raises(CalibrationError, match="did you mean 'arc_easy'"):
        run_tasks(tiny_model(), byte_tokenizer(), ["arc_esy"])


def test_without_lm_eval_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", blocked)
    path = write(tmp_path / "one.jsonl", [PAIR])
    with pytest.raises(ResourceError, match=r"pip install 'cospadi\[eval\]'"):
        run_tasks(tiny_model(), byte_tokenizer(), [str(path)])


def test_evaluate_measures_both_models_and_needs_something_to_measure_on(tmp_path):
    first, second = (save_tiny(tmp_path / str(seed), seed=seed, dtype=torch.float32) for seed in (0, 1))
    path = write(tmp_path / "minimal.jsonl", pairs(12))
    found = evaluate(first, tasks=[str(path)], limit=6, against=second)
    alone = evaluate(second, tasks=[str(path)], limit=6, text=[tiny_text(500)], seq_len=64)
    assert found["dense_tasks"] == alone["tasks"] and found["tasks"]["minimal"]["samples"] == 6
    assert "perplexity" not in found and alone["perplexity"] > 1 and alone["harness"]["limit"] == 6
    with pytest.raises(CalibrationError, match="--tasks"):
        evaluate(first)
