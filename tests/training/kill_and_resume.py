"""Kill a run at random instants, start the same command again each time, as a batch system does, and compare it with
the run that nobody disturbed.

    python tests/training/kill_and_resume.py --kills 50
    python tests/training/kill_and_resume.py --kills 50 --text --steps 6

Prints where the kills fell and exits with 1 if a loss, a gradient norm or a weight differs in one bit. Snapshots are
taken at every step, so that many kills fall into one. With --text the run begins with a text to tokenise, every kill
but the last falls on a run of its own, and they are spread evenly from its first instant on to its last.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])  # when it is run as a script

from tiny_runs import arguments, command, environment, launch, make_inputs, outcome  # noqa: E402


def start(settings: list[str], out: Path) -> subprocess.Popen[bytes]:
    """Begin the run in `out`, or go on with it."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command(*settings, "--resume", "--out", str(out)), env=environment(), **quiet)


def wait_for_metrics(process: subprocess.Popen[bytes], out: Path, timeout: float = 60) -> None:
    """Return when the process has written to metrics.jsonl, or has ended."""
    metrics, began = out / "metrics.jsonl", time.time()
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None and time.time() - began < timeout:
        if metrics.exists() and metrics.stat().st_mtime_ns != before:
            return
        time.sleep(0.002)


def kill_and_resume(settings: list[str], folder: Path, kills: int, seed: int) -> tuple[int, int, int]:
    """Kill runs `kills` times; every run that ends must end like the undisturbed one, and the last one is let end.
    Returns the kills during start-up, those inside a snapshot, and the number of runs that ended."""
    rng = random.Random(seed)
    launch(*settings, "--snapshot-every", "0", "--out", str(folder / "reference"))
    expected = outcome(folder / "reference")
    killed = starting = inside = ended = 0
    while killed < kills or not ended:
        out = folder / f"killed-{ended}"
        process = start(settings, out)
        if killed == kills:
            assert process.wait() == 0
        elif rng.random() < 0.1:
            time.sleep(rng.uniform(0, 4))
            starting += 1
        else:
            wait_for_metrics(process, out)
            time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            process.kill()
            process.wait()
            killed += 1
            inside += bool(list(out.glob("snapshots/.*.tmp")))
        else:
            assert process.returncode == 0, f"{out}: exit status {process.returncode}"
            assert outcome(out) == expected, f"{out} differs from {folder / 'reference'}"
            ended += 1
    return starting, inside, ended


def kill_at_every_instant(settings: list[str], folder: Path, kills: int) -> int:
    """Kill as many runs, each at another instant, evenly spread from the first on over the time that a whole run takes,
    and start the same command again: each must end like the undisturbed one. Returns how many had begun no run yet."""
    began = time.perf_counter()
    launch(*settings, "--out", str(folder / "reference"))
    seconds = time.perf_counter() - began
    expected, unbegun = outcome(folder / "reference"), 0
    for k in range(kills):
        out = folder / f"killed-{k}"
        process = start(settings, out)
        try:
            process.wait(seconds * k / kills)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        unbegun += not (out / "train_config.json").exists()
        launch(*settings, "--resume", "--out", str(out))
        assert outcome(out) == expected, (
            f"{out}, killed after {seconds * k / kills:.2f} s, differs from the undisturbed"
        )
        shutil.rmtree(out)
    return unbegun


def text_settings(folder: Path, steps: int) -> list[str]:
    """Write a text of some 100 kB; the settings of a tiny run on it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(2000)))
    settings = {"data": folder / "text.txt", "n_layer": 1, "n_head": 1, "n_embd": 8, "length": 16, "batch": 2}
    return arguments(settings | {"eval_every": 2, "eval_batches": 1, "snapshot_every": 1, "max_steps": steps})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=2)
    parser.add_argument("--text", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.text:
            unbegun = kill_at_every_instant(text_settings(Path(name), options.steps), Path(name), options.kills)
            print(
                f"{options.kills} kills, {unbegun} of them before the run had begun; all ended as the undisturbed run"
            )
            return 0
        settings = make_inputs(Path(name))
        settings += arguments({"dropout": 0.1, "accumulate": 2, "checkpoint_every": options.checkpoint_every})
        settings += arguments({"snapshot_every": 1, "max_steps": options.steps, "seed": options.seed})
        try:
            starting, inside, ended = kill_and_resume(settings, Path(name), options.kills, options.seed)
        except AssertionError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    print(
        f"{options.kills} kills, {starting} of them during start-up and {inside} inside a snapshot; {ended} runs ended,"
    )
    print("each with the losses and the weights of the undisturbed run, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
