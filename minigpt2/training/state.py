"""Everything that decides the future of a run, and its way to a snapshot and back."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minigpt2.data.batches import Batches, fingerprint
from minigpt2.model import GPT2
from minigpt2.tokenizer import Tokenizer
from minigpt2.training import snapshot
from minigpt2.training.parallel import Processes

__all__ = ["RunState", "seed_of"]


class RunState:
    """Weights, optimizer (its schedule is a function of the step), loss scale, position in the data, best validation
    loss, step, settings, and the states of PyTorch's random number generators, which belong to the process.

    `settings` are JSON values, among them the `seed`.
    """

    def __init__(
        self,
        model: GPT2,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        batches: Batches,
        processes: Processes,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.optimizer, self.scaler, self.batches = model, optimizer, scaler, batches
        self.processes, self.device, self.settings = processes, processes.device, settings
        self.corpus_fingerprint = fingerprint(batches.tokens)
        self.tokenizer: Tokenizer | None = None
        """What made the tokens, if that is known."""
        self.step = 0
        self.tokens = 0
        self.val_loss = self.best = math.inf
        self.saved_step = -1
        """The step of the last snapshot."""

    @property
    def made_by(self) -> str | None:
        """The tokenizer's fingerprint."""
        return None if self.tokenizer is None else self.tokenizer.fingerprint

    def say(self, message: str) -> None:
        """Print beside the progress bar, once for all processes."""
        if self.processes.main:
            tqdm.write(message)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, if it is known."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder, self.model.config.n_positions)

    def save(self, root: Path, keep: int) -> None:
        """Take a snapshot, unless this step has one, and keep the newest `keep`. Every process must call this."""
        if self.step == self.saved_step:
            return
        main = self.processes.main
        tensors = {
            "weights": snapshot.weight_tensors(self.model, keep=main),
            "optimizer": snapshot.optimizer_tensors(self.model, self.optimizer, keep=main),
        }
        epoch, window = divmod(self.batches.position, self.batches.windows)
        state = {
            "config": self.settings,
            "data": {
                "epoch": epoch,
                "window": window,
                "fingerprint": self.corpus_fingerprint,
                "tokenizer": self.made_by,
            },
            "tokens": self.tokens,
            "val_loss": self.val_loss,
            "best_val_loss": self.best,
            "scaler": self.scaler.state_dict(),
            "random": self.processes.gather(snapshot.random_state(self.device)),
        }
        if main:
            snapshot.save(root, self.step, tensors, state, keep)
        self.processes.wait()
        self.saved_step = self.step

    def resume(self, root: Path, may_differ: Collection[str]) -> list[str]:
        """Go on from the newest intact snapshot under `root`; there is nothing to do where there was none yet. Returns
        what to tell the user. Raises SnapshotError if all of them are damaged, or as `restore` does."""
        found, passed_over = snapshot.newest(root)
        if found is not None:
            self.restore(found, may_differ)
        elif passed_over:
            raise snapshot.SnapshotError(f"{root} has no intact snapshot: {'; '.join(passed_over)}")
        said = f"resuming from {found.path if found else 'the beginning: the run had no snapshot yet'}"
        return [*(f"passed over: {reason}" for reason in passed_over), said]

    def restore(self, saved: snapshot.Snapshot, may_differ: Collection[str]) -> None:
        """Go on from a snapshot. Raises SnapshotError, with nothing changed, if it is of other data or if settings
        other than `may_differ` differ."""
        state, now = saved.state, self.settings
        differ = [name for name in now if name not in may_differ and state["config"].get(name) != now[name]]
        problems = [f"{name} {state['config'].get(name)} there, {now[name]} here" for name in differ]
        if state["data"]["fingerprint"] != self.corpus_fingerprint:
            problems.append("the training tokens are not the same")
        made_by = state["data"].get("tokenizer")
        if made_by and self.made_by and made_by != self.made_by:
            problems.append(f"tokenizer {made_by} there, {self.made_by} here")
        if problems:
            raise snapshot.SnapshotError(f"{saved.path} is of another configuration: {'; '.join(problems)}")
        snapshot.load_weights(self.model, saved.tensors("weights"))
        snapshot.load_optimizer(self.model, self.optimizer, saved.tensors("optimizer"))
        self.scaler.load_state_dict(state["scaler"])
        self.batches.position = state["data"]["epoch"] * self.batches.windows + state["data"]["window"]
        self.step = self.saved_step = saved.step
        self.tokens, self.val_loss, self.best = state["tokens"], state["val_loss"], state["best_val_loss"]
        if self.processes.rank < len(state["random"]):
            snapshot.set_random_state(state["random"][self.processes.rank], self.device)
        else:  # more processes than there were: a state that none of them had
            torch.manual_seed(seed_of(self.settings["seed"], self.step, self.processes.rank))


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
