"""Compares an exported adapter under Hugging Face PEFT with our own runtime's figures; run by scripts/check-peft."""

import json
import pathlib
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-3

checkpoint, out = map(pathlib.Path, sys.argv[1:])
base = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32).eval()
rows = json.loads((out / "ours.json").read_text())


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


alone = [log_probabilities(base, row["ids"]) for row in rows]
adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
worst, effect, tokens = 0.0, 0.0, 0
for row, without in zip(rows, alone):
    theirs = log_probabilities(adapted, row["ids"])
    ours = torch.tensor(row["log_probabilities"])
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    worst = max(worst, (ours - theirs).abs().max().item())
    effect = max(effect, (without - theirs).abs().max().item())
    tokens += len(row["ids"])
print(
    f"{tokens} positions of {ours.shape[1]} log-probabilities: largest difference {worst:.2e} (at most {TOLERANCE:.0e}); "
    f"the adapter itself changes them by up to {effect:.2f}"
)
assert effect > 0.1, "the adapter changes too little to test anything"
sys.exit(worst > TOLERANCE)
