"""The commands `plot` and `watch` explain themselves, and say in one line why they can't run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from runs import run_of
from test_log_reader import write

from fusedopt.__main__ import main

for needed in ("matplotlib", "rich"):
    pytest.importorskip(needed)


@pytest.mark.parametrize("command", [["plot"], ["watch", "--once"]])
@pytest.mark.parametrize("kind", ["text", "missing", "folder", "empty", "header only"])
def test_what_is_no_log_is_one_line_and_status_2(tmp_path, capsys, command, kind):
    path = tmp_path / "file.jsonl"
    if kind == "text":
        path.write_text("hello\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_text("")
    elif kind == "header only":
        whole = write(tmp_path / "whole.jsonl", run_of(2))
        path.write_text(whole.read_text().splitlines()[0] + "\n")
    status = main([*command, str(path)])
    printed = capsys.readouterr()
    if command[0] == "watch" and kind in ("empty", "header only"):  # it may yet become one
        assert status == 0 and "no steps yet" in printed.out
        return
    assert status == 2
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and str(path) in printed.err
    assert not path.with_suffix(".png").exists()


@pytest.mark.parametrize(("command", "package"), [("plot", "matplotlib"), ("watch", "rich")])
def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch, command, package):
    log = write(tmp_path / "run.jsonl", run_of(5))
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main([command, str(log)]) == 2
    error = f"python -m fusedopt: {command} needs {package}: pip install {package}\n"
    assert capsys.readouterr().err == error


def test_plot_and_watch_are_not_imported_with_fusedopt():
    code = (
        "import sys, fusedopt; "
        "print([n for n in ('matplotlib', 'rich', 'tensorboard') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_names_the_subcommands(capsys):
    for command in ("plot", "watch"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"usage: python -m fusedopt {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    assert "plot LOG" in help_text and "watch LOG" in help_text
