"""Renders the Glyphs data set: a class is a character, a sample is that character in one typeface.

    pip install fonttools pillow numpy
    apt-get update
    python tools/build_glyphs.py --fonts /tmp/fonts                      # what the package ships
    python tools/build_glyphs.py --fonts /tmp/fonts --large --out glyphs-large.npz

Font packages missing in the folder are downloaded into it. The same fonts give the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from glyph_faces import PACKAGES, SHIPPABLE, Face, download, family_of, find_faces
from PIL import Image, ImageDraw, ImageFont

SIZE, LONGER_SIDE = 28, 22
EM = 400  # pixels at which a glyph is drawn before the box filter
NEARLY_EQUAL = 0.06  # L1 distance as a share of the ink
STYLES_PER_FAMILY = 6
SAME_FACE, ACROSS_FACES = 0.085, 1.18  # see without_look_alikes
SHIPPED_FACES = 24
LARGE_FACES = (20, 40)  # at least, at most

META_TRAIN, META_VAL, META_TEST, BACKBONE = 0, 1, 2, 3
HELD_OUT = {"ARMENIAN": META_VAL, "GEORGIAN": META_TEST, "HEBREW": META_TEST, "THAI": META_TEST}
# Classes shipped by group. Of the groups trained on, the first number goes to the backbone, the second to
# meta-training.
SHIPPED = {
    "LATIN": (19, 15),
    "GREEK": (8, 6),
    "CYRILLIC": (9, 7),
    "KANA": (10, 8),
    "DIGIT": (3, 3),
    "SYMBOL": (7, 5),
    "ARMENIAN": (24,),
    "GEORGIAN": (16,),
    "HEBREW": (10,),
    "THAI": (14,),
}


def candidates(large: bool) -> list[str]:
    """Characters to render. Of look-alikes the earliest stays, so the scripts trained on come first."""
    latin = [(0x41, 0x5A), (0x61, 0x7A), (0x30, 0x39)]
    greek_cyrillic = [(0x391, 0x3A9), (0x3B1, 0x3C9), (0x410, 0x44F), (0x402, 0x40F), (0x452, 0x45F)]
    kana = [(0x3041, 0x3096), (0x30A1, 0x30FA)]
    symbols = "!#$%&()*+/<=>?@[\\]^{|}~£¥§©®¶¿†‡€∂∆∏∑√∞∫≈≠≤≥◊ÆØÞßæðøþıŁłŋŒœƒəɐɑɔɛɣɥɯɸʃʊʌʒʔ№™"
    more = [(0xA1, 0x17F), (0x180, 0x24F), (0x250, 0x2AF), (0x370, 0x3FF), (0x400, 0x52F), (0x2010, 0x2044)]
    more += [(0x20A0, 0x20BF), (0x2100, 0x214F), (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2500, 0x26FF)]
    held_out = [(0x531, 0x556), (0x561, 0x587), (0x10D0, 0x10F6), (0x5D0, 0x5EA), (0xE01, 0xE2E), (0xE50, 0xE59)]

    def characters(ranges: list[tuple[int, int]]) -> list[str]:
        return [chr(code) for first, last in ranges for code in range(first, last + 1)]

    trained = [*characters(latin + greek_cyrillic + kana), *symbols, *(characters(more) if large else [])]
    drawn = [c for c in dict.fromkeys(trained + characters(held_out)) if unicodedata.category(c)[0] in "LNPS"]
    # Small kana are the large ones once scaled; an accented letter is a class of the large set alone.
    drawn = [c for c in drawn if "A LETTER SMALL " not in unicodedata.name(c)]
    return drawn if large else [c for c in drawn if not unicodedata.decomposition(c)]


def group(character: str) -> str:
    """The script of a letter or numeral; else DIGIT or SYMBOL."""
    script = unicodedata.name(character).split()[0]
    script = "KANA" if script in ("HIRAGANA", "KATAKANA") else script
    if script in HELD_OUT or (script in SHIPPED and unicodedata.category(character)[0] == "L"):
        return script
    return "DIGIT" if unicodedata.category(character) == "Nd" else "SYMBOL"


def render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """[28, 28] uint8, ink 255: scaled to a longer side of 22 pixels and centred.

    None if the font draws nothing, or next to nothing (a stray mark).
    """
    left, top, right, bottom = font.getbbox(character)
    if max(right - left, bottom - top) > 8 * EM:
        return None
    drawn = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    ImageDraw.Draw(drawn).text((4 - left, 4 - top), character, fill=255, font=font)
    box = drawn.getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < EM // 12:
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    side = round(max(width, height) * SIZE / LONGER_SIDE)
    canvas = Image.new("L", (side, side))
    canvas.paste(drawn.crop(box), ((side - width) // 2, (side - height) // 2))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def difference(one: np.ndarray, many: np.ndarray) -> np.ndarray:
    """L1 distance of an image from each of several, as a share of their mean ink."""
    one, many = one.astype(np.float32), many.astype(np.float32)
    return np.abs(one - many).sum((-2, -1)) / ((one.sum() + many.sum((-2, -1))) / 2)


class Samples:
    """The images kept of one character."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self.faces: list[int] = []
        self.families: Counter[str] = Counter()

    def offer(self, image: np.ndarray, face: int, family: str) -> None:
        """Keeps the image if it is new and its family has room."""
        if self.families[family] == STYLES_PER_FAMILY:
            return
        if self.images and difference(image, np.stack(self.images)).min() < NEARLY_EQUAL:
            return
        self.images.append(image)
        self.faces.append(face)
        self.families[family] += 1

    def keep(self, rows: list[int]) -> None:
        self.images = [self.images[row] for row in rows]
        self.faces = [self.faces[row] for row in rows]


def draw_all(characters: list[str], faces: list[Face], most: int) -> dict[str, Samples]:
    """Every character in up to `most` distinct faces."""
    drawn = {character: Samples() for character in characters}
    for number, face in enumerate(faces):
        family = family_of(face)
        wanted = [c for c in characters if ord(c) in face.characters and len(drawn[c].images) < most]
        if not wanted:
            continue
        font = ImageFont.truetype(str(face.path), EM, face.index, layout_engine=ImageFont.Layout.BASIC)
        try:
            missing = render(font, "\U0010ffff")  # draws .notdef
            for character in wanted:
                image = render(font, character)
                if image is None:
                    continue
                if missing is not None and difference(image, missing[None])[0] < NEARLY_EQUAL:
                    continue
                drawn[character].offer(image, number, family)
        except OSError as error:
            print(f"skipped the rest of {face.name}: {error}")
    return drawn


def directions(images: list[np.ndarray]) -> np.ndarray:
    """[n, 784]: the images blurred twice by (1 2 1) both ways, each of length 1."""
    blurred = np.stack(images).astype(np.float32)
    for _ in range(2):
        padded = np.pad(blurred, ((0, 0), (1, 1), (1, 1)))
        rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
        blurred = rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]
    flat = blurred.reshape(len(blurred), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def without_look_alikes(drawn: dict[str, Samples]) -> dict[str, Samples]:
    """Of characters that look alike only the first.

    Two look alike if their cosine distance within one face is below SAME_FACE (median over the faces that
    have both, at least five), or if the distance from one face's to another's is below ACROSS_FACES times
    that between two faces of the same character (medians).
    """
    kept: dict[str, tuple[np.ndarray, list[int], float]] = {}
    for character, samples in drawn.items():
        rows, row_of = directions(samples.images), {face: row for row, face in enumerate(samples.faces)}
        spread = float(np.median(1 - rows @ rows.T))
        for other, other_faces, other_spread in kept.values():
            distance = 1 - rows @ other.T
            shared = [(row_of[face], column) for column, face in enumerate(other_faces) if face in row_of]
            if len(shared) >= 5 and np.median([distance[pair] for pair in shared]) < SAME_FACE:
                break
            if np.median(distance) < ACROSS_FACES * (spread + other_spread) / 2:
                break
        else:
            kept[character] = rows, samples.faces, spread
    return {character: drawn[character] for character in kept}


def drop_shared_images(drawn: dict[str, Samples]) -> None:
    """Drops images nearly equal to one of another class: small capitals, placeholders, wrong code points."""
    owner = [(c, row) for c, samples in drawn.items() for row in range(len(samples.images))]
    images = np.stack([drawn[c].images[row] for c, row in owner])
    labels = np.array([ord(c) for c, _ in owner])
    rows = directions(list(images))
    shared = set()
    for start in range(0, len(rows), 1000):
        close = rows[start : start + 1000] @ rows.T > 0.98
        close &= labels[start : start + 1000, None] != labels
        for first in np.flatnonzero(close.any(1)):
            if difference(images[start + first], images[close[first]]).min() < NEARLY_EQUAL:
                shared.add(owner[start + first])
    for character, samples in drawn.items():
        samples.keep([row for row in range(len(samples.images)) if (character, row) not in shared])


def choose(available: list[str], large: bool) -> dict[str, int]:
    """The split of every class that goes into the set, sorted by split, then by code point."""
    chosen: dict[str, int] = {}
    for name, counts in SHIPPED.items():
        members = [c for c in available if group(c) == name]
        members.sort(key=lambda character: hashlib.sha256(character.encode()).hexdigest())
        if large:
            half = len(members) // 2
            counts = (len(members),) if name in HELD_OUT else (len(members) - half, half)
        if sum(counts) > len(members):
            raise SystemExit(f"{name}: {sum(counts)} classes are wanted, these fonts give {len(members)}")
        splits = (HELD_OUT[name],) if name in HELD_OUT else (BACKBONE, META_TRAIN)
        for split, count in zip(splits, counts, strict=True):
            chosen.update(dict.fromkeys(members[:count], split))
            members = members[count:]
    return dict(sorted(chosen.items(), key=lambda entry: (entry[1], entry[0])))


def write(path: Path, drawn: dict[str, Samples], split: dict[str, int], faces: list[Face]) -> list[Face]:
    """Writes the set; returns the faces in it, in the order of the file's `face_names`."""
    numbers = [number for c in split for number in drawn[c].faces]
    used = sorted(set(numbers), key=lambda number: faces[number].name)
    place = {number: index for index, number in enumerate(used)}
    np.savez_compressed(
        path,
        images=np.stack([image for c in split for image in drawn[c].images]),
        labels=np.repeat(np.arange(len(split), dtype=np.uint16), [len(drawn[c].images) for c in split]),
        class_names=np.array([unicodedata.name(c) for c in split]),
        class_split=np.array(list(split.values()), dtype=np.uint8),
        faces=np.array([place[number] for number in numbers], dtype=np.uint16),
        face_names=np.array([faces[number].name for number in used]),
    )
    return [faces[number] for number in used]


def face_table(used: list[Face]) -> str:
    """Markdown: every family of the set with its styles, licence and package."""
    families: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for face in used:
        families[face.family, face.licence or "not stated", face.package].append(face.style)
    lines = ["| family | styles | licence | Debian package |", "|---|---|---|---|"]
    for (family, licence, package), styles in sorted(families.items()):
        lines.append(f"| {family} | {', '.join(sorted(styles))} | {licence} | {package} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Renders the Glyphs data set.")
    parser.add_argument("--fonts", type=Path, required=True, help="folder of unpacked font packages")
    parser.add_argument("--out", type=Path, help="default: the file that the package ships")
    parser.add_argument("--large", action="store_true", help="all classes, 20 to 40 faces each, of any licence")
    parser.add_argument("--faces", type=Path, help="also write the table of faces (Markdown) here")
    arguments = parser.parse_args()
    if arguments.large and arguments.out is None:
        parser.error("--large needs --out: not all of its faces' licences allow shipping it")
    out = arguments.out or Path(__file__).parents[1] / "kernelmeta/data/glyphs.npz"
    least, most = LARGE_FACES if arguments.large else (SHIPPED_FACES, SHIPPED_FACES)

    download(PACKAGES, arguments.fonts)
    faces = [face for face in find_faces(arguments.fonts) if arguments.large or face.licence in SHIPPABLE]
    drawn = draw_all(candidates(arguments.large), faces, LARGE_FACES[1])
    print(f"{len(faces)} faces, {len(drawn)} characters")
    drawn = without_look_alikes({c: samples for c, samples in drawn.items() if len(samples.images) >= least})
    print(f"{len(drawn)} characters of at least {least} faces after merging look-alikes")
    drop_shared_images(drawn)
    drawn = {c: samples for c, samples in drawn.items() if len(samples.images) >= least}
    for samples in drawn.values():
        samples.keep(list(range(min(most, len(samples.images)))))
    split = choose(list(drawn), arguments.large)
    used = write(out, drawn, split, faces)
    if arguments.faces:
        arguments.faces.write_text(face_table(used) + "\n")
    for (code, name), count in sorted(Counter((split[c], group(c)) for c in split).items()):
        print(f"split {code} {name}: {count} classes of {sum(group(c) == name for c in drawn)}")
    print(f"{out}: {len(split)} classes, {len(used)} faces, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
