"""From a pretrained model to a compressed cache, step by step, on the default model.

python examples/tutorial.py
"""

import torch

import matkv
from matkv import data
from matkv.evaluate import evaluate

# 1. A model. Any decoder of the hub, a directory or a .gguf file; this one needs no hub.
model, tokenizer = matkv.load_model("smollm2-135m")

# 2. Text to calibrate on, cut into windows of 512 tokens, and other text to score.
train = data.text_windows(tokenizer, data.read_texts("default", "train"), 512, 8192)
held_out = data.text_windows(tokenizer, data.read_texts("default", "validation"), 512, 2048)

# 3. One pass over the text gives ordered bases for every layer and KV head.
artifact = matkv.calibrate(model, data.batches(train, 8))
artifact.save("runs/tutorial")

# 4. What does a budget cost? Perplexity and bytes of a token, beside the full cache.
for row in evaluate(model, artifact, held_out, [0.875, 0.75, 0.5]):
    name = "full cache" if row.budget is None else f"{row.budget:.1%}"
    print(f"{name:>10}  {row.bytes_per_token:6,} bytes a token  perplexity {row.perplexity:.1f}")

# 5. Generate with three quarters of the cache. attach() is all it takes; detach() undoes it.
matkv.attach(model, artifact, budget=0.75)
inputs = tokenizer("The lighthouse was built in", return_tensors="pt")
cache = matkv.LatentCache(model)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(output[0]))
print(f"{cache.used_nbytes:,} bytes hold {cache.get_seq_length()} tokens")

# 6. Ranks may differ from layer to layer and between keys and values: here values keep less.
table = matkv.RankTable.uniform_sides(artifact.geometry, key_budget=0.875, value_budget=0.625)
matkv.attach(model, artifact, ranks=table)
print(f"keys {table.share('key'):.1%}, values {table.share('value'):.1%}, all {table.budget:.1%}")
with torch.inference_mode():
    print(model(**inputs).logits.shape)
matkv.detach(model)
