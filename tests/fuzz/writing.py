"""Files are written where their paths lead, and are afterwards what they were before."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import numpy as np

from kernelmeta.data.files import write_text

PLACES = ("new", "new folder", "file", "link", "link to nothing", "pipe", "link to a pipe", "/dev/null", "folder")
NAMES = ("a", "results.json", "x" * 255, "ü" * 127, "two\nlines", " ", "-", "caf\udce9", "a" * 49, ".hidden")


def check(random: np.random.Generator, folder: Path) -> None:
    place, name = random.choice(PLACES), str(random.choice(NAMES))
    text = "é\n" * int(random.integers(0, 100_000))
    path = folder / name
    real, mode, received = path, None, []
    if place == "new folder":
        path = real = folder / "more" / "and more" / name
    elif place == "/dev/null":
        path = real = Path("/dev/null")
    elif place == "folder":
        path.mkdir()
    elif place == "file":
        path.write_text("old" * int(random.integers(0, 100)))
        mode = int(random.choice([0o600, 0o644, 0o640, 0o666, 0o755]))
        path.chmod(mode)
    elif place != "new":
        (folder / "elsewhere").mkdir()
        real = folder / "elsewhere" / "real"
        if "pipe" in place:
            os.mkfifo(real)
        elif place == "link":
            real.write_text("old")
        if place == "pipe":
            path = real
        else:
            before = path
            for i in range(int(random.integers(0, 4))):  # links to links, absolute and relative
                after = folder / f"link {i}"
                before.symlink_to(after if random.random() < 0.5 else after.name)
                before = after
            before.symlink_to(real if random.random() < 0.5 else "elsewhere/real")
    case = f"{place}, {name!r}, {len(text)} characters, mode {mode}"
    reader = threading.Thread(target=lambda: received.append(real.read_text(encoding="utf-8")))
    if "pipe" in place:
        reader.start()
    links = [p for p in folder.iterdir() if p.is_symlink()]
    try:
        write_text(path, text)
        failed = False
    except IsADirectoryError:
        failed = True
    assert failed == (place == "folder"), case
    if "pipe" in place:
        reader.join()
        assert received == [text] and stat.S_ISFIFO(real.stat().st_mode), case
    elif place == "/dev/null":
        assert stat.S_ISCHR(real.stat().st_mode), case
    elif place != "folder":
        assert real.read_text(encoding="utf-8") == text and not real.is_symlink(), case
    assert all(link.is_symlink() for link in links), case
    if mode is not None:
        assert stat.S_IMODE(path.stat().st_mode) == mode, case
    left = [p for p in folder.rglob("*") if p.name.endswith(".tmp")]
    assert not left, (case, left)
