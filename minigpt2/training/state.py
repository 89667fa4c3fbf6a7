"""Everything that decides the future of a run, and its way to a snapshot and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minigpt2.data.batches import ORDER, Batches, fingerprint
from minigpt2.model import GPT2
from minigpt2.ops.adamw import CODES
from minigpt2.tokenizer import Tokenizer, get_tokenizer
from minigpt2.training import snapshot
from minigpt2.training.optimizer import Optimizers
from minigpt2.training.parallel import Processes
from minigpt2.training.shards import full_tensor

__all__ = ["RunState", "check_readable", "seed_of"]


class RunState:
    """Weights, optimizer (its schedule is a function of the step), loss scale, position in the data, best validation
    loss, step, settings, and the states of PyTorch's random number generators, which belong to the process.

    `settings` are JSON values, among them the `seed`.
    """

    def __init__(
        self,
        model: GPT2,
        optimizer: Optimizers,
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
        self.stale = 0
        """Validations in a row that were no better than the best."""
        self.saved_step = -1
        """The step of the last snapshot."""

    @property
    def made_by(self) -> str | None:
        """The tokenizer's fingerprint."""
        return None if self.tokenizer is None else self.tokenizer.fingerprint

    partly_moved = False
    """Whether the step that failed has moved a part of the weights."""

    def say(self, message: str) -> None:
        """Print beside the progress bar, once for all processes; a run goes on where nobody reads it any more."""
        if self.processes.main:
            with suppress(OSError):
                tqdm.write(message)
                sys.stdout.flush()

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, if it is known."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder, self.model.config.n_positions)

    def save(self, root: Path, keep: int) -> None:
        """Take a snapshot, unless this step has one, and keep the newest `keep`. Weights that are not finite, with
        which no run can go on, give none. Every process must call this."""
        if self.step == self.saved_step or not self.weights_are_finite():
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
                "order": ORDER,
                "tokenizer": self.made_by,
            },
            "codes": CODES,
            "tokens": self.tokens,
            "val_loss": self.val_loss,
            "best_val_loss": self.best,
            "stale": self.stale,
            "scaler": self.scaler.state_dict(),
            "random": self.processes.gather(snapshot.random_state(self.device)),
        }
        if main:
            own = None if self.made_by == get_tokenizer().fingerprint else self.tokenizer
            snapshot.save(root, self.step, tensors, state, keep, self.model.config.to_dict(), own)
        self.processes.wait()
        self.saved_step = self.step

    def weights_are_finite(self) -> bool:
        """Whether every weight is finite. Every process must call this."""
        largest = nn.utils.get_total_norm([p.detach() for p in self.model.parameters()], norm_type=math.inf)
        return math.isfinite(float(full_tensor(largest)))

    def restore(self, saved: snapshot.Snapshot, earlier: Collection[str] = ()) -> None:
        """Go on from a snapshot; from the next epoch if it is of other data, which must be among the `earlier`
        fingerprints. Raises SnapshotError, with nothing changed, if it is of any other, or of another tokenizer."""
        state, data = saved.state, saved.state["data"]
        same = data["fingerprint"] == self.corpus_fingerprint
        if not same and data["fingerprint"] not in earlier:
            raise snapshot.SnapshotError(f"{saved.path}: the training tokens are not the same")
        made_by = data.get("tokenizer")
        if made_by and self.made_by and made_by != self.made_by:
            raise snapshot.SnapshotError(f"{saved.path}: tokenizer {made_by} there, {self.made_by} here")
        snapshot.load_weights(self.model, saved.tensors("weights"))
        snapshot.load_optimizer(self.model, self.optimizer, saved.tensors("optimizer"))
        if state["scaler"]:  # else the run had another precision, which needs none
            self.scaler.load_state_dict(state["scaler"])
        epoch, window = (data["epoch"], data["window"]) if same else (data["epoch"] + 1, 0)
        self.batches.position = epoch * self.batches.windows + window
        self.step = self.saved_step = saved.step
        self.tokens, self.val_loss, self.best = state["tokens"], state["val_loss"], state["best_val_loss"]
        self.stale = state["stale"]
        if self.processes.rank < len(state["random"]):
            snapshot.set_random_state(state["random"][self.processes.rank], self.device)
        else:  # more processes than there were: a state that none of them had
            torch.manual_seed(seed_of(self.settings["seed"], self.step, self.processes.rank))


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def check_readable(saved: snapshot.Snapshot) -> None:
    """Raise SnapshotError if a version of minigpt2 made the snapshot that has another order of the data, or to which
    the moments in 8 bits mean something else."""
    order, codes = saved.state["data"].get("order"), saved.state.get("codes")
    if order != ORDER:
        problem = f"reads its data in another order ({order or 'one without a name'}) than this version ({ORDER})"
    elif saved.state["config"].get("moments") == "8bit" and codes != CODES:
        problem = f"has moments in other codes ({codes or 'ones without a name'}) than this version ({CODES})"
    else:
        return
    instead = "go on with the version of minigpt2 that made it, or begin a new run with --init"
    raise snapshot.SnapshotError(f"{saved.path} {problem}: {instead}")
