"""Train a LoRA adapter on a compressed model; use it there and on the dense export. Needs PEFT (`cospadi[lora]`)."""

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from cospadi import compress, load
from cospadi.checkpoint import export_dense
from cospadi.embedded import model_path, stdlib_texts

out = sys.argv[1] if len(sys.argv) > 1 else "example-output/lora"
compress(model_path(), f"{out}/small", method="rtn", keep=0.3, calibration=[stdlib_texts("calibration")[0][:5000]])
export_dense(f"{out}/small", f"{out}/dense", dtype="float32")

model, tokenizer = load(f"{out}/small", dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
text = tokenizer(stdlib_texts("calibration")[1], return_tensors="pt").input_ids[:, :128]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
model.train()
for step in range(6):
    loss = model(text, labels=text).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, 5):
        print(f"step {step + 1}: loss {loss.item():.3f}")
model.save_pretrained(f"{out}/adapter")

prompt = text[:, :32]
with torch.no_grad():
    trained = model.eval()(prompt).logits
    for base in ("small", "dense"):
        again = PeftModel.from_pretrained(load(f"{out}/{base}", dtype=torch.float32)[0], f"{out}/adapter")
        print(f"reloaded on {base}: logits differ by {(again(prompt).logits - trained).abs().max():.1e}")
    merged = again.merge_and_unload()  # the dense export takes any adapter
    print(f"merged into dense: logits differ by {(merged(prompt).logits - trained).abs().max():.1e}")
