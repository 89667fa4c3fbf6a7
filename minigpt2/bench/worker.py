"""A training process to be measured: a few steps of minigpt2, or of transformers' GPT-2, in a process of their own.

`measure` starts it; the process prints its times and its peak memory as one line of JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

__all__ = ["Job", "Result", "end_with", "measure"]


@dataclass(frozen=True)
class Job:
    """What to run."""

    library: str = "minigpt2"
    """minigpt2 or transformers."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of GPT2Config; the 124M model by default."""
    batch: int = 4
    length: int = 1024
    dropout: float = 0.1
    """All three dropouts."""
    checkpoint_every: int = 0
    """For transformers: 0 is off, anything else its gradient checkpointing."""
    recompute: str = "block"
    optimizer: str = "adamw"
    """adamw or muon; transformers always has AdamW."""
    moments: str = "fp32"
    """Those of minigpt2's AdamW: fp32, bf16 or 8bit."""
    in_backward: bool = False
    """Step minigpt2's AdamW inside the backward pass."""
    attention: str = "auto"
    """Backend; transformers always runs its sdpa attention."""
    precision: str = "fp32"
    """fp32, or what autocast computes products in: bf16 or fp16."""
    steps: int = 3
    """Steps in all, of which `warm_up` are not timed."""
    tuned: bool = False
    """Recycle memory, as train.py does (tune_allocator)."""
    threads: int | None = None
    """CPU threads; None leaves torch's own choice."""
    compile: bool = False
    """Compile minigpt2's loss, as train.py --compile does."""
    limit: int | None = None
    """The most bytes that the process may allocate; None for as many as there are."""
    profile: bool = False
    """Run the last step under PyTorch's profiler."""


@dataclass(frozen=True)
class Result:
    """What was measured, in bytes of resident memory and in seconds for each step after the warm-up."""

    baseline: int
    """Held by the interpreter with torch and the library imported."""
    peak: int
    """The most held by the process."""
    forward: list[float]
    backward: list[float]
    optimizer: list[float]
    loss: float
    """Of the last step."""
    profile: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of the last step that each operation took by itself, where `Job.profile` asked."""

    @property
    def seconds(self) -> list[float]:
        """Whole steps."""
        return [sum(parts) for parts in zip(self.forward, self.backward, self.optimizer, strict=True)]


def warm_up(steps: int) -> int:
    """How many of the first steps are not timed: two, since with the optimizer's state the memory of the second is laid
    out anew; of three or fewer, one; a single one is timed all the same."""
    return min(steps - 1, 2 if steps > 3 else 1)


def measure(job: Job) -> Result:
    """Run `job` in a process of its own; RuntimeError, with what it said, if it fails."""
    command = [sys.executable, "-m", "minigpt2.bench.worker", json.dumps(dataclasses.asdict(job)), str(os.getpid())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def end_with(parent: int) -> None:
    """End this process, whatever it is doing, soon after the one that started it has ended, by a signal for one. Not on
    Windows, where a process keeps the number of its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if sys.platform != "win32":
        threading.Thread(target=watch, daemon=True).start()


def _run(job: Job) -> Result:
    import torch

    from minigpt2.device import peak_bytes
    from minigpt2.ops.allocator import tune_allocator
    from minigpt2.training.precision import DTYPES, autocast

    cpu = torch.device("cpu")
    if job.limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (job.limit, job.limit))
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    if job.tuned:
        tune_allocator()
    torch.manual_seed(0)
    dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), job.dropout)
    model: Any
    lowered: Any
    if job.library == "transformers":
        import transformers

        baseline = peak_bytes(cpu)
        settings = job.config | dropout | {"attn_implementation": "sdpa", "use_cache": False}
        hf_config = transformers.GPT2Config(**settings)
        model = transformers.GPT2LMHeadModel(hf_config).train()
        if job.checkpoint_every:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        vocab = hf_config.vocab_size
        lowered = torch.autocast("cpu", DTYPES[job.precision], enabled=job.precision != "fp32")
    else:
        from minigpt2.config import GPT2Config
        from minigpt2.model import GPT2

        baseline = peak_bytes(cpu)
        config = GPT2Config(**(job.config | dropout))
        dial: dict[str, Any] = {"checkpoint_every": job.checkpoint_every, "recompute": job.recompute}
        model = GPT2(config, attention=job.attention, **dial)
        vocab, loss_of = config.vocab_size, model.loss
        lowered = autocast(cpu, job.precision)
        if job.compile:
            from minigpt2.training.parallel import compiled

            loss_of = compiled(model.loss)
    optimizer: Any
    if job.library == "transformers":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        from minigpt2.training.optimizer import make_optimizer

        recipe: dict[str, Any] = {"lr": 1e-4, "embedding_lr": 1e-4, "weight_decay": 0.01, "betas": (0.9, 0.999)}
        optimizer = make_optimizer(model, job.optimizer, **recipe, in_backward=job.in_backward, moments=job.moments)
        optimizer.make_state()
    ids = torch.randint(vocab, (job.batch, job.length + 1))
    times: list[list[float]] = []
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    for step_number in range(1, job.steps + 1):
        if job.profile and step_number == job.steps:
            profiler.start()
        marks = [time.perf_counter()]
        with lowered:
            if job.library == "transformers":
                loss = model(ids[:, :-1], labels=ids[:, :-1]).loss
            else:
                loss = loss_of(ids[:, :-1], ids[:, 1:])
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        times.append([b - a for a, b in itertools.pairwise(marks)])
    profile = {}
    if job.profile:
        profiler.stop()
        profile = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    timed = times[warm_up(job.steps) :]
    forward, backward, step = (list(column) for column in zip(*timed, strict=True))
    return Result(baseline, peak_bytes(cpu), forward, backward, step, loss.item(), profile)


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    print(json.dumps(dataclasses.asdict(_run(Job(**json.loads(sys.argv[1]))))))
