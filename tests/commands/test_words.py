"""What the commands say of themselves: help, completion, what is missing, and how they end."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import refused, start

from kernelmeta.cli import main, parser
from kernelmeta.command_line import GROUPS


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_ctrl_c_while_the_command_is_imported_is_no_traceback():
    for library in ("_multiarray_umath", "libtorch_cpu"):
        process = start("info")
        while process.poll() is None and library not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate()
        assert (process.returncode, out, errors) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
@pytest.mark.parametrize("args", [("info",), ("--version",), ("completion", "bash"), ("train", "--help")])
def test_that_nobody_reads_on_is_no_error(args):
    """``kernelmeta info | head -1``"""
    if args[0] == "completion":
        pytest.importorskip("shtab", reason="shtab is not installed (kernelmeta[completion])")
    process = start(*args)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() in (0, 141)


@pytest.mark.parametrize("option", ["--device", "--out", "--way", "--data"])
def test_two_dashes_are_no_value(capsys, bank_file, option):
    assert f"argument {option}: expected a value, got --" in refused(
        capsys, "train", "--data", bank_file, f"{option}=--"
    )


def test_a_shell_completes_commands_and_options(capsys):
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    asked = f'{script}\nCOMP_WORDS=(kernelmeta extract --pre) COMP_CWORD=2\n_shtab_kernelmeta\necho "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--precision"]


@pytest.mark.parametrize("words", [["train"], ["--help"], ["info"], ["--version"]])
def test_without_what_it_needs_the_command_says_so(words):
    blocked = f"import sys; sys.modules.update(tqdm=None, PIL=None); sys.argv[1:] = {words}"
    blocked += "; from kernelmeta.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    if words in (["info"], ["--version"]):
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("kernelmeta ")
    else:
        assert done.returncode == 2
        assert done.stderr == "kernelmeta: error: the command needs tqdm, pillow: pip install 'kernelmeta[train]'\n"


def test_info_says_what_runs(capsys):
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


def test_what_a_name_or_a_terminal_cannot_show_is_no_reason_to_fail(run, tmp_path, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    json_file = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.json")
    assert main(["evaluate", str(run), "--episodes", "4", "--quiet", "--json", json_file]) == 0
    output.flush()
    assert b"\\xb1" in output.buffer.getvalue()
    assert Path(json_file).exists()


def test_no_command_and_help(capsys):
    assert "required: COMMAND" in refused(capsys)
    assert "(see kernelmeta evaluate --help)" in refused(capsys, "evaluate", "run", "--eval-episodes", "200")
    assert "(see kernelmeta --help)" in refused(capsys, "--colour")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    assert "--tasks-per-step" in capsys.readouterr().out


COMMANDS = next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_in_parts_and_ends_with_a_command_to_copy(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    parts = [line[:-1] for line in text.splitlines() if re.fullmatch(r"[a-z]+:", line)]
    assert [part for part in parts if part in GROUPS] == [part for part in GROUPS if part in parts]
    assert text.splitlines()[0].startswith(f"usage: kernelmeta {name}")
    example = text.splitlines()[-1].split()
    assert example[:2] == ["kernelmeta", name]
    assert parser().parse_args(example[1:]).command == name
    for action in COMMANDS[name]._actions:
        assert action.help, action.dest


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_whole_words_placeholders_in_capitals_and_the_choices(capsys, monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for action in COMMANDS[name]._actions:
        assert " ".join(action.help.replace("%%", "%").split()) in text, action.dest
        if action.nargs == 0:
            continue
        shown = action.metavar or "{" + ",".join(action.choices) + "}"
        assert shown != "X", action.dest
        assert shown.startswith("{") or shown.replace("glyphs", "").isupper(), action.dest
        assert all(str(choice) in text for choice in action.choices or ()), action.dest
    assert ("--device {cpu,cuda}" in text) == ("--device" in COMMANDS[name]._option_string_actions)


def test_what_python_warns_of_is_a_line_of_the_command():
    program = """
import sys, warnings
from kernelmeta.cli import main
from kernelmeta.commands import info

info._info = lambda args: warnings.warn("one\\ntwo", RuntimeWarning)
sys.exit(main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "kernelmeta info: warning: one two\n")


def test_the_settings_of_a_training_stand_where_one_looks_for_them(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    places = {"--weights": "data", "--shot": "episodes", "--inner-lr": "learner", "--momentum": "optimizer",
              "--update-tau": "update", "--resume": "run"}  # fmt: skip
    for option, part in places.items():
        assert re.findall(r"^([a-z]+):$", text[: text.index(f"  {option} ")], re.MULTILINE)[-1] == part
