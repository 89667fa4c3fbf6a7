"""Kill a run at random instants, resume it each time, and compare it with the run that nobody disturbed.

    python tests/training/kill_and_resume.py --kills 50

Prints where the kills fell and exits with 1 if a loss, a gradient norm or a weight differs in one bit. Snapshots are
taken at every step, so that many kills fall into one.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])  # when it is run as a script

from tiny_runs import arguments, command, environment, launch, make_inputs, outcome  # noqa: E402


def start(settings: list[str], out: Path) -> subprocess.Popen[bytes]:
    """Begin the run in `out`, or go on with it."""
    resume = ["--resume"] if (out / "train_config.json").exists() else settings
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command(*resume, "--out", str(out)), env=environment(), **quiet)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
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
