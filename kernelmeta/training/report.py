"""A page about answers, complete in itself: the least certain first, with images, plots and settings."""

from __future__ import annotations

import base64
import html
import io
import os
from pathlib import Path

from kernelmeta.data.decoding import decode
from kernelmeta.data.files import write_text
from kernelmeta.training.prediction import COLUMNS, Prediction

MOST_ROWS = 500
_THUMBNAIL = 96  # pixels
_BINS = 10
_MOST_BARS = 40  # of a plot
_MOST_LETTERS = 32  # of a name beside a bar
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem; }
tr { border-bottom: 1px solid #ddd; }
.warning { background: #fff3cd; border: 1px solid #e0c46c; padding: .6rem 1rem; border-radius: .3rem; }
figure { display: inline-block; vertical-align: top; margin: 0 2rem 1rem 0; }
img { max-width: 96px; max-height: 96px; display: block; }
"""


def write_report(path: str | os.PathLike[str], prediction: Prediction) -> None:
    """Write the page, whole or not at all. It asks for nothing from elsewhere. Raises OSError."""
    rows = prediction.rows()
    order = sorted(range(len(rows)), key=lambda i: (rows[i][2], i))[:MOST_ROWS]
    shown = "" if len(order) == len(rows) else f" The {len(order)} least certain of {len(rows)} are shown."
    warnings = [text for text in (prediction.mixed, prediction.doubt) if text is not None]
    doubt = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in warnings)
    settings = "".join(_row(name, value) for name, value in prediction.settings.items())
    if prediction.accuracy is not None:
        right = f"{prediction.accuracy:.1f} %{prediction.apart}"
        settings += _row("right, of the rows that were labelled already", right)
    fitted = prediction.settings.get("temperature", "1") != "1"
    calibrated = (
        ", with the temperature that was fitted on validation episodes"
        if fitted
        else ", and not calibrated: look at the order, not at the number"
    )
    with_images = prediction.query.files is not None
    lines = "".join(_line(prediction, rows[i], i) for i in order)
    counts = dict.fromkeys(prediction.classes, 0)
    for _, label, _, _ in rows:
        counts[label] += 1
    bins = [0] * _BINS
    for _, _, p, _ in rows:
        bins[min(int(p * _BINS), _BINS - 1)] += 1
    certainty = {f"{i / _BINS:.1f} to {(i + 1) / _BINS:.1f}": n for i, n in enumerate(bins)}
    columns = ("", *COLUMNS) if with_images else COLUMNS
    head = "".join(f"<th>{name.replace('_', '-')}</th>" for name in columns)
    write_text(
        path,
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Answers of {html.escape(prediction.method)}</title>
<style>{_STYLE}</style></head><body>
<h1>{len(rows)} answers of {html.escape(prediction.method)}</h1>
{doubt}
{_bars("Answers of each class", counts)}{_bars("How certain they are", certainty)}
<h2>Settings</h2>
<table>{settings}</table>
<h2>The least certain first</h2>
<p>A probability is the method's own{calibrated}.{shown}</p>
<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>
</body></html>
""",
    )


def _row(name: str, value: object) -> str:
    return f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"


def _line(prediction: Prediction, row: tuple[str, str, float, str], i: int) -> str:
    name, label, p, other = row
    image = "" if prediction.query.files is None else f"<td>{_thumbnail(prediction.query.files[i])}</td>"
    return (
        f"<tr>{image}<td>{html.escape(name)}</td><td>{html.escape(label)}</td>"
        f"<td>{p:.3f}</td><td>{html.escape(other)}</td></tr>"
    )


def _thumbnail(path: Path) -> str:
    image = decode(path)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _bars(title: str, counts: dict[str, int]) -> str:
    """Horizontal bars, drawn as SVG; of very many the longest, in their order."""
    shown = sorted(counts, key=counts.__getitem__, reverse=True)[:_MOST_BARS]
    if len(shown) < len(counts):
        title = f"{title} (the {len(shown)} most frequent of {len(counts)})"
        counts = {name: n for name, n in counts.items() if name in set(shown)}
    longest = min(max(map(len, counts), default=0), _MOST_LETTERS)
    height, left, width = 18, 24 + 7 * longest, 240
    most = max([1, *counts.values()])
    bars = "".join(
        f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{_shortened(name)}</text>'
        f'<rect x="{left}" y="{y + 2}" width="{width * n / most:.1f}" height="{height - 4}" fill="#4a6fa5"/>'
        f'<text x="{left + width * n / most + 4:.1f}" y="{y + 13}">{n}</text>'
        for y, (name, n) in zip(range(0, height * len(counts), height), counts.items(), strict=True)
    )
    size = f'width="{left + width + 60}" height="{height * len(counts)}"'
    return f'<figure><figcaption>{title}</figcaption><svg {size} font-size="12">{bars}</svg></figure>'


def _shortened(name: str) -> str:
    """A name that fits beside a bar; a pointer that rests on it shows it whole."""
    if len(name) <= _MOST_LETTERS:
        return html.escape(name)
    return f"{html.escape(name[: _MOST_LETTERS - 1])}…<title>{html.escape(name)}</title>"
