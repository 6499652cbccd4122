"""A comparison, to read: Markdown."""

from __future__ import annotations

from typing import Any

from kernelmeta.training.comparison import describe


def cell_title(cell: dict[str, Any]) -> str:
    """ "5 shots, dirichlet:2 queries", say."""
    known = ", proportions known" if cell["proportions_known"] else ""
    return f"{cell['shot']} shot{'s' if cell['shot'] > 1 else ''}, {cell['query_balance']} queries{known}"


def markdown(results: dict[str, Any]) -> str:
    """One table of accuracies, and the differences to every other learner below; from what `Comparison.run` returns."""
    titles, cells = results["titles"], results["cells"]
    lines = [
        f"Accuracy in percent, {results['way']}-way, {results['query']} queries a class, mean of"
        f" {results['eval_episodes']} episodes of the test classes, the same for all; ± is the 95 % interval."
        f" Settings were chosen on the validation classes. Data: {results['source'] or results['data']}.",
        "",
        _row("", *(cell_title(cell) for cell in cells)),
        _row("---", *("---:" for _ in cells)),
    ]
    for name, title in titles.items():
        values = (cell["learners"][name] for cell in cells)
        lines.append(_row(title, *(f"{v['accuracy']:.2f} ± {v['ci95']:.2f}" for v in values)))
    for names, what in (
        (results["assume_even"], "assume that all classes have equally many query rows"),
        (results["take_proportions"], "are told the proportions of the classes where they are known, the others not"),
    ):
        if names:
            lines += ["", f"These {what}: {', '.join(titles[name] for name in names)}."]
    if len(titles) > 1:
        lines += ["", "Differences, row minus column, paired by episode; bold where the interval leaves out 0."]
    for cell in cells if len(titles) > 1 else ():
        lines += ["", _row(cell_title(cell), *titles.values()), _row("---", *("---:" for _ in titles))]
        for a, title in titles.items():
            lines.append(_row(title, *(_difference(cell["pairs"][a].get(b)) for b in titles)))
    for cell in cells:
        for name, title in titles.items():
            if bad := cell["learners"][name].get("not_finite"):
                lines += [
                    "",
                    f"{cell_title(cell)}, {title}: {bad} query rows have NaN or infinite logits; they count as wrong.",
                ]
    lines += ["", "Chosen:", ""]
    for cell in cells:
        for name, title in titles.items():
            chosen = cell["learners"][name]["chosen"]
            lines.append(f"* {cell_title(cell)}, {title}: {describe(chosen)}")
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _difference(pair: dict[str, float] | None) -> str:
    if pair is None:
        return ""
    text = f"{pair['difference']:+.2f} ± {pair['difference_ci95']:.2f}"
    return f"**{text}**" if abs(pair["difference"]) > pair["difference_ci95"] else text
