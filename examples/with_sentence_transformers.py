"""Sentence Transformers: word embeddings trained to tell topics, and to pass over the words that tell none."""

import random

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from pddm_ext.adapters.sentence_transformers import PDDMQuadrupletLoss

random.seed(0)
torch.manual_seed(0)
topics = "simmer onion butter oven", "goal referee striker league", "guitar chorus drum piano", "rain cloud frost wind"
others = ["we", "they", "always", "never", "often", "really", "today", "again", "there", "maybe", "because", "then"]
labels = torch.arange(4).repeat(100)
sentences = [" ".join(random.sample(topics[topic].split(), 2) + random.choices(others, k=10)) for topic in labels]

words = ["?", *others, *" ".join(topics).split()]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


def report(when):
    embeddings = model.encode(sentences[200:], convert_to_tensor=True)
    nearest = model.similarity(embeddings, embeddings).fill_diagonal_(-1).argmax(1)
    share = (labels[200:][nearest] == labels[200:]).float().mean()
    print(f"{when} training, the nearest new sentence is of the same topic for {share:.0%}")


report("before")
options = {"batch_sampler": "group_by_label", "learning_rate": 0.02, "learning_rate_mapping": {r"^unit\.": 0.003}}
args = SentenceTransformerTrainingArguments("output", per_device_train_batch_size=32, num_train_epochs=20, **options)
train = Dataset.from_dict({"sentence": sentences[:200], "label": labels[:200].tolist()})
SentenceTransformerTrainer(model=model, args=args, train_dataset=train, loss=PDDMQuadrupletLoss(model)).train()
report("after")
