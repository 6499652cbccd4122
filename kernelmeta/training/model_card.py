"""What somebody should know who gets a learner from somebody else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelmeta.training.learners import TITLES
from kernelmeta.training.loading import at_text
from kernelmeta.training.settings import size_words
from kernelmeta.version import __version__

_WHERE = ("data", "weights", "backbone", "update_from")  # paths on the machine of the training


def model_card(name: str, settings: Mapping[str, Any], results: Mapping[str, Any] | None) -> str:
    """Markdown: what it is, how accurate, how to load it, what it is for, and how it was trained.

    Args:
        name: the class in `kernelmeta.nn`.
        settings: what `kernelmeta.training.loading.load_learner` returned.
        results: what `kernelmeta.training.evaluation.evaluate` returned; None if it was not evaluated.
    """
    title, ways = TITLES[settings["learner"]], size_words(settings["way"])
    lines = [
        "---", "library_name: kernelmeta", "tags: [few-shot-learning, meta-learning]", "---", "",
        f"# {title}, {ways} classes", "",
        f"A few-shot learner: from a few labelled rows of each of {ways} classes to labels for other rows.",
        "Rows are features, not images: they must come from the backbone that it was trained on.", "",
        "```py", "import kernelmeta as km  # pip install kernelmeta", "",
        f'head = km.nn.{name}.from_pretrained("THIS FOLDER")',
        "logits = head(support, labels, query)  # [T, S, D], [T, S], [T, Q, D] -> [T, Q, N]",
        'classifier = km.FewShotClassifier(weights="THIS FOLDER")  # the same for scikit-learn', "```", "",
    ]  # fmt: skip
    if results is not None:
        what = f"{results['way']}-way {results['shot']}-shot episodes, {results['query_balance']} queries"
        lines += [f"## Accuracy on {results['episodes']:,} {what}", "", "| learner | accuracy, % |", "|---|---|"]
        lines += [
            f"| {TITLES[baseline]} | {row['accuracy']:.2f} ± {row['ci95']:.2f} |"
            for baseline, row in results["baselines"].items()
        ]
        lines += [f"| **{title}** | {results['accuracy']:.2f} ± {results['ci95']:.2f} |", ""]
        lines += [
            f"± is half of the 95 % interval. Classes of the {results['split']} split, none of them trained on.",
            "",
        ]
    which = at_text(dict(settings))
    lines += [
        "## Intended use", "",
        "Research, and labels that somebody looks at. With other features, classes or numbers of labelled rows the",
        "accuracy is another one: evaluate it on your own. A learner that looks at the query rows together takes them",
        "for a fair sample of all classes, and is worse where they are not.", "",
        "## Training", "", *([f"Weights: {which}.", ""] if which else []),
        "| setting | |", "|---|---|",
        *(f"| `{key}` | {value} |" for key, value in settings.items() if value is not None and key not in _WHERE),
        "", f"Written by kernelmeta {__version__}.", "",
    ]  # fmt: skip
    return "\n".join(lines)
