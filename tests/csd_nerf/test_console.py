"""What a run says, and how it ends when something fails."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from nerfstudio.utils import rich_utils

from csd_2d.io.images import read_image
from csd_nerf.console import Progress, quiet_nerfstudio, say, told


def ending(fail) -> str:
    with pytest.raises(SystemExit) as end, told("csd-edit"):
        fail()
    return str(end.value.code)


def test_errors_of_this_package_are_their_own_message(tmp_path):
    assert ending(lambda: read_image(tmp_path / "no.png")) == f"csd-edit: no such image: {tmp_path / 'no.png'}."


@pytest.mark.parametrize(
    ("fail", "kind"),
    [
        (lambda: {}["fl_x"], "KeyError: 'fl_x'"),
        (lambda: np.pad(np.zeros(2), -1), "ValueError: index can't contain negative values"),
        (lambda: (_ for _ in ()).throw(AssertionError), "AssertionError"),
        (lambda: [][1], "IndexError: list index out of range"),
    ],
    ids=["KeyError", "ValueError", "AssertionError", "IndexError"],
)
def test_any_other_error_is_a_sentence_and_its_traceback_lies_in_a_file(fail, kind):
    message = ending(fail)
    before, _, file = message.partition(" (the traceback, for a report of this bug, is in ")
    assert before == f"csd-edit: stopped by {kind}"
    report = Path(file.removesuffix(")."))
    assert "Traceback (most recent call last)" in report.read_text() and kind.split(":")[0] in report.read_text()
    report.unlink()


def test_tracebacks_come_through_on_demand(monkeypatch):
    monkeypatch.setenv("CSD_TRACEBACK", "1")
    with pytest.raises(KeyError), told("csd-edit"):
        {}["fl_x"]


@pytest.mark.parametrize("verbose", [False, True])
def test_nerfstudio_is_quiet_unless_asked(verbose, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_nerfstudio(verbose):
            rich_utils.CONSOLE.print("nerfstudio's")
            say("ours")
            warnings.warn_explicit("torch's", FutureWarning, "file.py", 1, module="torch.nn")
    said = capsys.readouterr().out
    assert "ours" in said and ("nerfstudio's" in said) == bool(caught) == verbose
    rich_utils.CONSOLE.print("afterwards")
    assert "afterwards" in capsys.readouterr().out


def test_a_line_is_a_line_and_brackets_are_brackets(capsys):
    text = "a [long] path " * 40
    say(text)
    assert capsys.readouterr().out == text + "\n"


def test_progress_off_a_terminal_is_a_line_for_each_tenth(capsys):
    with Progress("training", 5, 40) as progress:
        for _ in range(35):
            progress.step_done()
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "training: step 8 of 40" and len(out.splitlines()) == 9
    assert not err
