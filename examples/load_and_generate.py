"""Load a compressed checkpoint as an ordinary transformers model and generate text."""

import sys

import torch
from transformers import AutoModelForCausalLM

import cospadi  # registers the format with transformers
from cospadi.embedded import model_path, stdlib_texts

out = sys.argv[1] if len(sys.argv) > 1 else "example-output/svd_llm"
recipe = cospadi.Recipe(method="svd_llm", keep=0.9, calibration={"samples": 16, "seq_len": 256})
cospadi.compress(model_path(), out, recipe=recipe, calibration=stdlib_texts("calibration")[:4])

model, tokenizer = cospadi.load(out, dtype=torch.bfloat16)
prompt = tokenizer("def main():\n", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(tokens[0]))

# transformers alone loads the same model, bit for bit
same = AutoModelForCausalLM.from_pretrained(out)
with torch.no_grad():
    assert torch.equal(model(**prompt).logits, same(**prompt).logits)
