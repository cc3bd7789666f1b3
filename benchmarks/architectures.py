"""Take a tiny random model of many architectures through compress, open, generate, export and prune.

    python benchmarks/architectures.py                     # all; finished rows are kept
    python benchmarks/architectures.py --only llama,opt    # these again
    python benchmarks/architectures.py --page              # only rewrite the table of docs/architectures.md

Needs neither GPU nor network, and about two seconds per architecture. Configurations are those of transformers, shrunk
by the fields in SMALL; OWN holds what an architecture needs besides. Weights are random and in bfloat16; logits are
compared in float32. A stage that stops with a message of ours is "refused", any other exception is a "fault".
"""

import argparse
import importlib
import json
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

import cospadi
from cospadi.model_view import discover_layers

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- table: benchmarks/architectures.py -->", "<!-- end of table -->"
COMPRESS: dict[str, Any] = {"method": "svd_llm", "keep": 0.6, "samples": 4, "seq_len": 32}
REMOVED = 1
NEW_TOKENS = 8
SECONDS = 240
"""Limit of one architecture."""

VOCABULARY = 257
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "sliding_window": 8,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "rotary_dim": 8,
    "attention_window_size": 8,
    "lru_width": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "chunk_size": 16,
    "n_groups": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "block_auto_adjust_ff_dim": False,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
"""Fields that are set wherever a configuration has them."""

HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
CONVOLUTIONS = ["conv", "full_attention", "conv", "full_attention"]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
SMALL_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
OWN: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 4, "n_head": 4},
    "falcon": {"num_kv_heads": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "minicpm3": {"num_key_value_heads": 4},
    "youtu": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "global_head_dim": 8},
    "kimi_linear": {"layer_types": HYBRID, "num_key_value_heads": 4},
    "granitemoehybrid": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "xlstm": {"num_blocks": 4, "num_heads": 4, "hidden_size": 128},
    "gpt_bigcode": {"n_inner": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8, "num_layers": 4},
    "lfm2": {"layer_types": CONVOLUTIONS},
    "lfm3": {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layer_types": ["mamba", "attention", "mlp", "attention", "mamba"], "num_hidden_layers": 5},
    "bamba": {"attn_layer_indices": [1]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2, "max_seq_len": 128},
    "xglm": {"d_model": 32, "num_layers": 4, "attention_heads": 4, "max_position_embeddings": 512},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
    "qwen3_5_text": {"layer_types": HYBRID},
    "recurrent_gemma": {"num_hidden_layers": 6},
}

TEXT_MODELS = """
    llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text gemma3n_text gemma4_text phi phi3 opt gpt2
    gpt_neo gpt_neox gptj gpt_bigcode bloom falcon mpt xglm codegen olmo olmo2 olmo3 smollm3 stablelm starcoder2
    cohere cohere2 granite nemotron ernie4_5 exaone4 exaone glm glm4 helium arcee apertus seed_oss diffllama
    persimmon biogpt hunyuan_v1_dense internlm3 ministral3 vaultgemma nanochat bitnet jais2 youtu minicpm3
    gpt_neox_japanese hyperclovax iquestcoder lara_mini kolibri1 flint mellum dory doge granite_swa openai-gpt
    qwen3_5_text lfm2 lfm3 bamba falcon_h1 nemotron_h mamba2 zamba2 olmo_hybrid mamba falcon_mamba jamba
    recurrent_gemma rwkv xlstm mixtral qwen3_moe qwen3_next gpt_oss deepseek_v3 granitemoehybrid llama4_text
    kimi_linear
""".split()  # noqa: SIM905
"""Model types that `AutoModelForCausalLM` makes."""


def for_type(kind: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """A configuration of transformers with small values in every field that it has."""
    default = AutoConfig.for_model(kind)
    fields = default.to_dict() | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    fields |= {name: fields.get(own) for name, own in default.attribute_map.items()}
    known = {
        name: value
        for name, value in SMALL.items()
        if fields.get(name) is not None and not isinstance(getattr(type(default), name, None), property)
    }
    return AutoConfig.for_model(kind, **(known | OWN.get(kind, {}) | overrides))


def vision(kind: str, text: dict[str, Any], tower: dict[str, Any], **more: Any) -> transformers.PreTrainedConfig:
    default = AutoConfig.for_model(kind).get_text_config()
    small = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    return AutoConfig.for_model(kind, text_config=small | text, vision_config=tower, **more)


def mtp(folder: Path) -> None:
    """Tensors of a head for several tokens, which the model's class does not take."""
    file = folder / "model.safetensors"
    extra = {f"mtp.layers.0.{name}.weight": torch.ones(32, 32, dtype=torch.bfloat16) for name in ("eh_proj", "norm")}
    save_file(load_file(file) | extra, file, {"format": "pt"})


def auto_map(folder: Path) -> None:
    """A configuration that names code of its own, which must never run."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    file.write_text(json.dumps(config), encoding="utf-8")
    (folder / "modeling_own.py").write_text("raise RuntimeError('code of a checkpoint ran')\n", encoding="utf-8")


Make = Callable[[], transformers.PreTrainedConfig]
OTHERS: dict[str, tuple[str, Make, Callable[[Path], None] | None]] = {
    "gemma3 with vision": (
        "Gemma3ForConditionalGeneration",
        lambda: vision(
            "gemma3",
            {},
            SMALL_VISION,
            mm_tokens_per_image=4,
            image_token_index=200,
            boi_token_index=201,
            eoi_token_index=202,
        ),
        None,
    ),
    "qwen3_5 with vision": (
        "Qwen3_5ForConditionalGeneration",
        lambda: vision(
            "qwen3_5",
            {"layer_types": HYBRID},
            {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
            }
            | {"num_position_embeddings": 16},
            image_token_id=200,
        ),
        None,
    ),
    "llama with mtp.* tensors": ("LlamaForCausalLM", lambda: for_type("llama"), mtp),
    "llama with auto_map": ("LlamaForCausalLM", lambda: for_type("llama"), auto_map),
    "llama, classifier, tied": (
        "LlamaForSequenceClassification",
        lambda: for_type("llama", tie_word_embeddings=True, num_labels=3),
        None,
    ),
    "mistral, base model": ("MistralModel", lambda: for_type("mistral"), None),
    "phi3 with longrope": (
        "Phi3ForCausalLM",
        lambda: for_type("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32),
        None,
    ),
}
NAMES = [*OTHERS, *TEXT_MODELS]


def tiny(name: str, folder: Path) -> PreTrainedModel:
    """A random model, saved in bfloat16 as transformers releases it, with a byte-level tokenizer."""
    sys.path.insert(0, str(ROOT / "tests"))
    tokenizer = importlib.import_module("tiny").byte_tokenizer()
    torch.manual_seed(0)
    edit = None
    if name in OTHERS:
        kind, make, edit = OTHERS[name]
        model = getattr(transformers, kind)._from_config(make(), dtype=torch.bfloat16)
    else:
        model = transformers.AutoModelForCausalLM.from_config(for_type(name), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif parameter_name.endswith("bias") and "dt" not in parameter_name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if edit:
        edit(folder)
    return model


def ids() -> torch.Tensor:
    return torch.randint(0, 190, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def output(model: PreTrainedModel) -> torch.Tensor:
    """Logits, or the last hidden states of a base model, of a few tokens."""
    found = model(input_ids=ids(), attention_mask=torch.ones_like(ids()), **no_cache(model))
    return (found.logits if getattr(found, "logits", None) is not None else found[0]).float()


def no_cache(model: PreTrainedModel) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


@torch.no_grad()
def continued(model: PreTrainedModel) -> list[list[int]] | None:
    """Greedy tokens, or None for a model that does not predict tokens."""
    if not model.can_generate():
        return None
    tokens = model.generate(
        ids(),
        attention_mask=torch.ones_like(ids()),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return tokens[:, ids().shape[1] :].tolist()


def opened(kind: str, folder: Path) -> PreTrainedModel:
    """The checkpoint, in the class that its original has.

    Raises:
        RuntimeError: if weights are missing or left over, apart from what is left out by the class itself.
    """
    model, info = getattr(transformers, kind).from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder), dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise RuntimeError(
            f"missing {sorted(info['missing_keys'])[:3]}, mismatched {sorted(info['mismatched_keys'])[:3]}"
        )
    return model.eval()


@contextmanager
def passing(model: PreTrainedModel, removed: list[int]) -> Iterator[None]:
    """Blocks run, but what they pass on is their input."""

    def pass_on(_block: Any, args: Any, kwargs: Any, out: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *out[1:]) if isinstance(out, tuple) else states

    handles = [
        block.register_forward_hook(pass_on, with_kwargs=True)
        for index, block in enumerate(discover_layers(model).layers)
        if index in removed
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Timeout(BaseException):
    """Not an Exception, so that no stage takes it for its own."""


def stage(row: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """Run one stage and note "ok", the line of a refusal, or a fault."""
    try:
        found = work()
    except cospadi.CospadiError as error:
        row[name] = f"refused: {error}"
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr)
        row[name] = f"fault: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:400]
    else:
        row[name] = "ok"
        return found
    return None


def measure(name: str, work: Path) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"name": name}
    begin = time.monotonic()
    model = stage(row, "make", lambda: tiny(name, work / "model"))
    if model is None:
        return row
    kind = type(model).__name__
    row |= {"class": kind, "model_type": model.config.model_type}
    texts = ["def main():\n    return 'the quick brown fox'\n" * 40]
    quiet: dict[str, Any] = {"progress": False, "device": "cpu", "calibration": texts}
    begin = time.monotonic()
    if stage(row, "compress", lambda: cospadi.compress(work / "model", work / "small", **COMPRESS, **quiet)):
        compressed(row, kind, work)
    if stage(
        row,
        "prune",
        lambda: cospadi.prune(
            work / "model", work / "pruned", method="shortgpt", blocks=REMOVED, samples=4, seq_len=32, **quiet
        ),
    ):
        stage(row, "prune", lambda: pruned(row, kind, work))
    row["seconds"] = round(time.monotonic() - begin, 1)
    return row


def compressed(row: dict[str, Any], kind: str, work: Path) -> None:
    """Open, generate, export, and compare with the export."""
    config = json.loads((work / "small" / "config.json").read_text(encoding="utf-8"))
    row["same_class"] = config["architectures"] == [kind] and "auto_map" not in config
    report = json.loads((work / "small" / "report.json").read_text(encoding="utf-8"))
    layers = sum(len(group["modules"]) for group in report["groups"])
    row |= {"compressed_layers": layers, "other_tensors_changed": changed(work / "model", work / "small") - layers}
    small = stage(row, "open", lambda: opened(kind, work / "small"))
    if small is None:
        return
    tokens = stage(row, "generate", lambda: continued(small))
    if not small.can_generate() and row["generate"] == "ok":
        row["generate"] = "none: it predicts no tokens"
    if stage(row, "export", lambda: cospadi.export(work / "small", work / "dense", dtype="float32")) is None:
        return
    dense = stage(row, "export", lambda: opened(kind, work / "dense"))
    if dense is None:
        return
    stage(row, "export", lambda: compared(row, small, dense, work))
    if tokens is not None:
        row["same_tokens"] = tokens == continued(dense)


def compared(row: dict[str, Any], small: PreTrainedModel, dense: PreTrainedModel, work: Path) -> None:
    """Outputs of the compressed model, its export and the original."""
    expected, found = output(dense), output(small)
    row |= {
        "largest_difference": float((found - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "change": float((output(opened(row["class"], work / "model")) - expected).abs().max()),
    }


def changed(original: Path, result: Path) -> int:
    """How many tensors of the original the result does not hold byte for byte, perhaps under another name."""
    before, after = (
        Counter(
            (str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            for file in folder.glob("*.safetensors")
            for tensor in load_file(file).values()
        )
        for folder in (original, result)
    )
    return (before - after).total()


def pruned(row: dict[str, Any], kind: str, work: Path) -> None:
    """Open the pruned checkpoint and compare it with the original whose blocks pass on their input."""
    removed = json.loads((work / "pruned" / "report.json").read_text(encoding="utf-8"))["prune"]["removed"]
    less = opened(kind, work / "pruned")
    continued(less)
    whole = opened(kind, work / "model")
    with passing(whole, removed):
        row["pruned_difference"] = float((output(whole) - output(less)).abs().max())


def limited(name: str) -> dict[str, Any]:
    def stop(*_: Any) -> None:
        raise Timeout(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return json.loads(json.dumps(measure(name, Path(folder))).replace(folder + "/", ""))
    except Timeout as error:
        return {"name": name, "make": f"fault: {error}"}
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas: measured again")
    parser.add_argument("--page", action="store_true", help="only write the page's table")
    options = parser.parse_args()
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": []}
    rows = {row["name"]: row for row in stored["rows"] if row["name"] in NAMES}
    again = [name for name in options.only.split(",") if name]
    todo = [] if options.page else again or [name for name in NAMES if name not in rows]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in todo:
        rows[name] = limited(name)
        print(json.dumps(rows[name]), flush=True)
        store(rows)
    page = PAGE.read_text(encoding="utf-8")
    before, _, after = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables([*rows.values()])}{END}{after.partition(END)[2]}", encoding="utf-8")


def tables(rows: list[dict[str, Any]]) -> str:
    """The page's tables: of what works, and of what is refused with which line."""
    rows = sorted(rows, key=lambda row: NAMES.index(row["name"]))
    through = [row for row in rows if "largest_difference" in row]
    refused = [row for row in rows if row not in through or row["prune"] != "ok"]
    lines = ["## What works", "", "| model | class | layers | difference | logit | tokens | pruned |"]
    lines.append("|---|---|---:|---:|---:|---|---:|")
    for row in through:
        tokens = {True: "same", False: "differ", None: "–"}[row.get("same_tokens")]
        pruned = f"{row['pruned_difference']:.1g}" if "pruned_difference" in row else "refused"
        lines.append(
            f"| {row['name']} | {row['class']} | {row['compressed_layers']} | {row['largest_difference']:.1e} | "
            f"{row['largest_logit']:.2g} | {tokens} | {pruned} |"
        )
    lines += ["", "## What is refused", "", "| model | compress | prune |", "|---|---|---|"]
    for row in refused:
        said = [_said(row, name) for name in ("compress", "prune")]
        lines.append(f"| {row['name']} | {said[0]} | {said[1]} |")
    return "\n".join(lines) + "\n\n"


def _said(row: dict[str, Any], name: str) -> str:
    """The line of a refusal without the class, which says what the row is."""
    line = row.get(name, row["make"]).removeprefix("refused: ").removeprefix(row.get("class", "") + ": ")
    return line if line == "ok" else f"`{line}`"


def store(rows: dict[str, dict[str, Any]]) -> None:
    data = {
        "command": "python benchmarks/architectures.py",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cospadi": cospadi.__version__,
        },
        "hardware": "CPU",
        "seed": 0,
        "compress": COMPRESS,
        "prune": {"method": "shortgpt", "blocks": REMOVED},
        "rows": [rows[name] for name in NAMES if name in rows],
    }
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
