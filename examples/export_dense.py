"""Export a compressed checkpoint as a stock one, which loads without cospadi and is as large as the original."""

import sys

from transformers import AutoModelForCausalLM

from cospadi import compress, evaluate, export
from cospadi.embedded import model_path, stdlib_texts

out = sys.argv[1] if len(sys.argv) > 1 else "example-output/export"
small, dense = f"{out}/small", f"{out}/dense"
texts = stdlib_texts("calibration")[:4]
compress(model_path(), small, method="wanda", keep=0.8, calibration=texts, samples=16, seq_len=256)
export(small, dense)

assert AutoModelForCausalLM.from_pretrained(dense).get_submodule("model.layers.0.self_attn.q_proj").weight.ndim == 2
figures = evaluate(small, text=stdlib_texts("heldout")[:2], against=dense, seq_len=256, max_blocks=4)
print(f"perplexity {figures['perplexity']:.3f} compressed, {figures['dense_perplexity']:.3f} exported")
print(f"{figures['bytes']:,} bytes compressed, {figures['dense_bytes']:,} exported")
