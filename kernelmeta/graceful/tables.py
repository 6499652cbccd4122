"""Results of updates, to read: Markdown."""

from __future__ import annotations

from typing import Any

PAIRS = {
    "old_old": "old in old",
    "new_old": "new in old (nothing indexed anew)",
    "new_new": "new in new",
    "free_free": "free in free",
    "free_old": "free in old",
}


def update_table(results: dict[str, Any]) -> str:
    """Errors and flips, retrieval, and the backfill curve.

    Args:
        results: what `judge_update` returns.
    """
    flips = results["flips"]
    kind = "that no model was trained on" if results["held_out"] else "that a model may have been trained on"
    lines = [
        f"{results['images']} images {kind}, {results['classes']} classes; in percent.",
        "",
        row("error, old", "error, new", "negative flips", "positive flips", "relative NFR"),
        row(*("---:" for _ in range(5))),
        row(
            *(f"{flips[name]:.2f}" for name in ("error_old", "error_new", "negative", "positive")),
            "" if flips["relative_negative"] is None else f"{flips['relative_negative']:.2f}",
        ),
    ]
    for title, key in (("Known classes", "known"), ("Classes that no model was trained on", "unseen")):
        found = results[key]
        if not found:
            continue
        lines += ["", f"{title}: {found['queries']} queries, {found['gallery']} items in the gallery.", ""]
        lines += [row("queries, gallery", "top-1", "mean average precision"), row("---", "---:", "---:")]
        for pair, text in PAIRS.items():
            if found.get(pair):
                lines.append(row(text, *(f"{found[pair][m]:.2f}" for m in ("top1", "mean_average_precision"))))
        if found.get("free_free"):
            for name, text in (("update_gain", "update gain, share"), ("tax", "compatibility tax, points")):
                values = (found[name][m] for m in ("top1", "mean_average_precision"))
                lines.append(row(text, *("" if value is None else f"{value:.2f}" for value in values)))
        if "backfill" in found:
            lines += ["", row("indexed anew", *(f"{100 * one['share']:.0f} %" for one in found["backfill"]))]
            lines.append(row("---", *("---:" for _ in found["backfill"])))
            for metric, text in (("top1", "top-1"), ("mean_average_precision", "mean average precision")):
                lines.append(row(text, *(f"{one[metric]:.2f}" for one in found["backfill"])))
    return "\n".join(lines) + "\n"


def search_table(results: dict[str, Any]) -> str:
    """The networks that were chosen, trained anew, beside the gallery's own and a free one.

    Args:
        results: what `Search.run` returns.
    """
    large = results["gallery"]
    lines = [
        f"Top-1 retrieval in percent, {results['queries']} queries, {results['items']} items in the gallery. M(g,g) of"
        f" {large['backbone']}: {large['scores']['top1']:.2f}, {2e-6 * large['operations']:.2f} MFLOPs an image.",
        "",
        row("chosen by", "architecture", "MFLOPs", "times cheaper", "M(q,q)", "M(q,g)"),
        row("---", "---", *("---:" for _ in range(4))),
    ]
    for name, found in results["chosen"].items():
        lines.append(
            row(
                f"random search, {results['reward']}" if name == "random" else f"evolution, {name}",
                found["architecture"],
                f"{2e-6 * found['operations']:.2f}",
                f"{found['cost_ratio']:.1f}",
                *(f"{found['scores'][pair]['top1']:.2f}" for pair in ("query_query", "query_gallery")),
            )
        )
    free = results["free"]
    scores = (f"{free['scores'][pair]['top1']:.2f}" for pair in ("query_query", "query_gallery"))
    lines.append(row("trained without the gallery", free["architecture"], "", "", *scores))
    return "\n".join(lines) + "\n"


def row(*cells: str) -> str:
    """A line of a table.

    Args:
        cells: of it.
    """
    return f"| {' | '.join(cells)} |"
