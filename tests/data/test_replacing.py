"""Writing a file, wherever its path leads: pipes, devices, links, other owners, killed writers."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernelmeta.data.files import write_json, write_text
from kernelmeta.data.replacing import replacing, sweep
from kernelmeta.data.tensor_files import read_tensors, write_tensors
from kernelmeta.training.plots import training_plot

WRITERS = {
    "text": lambda path: write_text(path, "content"),
    "JSON": lambda path: write_json(path, {"content": 1}),
    "tensors": lambda path: write_tensors(path, {"content": torch.zeros(3)}, {"content": "yes"}),
    "a plot": lambda path: training_plot(path, "content", [1, 2], [1, 2], [3, 4]),
}


def read_pipe(path: Path, write) -> bytes:
    """What arrives at the other end of a pipe."""
    content: list[bytes] = []
    reader = threading.Thread(target=lambda: content.append(path.read_bytes()))
    reader.start()
    write(path)
    reader.join(10)
    return content[0]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_pipe_is_written_into_and_stays_one(tmp_path, kind):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("pipe")
    WRITERS[kind](tmp_path / "file")
    for path in (pipe, tmp_path / "link"):
        assert read_pipe(path, WRITERS[kind]) == (tmp_path / "file").read_bytes()
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "pipe"]


def test_a_pipe_whose_reader_goes_is_an_error_that_names_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: open(pipe, "rb").close())
    reader.start()
    with pytest.raises(BrokenPipeError) as raised:
        write_text(pipe, "x" * (1 << 20))
    reader.join(10)
    assert raised.value.filename == str(pipe) and str(raised.value.strerror) == "nobody reads it any more"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_device_is_written_into_and_stays_one(kind, tmp_path):
    for device in ("/dev/null", tmp_path / "link"):
        if device != "/dev/null":
            device.symlink_to("/dev/null")
        WRITERS[kind](device)
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_device_is_an_error():
    with pytest.raises(OSError, match="No space left"):
        write_text("/dev/full", "content" * 10_000)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_of_a_link_the_target_is_written_and_the_link_stays(tmp_path, kind, there):
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "real"
    if there:
        target.write_text("old")
    (tmp_path / "between").symlink_to("disk/real")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "between")
    WRITERS[kind](link)
    assert link.is_symlink() and (tmp_path / "between").is_symlink() and not target.is_symlink()
    assert target.read_bytes()[:4] not in (b"old", b"")
    assert os.listdir(tmp_path / "disk") == ["real"]


def test_links_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "a", "content")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def in_child(code: Callable[[], object]) -> int:
    """Runs a function in a process of its own; returns its number."""
    child = os.fork()
    if child == 0:
        try:
            code()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("to", ["pipe", "file"])
def test_standard_output_is_written_into_in_its_order(tmp_path, path, to):
    (tmp_path / "link").symlink_to("/dev/stdout")

    def print_and_write():
        os.dup2(output, 1)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        print("before")
        write_text(tmp_path / path, "content\n")  # an absolute path stays what it is
        print("after")
        sys.stdout.flush()

    if to == "pipe":
        result, output = os.pipe()
    else:
        output = os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT)
        result = os.open(tmp_path / "output", os.O_RDONLY)
    os.waitpid(in_child(print_and_write), 0)
    os.close(output)
    with os.fdopen(result) as found:
        assert found.read().split() == ["before", "content", "after"]
    assert len(os.listdir(tmp_path)) == (2 if to == "file" else 1)


def test_a_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        write_text(tmp_path, "content")
    assert caught.value.filename == str(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755, 0o2644])
def test_the_mode_of_a_file_stays(tmp_path, mode):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    write_text(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)


def test_a_hard_link_keeps_the_old_content(tmp_path):
    (tmp_path / "file").write_text("old")
    os.link(tmp_path / "file", tmp_path / "backup")
    write_text(tmp_path / "file", "new")
    assert ((tmp_path / "file").read_text(), (tmp_path / "backup").read_text()) == ("new", "old")


needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to be others")


@needs_root
def test_the_owner_of_a_file_stays(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    os.chown(path, 1234, 5678)
    path.chmod(0o640)
    write_text(path, "new")
    found = path.stat()
    assert (path.read_text(), found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == ("new", 1234, 5678, 0o640)


def as_nobody(code: Callable[[], object]) -> str:
    """Runs a function as another user; what went wrong, if anything."""

    def become_nobody():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            code()
            os.write(write, b"done")
        except OSError as error:
            os.write(write, type(error).__name__.encode())

    read, write = os.pipe()
    child = in_child(become_nobody)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as said:
        return said.read()


@needs_root
def test_another_owners_file_is_written_into_if_it_may_be(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    theirs = tmp_path / "theirs"
    theirs.write_text("old")
    theirs.chmod(0o666)
    assert as_nobody(lambda: write_text(theirs, "new")) == "done"
    assert (theirs.read_text(), theirs.stat().st_uid, stat.S_IMODE(theirs.stat().st_mode)) == ("new", 0, 0o666)
    theirs.chmod(0o644)
    assert as_nobody(lambda: write_text(theirs, "newer")) == "PermissionError"
    assert theirs.read_text() == "new"
    (tmp_path / "closed").mkdir(mode=0o755)
    inside = tmp_path / "closed" / "file"
    inside.write_text("old")
    inside.chmod(0o666)
    assert as_nobody(lambda: write_text(inside, "new")) == "done"
    assert inside.read_text() == "new"
    assert as_nobody(lambda: write_text(tmp_path / "closed" / "other", "new")) == "PermissionError"
    assert os.listdir(tmp_path / "closed") == ["file"]


@needs_root
def test_a_file_that_is_read_only_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    path = tmp_path / "file"
    path.write_text("old")
    os.chown(path, 65534, 65534)
    path.chmod(0o444)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o777)
    assert as_nobody(lambda: write_text(path, "new")) == "PermissionError"
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["file", "x" * 250, "ü" * 100])
def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path, name):
    def write_and_die():
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(3):
        _, status = os.waitpid(in_child(write_and_die), 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert len(os.listdir(tmp_path)) == 1
    write_text(tmp_path / name, "content")
    assert os.listdir(tmp_path) == [name]


def test_what_somebody_is_writing_stays(tmp_path):
    path = tmp_path / "file"

    def write_slowly():
        with replacing(path) as temporary:
            temporary.write_text("half")
            os.write(began, b"x")
            os.read(go_on, 1)
            temporary.write_text("whole")

    (begun, began), (go_on, tell) = os.pipe(), os.pipe()
    child = in_child(write_slowly)
    os.read(begun, 1)
    write_text(path, "content")
    sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == 2
    os.write(tell, b"x")
    os.waitpid(child, 0)
    for end in (begun, began, go_on, tell):
        os.close(end)
    assert (path.read_text(), os.listdir(tmp_path)) == ("whole", ["file"])


def test_other_peoples_hidden_files_stay(tmp_path):
    for name in (".file.tmp", ".file.0123456789ab.temp", "file.0123456789ab.tmp", ".file.0123456789xy.tmp"):
        (tmp_path / name).write_text("theirs")
    write_text(tmp_path / "file", "content")
    sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == 5


def test_a_reader_of_a_mapped_file_keeps_it(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.arange(100_000)}, {})
    mapped = read_tensors(path)[0]["a"]
    write_tensors(path, {"a": torch.zeros(3)}, {})
    assert torch.equal(mapped, torch.arange(100_000))


def test_many_writers_of_one_file_leave_one_of_theirs(tmp_path):
    path = tmp_path / "file"

    def write_often(letter: str):
        for _ in range(100):
            write_text(path, letter * 5000)
        os.write(done, letter.encode())

    ended, done = os.pipe()
    children = [in_child(lambda letter=letter: write_often(letter)) for letter in "ab"]
    os.set_blocking(ended, False)
    finished = b""
    deadline = time.monotonic() + 60
    while len(finished) < 2 and time.monotonic() < deadline:
        if path.exists():
            assert path.read_text() in ("a" * 5000, "b" * 5000)
        with contextlib.suppress(BlockingIOError):
            finished += os.read(ended, 2)
    for child in children:
        os.waitpid(child, 0)
    assert sorted(finished) == [97, 98]
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_while_writing_into_a_pipe_leaves_nothing(tmp_path):
    def write_and_fail():
        with replacing("/dev/null") as temporary:
            temporary.write_text("half")
            seen.append(temporary)
            raise OSError(28, "No space left on device")

    seen: list[Path] = []
    with pytest.raises(OSError, match="No space left"):
        write_and_fail()
    assert not seen[0].exists()
