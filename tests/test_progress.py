"""Progress: a bar on a terminal that ends at 100%, and elsewhere lines that are few and say what a reader wants."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest
from terminal import on_a_terminal
from tiny_runs import arguments, command, environment, make_inputs

import train
from minigpt2 import progress
from minigpt2.progress import Progress, of_downloads
from minigpt2.training.metrics import Steps

SHORT = {"max_steps": 12, "snapshot_every": 0, "eval_every": 6}


def test_lines_come_after_the_first_step_at_intervals_and_at_the_end(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    with Progress(total=100, desc="counting", unit=" sheep") as bar:
        for _ in range(100):
            now += 2
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("counting: 1 of 100 sheep, ")
    assert lines[-1].startswith("counting: 100 of 100 sheep, ")
    assert all(line.endswith(" left") for line in lines)
    counts = [int(line.split()[1]) for line in lines[:-1]]
    assert {after - before for before, after in itertools.pairwise(counts)} == {progress.EVERY / 2}


def test_a_single_step_is_a_single_line(capsys):
    with Progress(total=1, desc="counting") as bar:
        bar.update()
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_done_is_all_there_was(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(total=8, desc="reading") as bar:  # of which some could not be read
        bar.update(5)
        bar.finish()
    assert "reading: 100%" in capsys.readouterr().err.split("\r")[-1]


def test_nothing_is_printed_where_it_is_not_asked_for(capsys):
    with Progress(total=2, disable=True) as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("variables", "lines"), [({}, 2), ({"TQDM_DISABLE": "1"}, 0), ({"TQDM_MININTERVAL": "60"}, 1)], ids=str
)
def test_variables_of_tqdm_hold(variables, lines):
    source = "from minigpt2.progress import Progress; import time; bar = Progress(total=9); "
    source += "time.sleep(0.2); bar.update(); bar.update(8); bar.close()"
    env = {key: value for key, value in os.environ.items() if not key.startswith("TQDM_")} | variables
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", lines)
    assert "\r" not in done.stderr


def test_a_log_of_a_run_has_lines_of_step_losses_speed_and_time_left(monkeypatch, capsys, tmp_path):
    settings = [*make_inputs(tmp_path), *arguments(SHORT | {"out": tmp_path / "run"}), "--no-tune-allocator"]
    monkeypatch.setattr(sys, "argv", ["train.py", *settings])
    assert train.main() == 0
    log = capsys.readouterr().err
    number, clock = r"[\d,.]+", r"[\d:]+"
    shown = rf"step (\d+)/12, loss {number}, validation {number}, {number} tokens/s, peak {number} GiB"
    lines = re.findall(rf"^{shown}, {clock} gone, {clock} left$", log, re.MULTILINE)
    assert lines[-1] == "12"
    assert len(lines) <= 3
    assert "\r" not in log


def test_a_process_that_is_to_show_nothing_counts_its_steps_all_the_same(capsys):
    with Steps(total=2, initial=0, disable=True) as bar:
        bar.show({"loss": 1.0, "tokens_per_second": 1.0, "peak_memory_gib": 1.0}, 1.0)
        bar.finish()
    assert capsys.readouterr() == ("", "")


def test_the_bars_of_a_terminal_end_at_100_percent_within_its_width(tmp_path):
    texts, tokens = tmp_path / "texts", tmp_path / "words"
    texts.mkdir()
    (texts / "a.txt").write_text("the cat sat on the mat\n" * 2000)
    (texts / "b.txt").write_bytes(b"\xff\xfe" * 2000)  # which is no text, and is left out
    run = command(*make_inputs(tmp_path), *arguments(SHORT | {"out": tmp_path / "run"}))
    prepare = [sys.executable, "-m", "minigpt2", "prepare", "--data", str(texts), "--out", str(tokens)]
    for words, said in ((run, "tokens/s]"), (prepare, "B/s]")):
        status, output = on_a_terminal(words, environment())
        assert status == 0
        states = [state for state in re.split(r"[\r\n]+", output) if "%|" in state]
        assert "100%" in states[-1]
        assert states[-1].rstrip().endswith(said)
        assert max(map(len, states)) <= 80


def test_downloads_show_the_same_where_huggingface_hub_can_and_may(monkeypatch):
    def old(repo_id, filename): ...
    def new(repo_id, filename, tqdm_class=None): ...

    assert of_downloads(old) == {}
    assert of_downloads(new) == {"tqdm_class": Progress}
    monkeypatch.setattr("huggingface_hub.utils.are_progress_bars_disabled", lambda: True)
    assert of_downloads(new) == {}
