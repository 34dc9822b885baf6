"""From a pretrained model to a compressed cache, step by step, in a few minutes on two CPU cores.

python examples/tutorial.py
python examples/tutorial.py --model DIRECTORY --train a.txt --held-out b.txt
"""

import argparse

import torch

import matkv
from matkv import data
from matkv.distill.config import DistillConfig
from matkv.distill.stage import distill
from matkv.evaluate.texts import evaluate

parser = argparse.ArgumentParser(description="A model's cache, compressed step by step.")
parser.add_argument("--model", default="smollm2-135m", help="hub id, directory or .gguf file")
parser.add_argument("--train", default="default", help="text to calibrate, train and search on")
parser.add_argument("--held-out", default="default", help="other text, to score")
parser.add_argument("--out", default="runs/tutorial", help="artifact directory to write")
args = parser.parse_args()

# 1. A model. Any decoder of the hub, a directory or a .gguf file; the default one needs no hub.
model, tokenizer = matkv.load_model(args.model)

# 2. Text, cut into windows: some to learn from, some that is only scored.
train = data.text_windows(tokenizer, data.read_texts(args.train, "train"), 256, 8192)
held_out = data.text_windows(tokenizer, data.read_texts(args.held_out, "validation"), 512, 2048)

# 3. Calibrate: one pass over the text gives ordered bases for every layer and KV head.
calibrated = matkv.calibrate(model, data.batches(train, 8))

# 4. Distill: train the bases, so that quality falls slowly. A few steps here; recipes have more.
recipe = DistillConfig(steps=8, batch_size=4, warmup_steps=2)
artifact = distill(model, calibrated, train, recipe)
artifact.save(args.out)

# 5. What does a budget cost? Perplexity and bytes of a token, beside the full cache.
for name, one in (("calibrated", calibrated), ("distilled", artifact)):
    for row in evaluate(model, one, held_out, [0.75, 0.5], full_cache=one is calibrated):
        kept = "full cache" if row.budget is None else f"{row.budget:.1%} {name}"
        print(
            f"{kept:>17}  {row.bytes_per_token:6,} bytes a token  perplexity {row.perplexity:.1f}"
        )

# 6. Generate with three quarters of the cache. attach() is all it takes.
artifact = matkv.Artifact.load(args.out)
matkv.attach(model, artifact, budget=0.75)
inputs = tokenizer("The lighthouse was built in", return_tensors="pt")
cache = matkv.LatentCache(model)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(output[0]))
print(f"{cache.used_nbytes:,} bytes hold {cache.get_seq_length()} tokens")

# 7. Ranks may differ from layer to layer, head to head and side to side: `allocate` finds the best
# ones, any others can be given. detach() gives the model back as it was.
table = matkv.RankTable.uniform_sides(artifact.geometry, key_budget=0.875, value_budget=0.625)
matkv.attach(model, artifact, ranks=table)
print(f"keys {table.share('key'):.1%}, values {table.share('value'):.1%}, all {table.budget:.1%}")
with torch.inference_mode():
    print(model(**inputs).logits.shape)
matkv.detach(model)
