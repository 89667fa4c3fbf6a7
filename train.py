"""Train a GPT-2, or fine-tune one.

`python train.py` trains a small model for about two minutes on a 2-core machine, on the sources of Python's standard
library, which are on every user's disk. `python train.py --help` lists the settings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from minigpt2.attention import resolve_backend
from minigpt2.config import GPT2Config
from minigpt2.data import Batches, DataError, Tokens, in_order, load_corpus
from minigpt2.model import GPT2
from minigpt2.tokenizer import END_OF_TEXT, get_tokenizer


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT-2 from scratch, or fine-tune one with --init."""

    data: Path | None = None
    """UTF-8 text: a file, or a folder of files. Default: the Python standard library's own sources."""
    out: Path | None = None
    """Run folder, which must not hold a run yet. Default: a new folder under runs/, named by the time."""
    init: str | None = None
    """Start from these weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder. Default: a fresh model."""
    n_layer: int = 6
    """Blocks of a fresh model."""
    n_head: int = 6
    """Attention heads of a fresh model."""
    n_embd: int = 192
    """Width of a fresh model."""
    dropout: float = 0.0
    """All three dropouts: embedding, residual, attention. OpenAI trained with 0.1."""
    batch: int = 8
    """Sequences in a micro-batch."""
    length: int = 256
    """Tokens in a sequence; also the context length of a fresh model."""
    accumulate: int = 1
    """Micro-batches in a step."""
    max_steps: int = 150
    """Optimizer steps."""
    lr: float = 2e-3
    """Peak learning rate; a cosine brings it down to a tenth."""
    warmup: int = 10
    """Steps of linear warm-up to the peak learning rate."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    clip: float = 1.0
    """Clip the norm of the gradient to this; 0 is off."""
    checkpoint_every: int = 0
    """Recomputation: 0 is off; k = 1..n_layer keeps one activation every k blocks and recomputes n_layer - k."""
    attention: str = "auto"
    """Attention backend: auto, eager, sdpa or fused."""
    eval_every: int = 50
    """Steps between validations; there is one before the first step and one after the last in any case."""
    eval_batches: int = 8
    """Batches of a validation."""
    seed: int = 0
    """Decides initial weights, dropout and the order of the data."""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the best there is."""

    def check(self) -> None:
        """Raise ValueError with every setting that is out of range."""
        problems = []
        at_least = dict.fromkeys(("n_layer", "n_head", "n_embd", "batch", "length", "accumulate", "max_steps"), 1)
        at_least |= dict.fromkeys(("eval_every", "eval_batches"), 1)
        at_least |= dict.fromkeys(("warmup", "seed", "weight_decay", "clip", "lr"), 0)
        for name, least in at_least.items():
            value = getattr(self, name)
            if not least <= value < math.inf:
                problems.append(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
        if not 0 <= self.dropout < 1:
            problems.append(f"--dropout must be in [0, 1), got {self.dropout}")
        if problems:
            raise ValueError("; ".join(problems))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine from lr to lr / 10 at the last step. `step` counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.max_steps - 1 - config.warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_model(config: TrainConfig, device: torch.device) -> GPT2:
    """The model to train, in training mode on its device."""
    dropout: dict[str, Any] = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), config.dropout)
    dials: dict[str, Any] = {"checkpoint_every": config.checkpoint_every, "attention": config.attention}
    if config.init is not None:
        model = GPT2.from_pretrained(config.init, **dials, **dropout)
    else:
        shape = GPT2Config(
            n_positions=config.length, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, **dropout
        )
        model = GPT2(shape, **dials)
    if config.length > model.config.n_positions:
        raise ValueError(f"--length {config.length} exceeds the model's context length {model.config.n_positions}")
    resolve_backend(config.attention, device.type, torch.float32, model.config.head_dim)  # raises if it cannot serve
    return model.to(device).train()


def make_optimizer(model: GPT2, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices (weights and embeddings) and leaves biases and LayerNorms alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def evaluate(model: GPT2, tokens: Tokens, config: TrainConfig, device: torch.device) -> float:
    """Mean loss over the same validation windows each time. Draws no random numbers."""
    model.eval()
    total, count = 0.0, 0
    for input_ids, targets in in_order(tokens, config.batch, config.length, config.eval_batches):
        total += model.loss(input_ids.to(device), targets.to(device)).item() * targets.numel()
        count += targets.numel()
    model.train()
    return total / count


def peak_memory(device: torch.device) -> float:
    """GiB: the most this process has held so far (resident), or that its tensors have held on a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def train(model: GPT2, batches: Batches, validation: Tokens, config: TrainConfig, out: Path) -> None:
    """The loop: draw a batch, loss and gradients, clip, step, log."""
    device = model.wte.weight.device
    optimizer = make_optimizer(model, config)
    started = time.perf_counter()
    val_loss = evaluate(model, validation, config, device)
    tqdm.write(f"validation loss before training: {val_loss:.4f}")
    first = {"val_loss_before": val_loss}
    tokens = 0
    with (out / "metrics.jsonl").open("w") as metrics, tqdm(total=config.max_steps, unit="step") as bar:
        for step in range(config.max_steps):
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=device)
            for _ in range(config.accumulate):
                input_ids, targets = (t.to(device) for t in next(batches))
                micro = model.loss(input_ids, targets) / config.accumulate
                micro.backward()
                loss += micro.detach()
                tokens += targets.numel()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()

            row: dict[str, float] = {"step": step + 1, "loss": loss.item(), "lr": lr, "grad_norm": norm.item()}
            row |= {"tokens": tokens, "seconds": time.perf_counter() - started} | first
            first = {}
            if (step + 1) % config.eval_every == 0 or step + 1 == config.max_steps:
                row["val_loss"] = val_loss = evaluate(model, validation, config, device)
                tqdm.write(f"step {step + 1}: validation loss {val_loss:.4f}")
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            bar.set_postfix_str(
                f"loss {row['loss']:.3f}, val {val_loss:.3f}, {tokens / row['seconds']:,.0f} tokens/s, "
                f"peak {peak_memory(device):.2f} GiB"
            )
            bar.update()


def sample(model: GPT2, n_tokens: int, seed: int) -> str:
    """Some text of the model's own, started from <|endoftext|> and drawn with its own random state."""
    device = model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    start = torch.tensor([[END_OF_TEXT]], device=device)
    n_tokens = min(n_tokens, model.config.n_positions - 1)
    ids: Tensor = model.generate(start, n_tokens, temperature=0.8, top_k=50, generator=generator)
    return get_tokenizer().decode(ids[0, 1:].tolist())


def make_run_folder(config: TrainConfig) -> Path:
    """A folder without a run in it, with the resolved configuration as train_config.json."""
    out = config.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if (out / "metrics.jsonl").exists():
        raise ValueError(f"--out {out} already holds a run; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    resolved = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    (out / "train_config.json").write_text(json.dumps(resolved | {"out": str(out)}, indent=2) + "\n")
    return out


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto is CUDA, else MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = name.partition(":")[0]
    if not available.get(kind, False):
        raise ValueError(
            f"--device {name} is not available; there is {', '.join(k for k, v in available.items() if v)}"
        )
    return torch.device(name)


def main() -> int:
    try:
        config = tyro.cli(TrainConfig)
        config.check()
        device = pick_device(config.device)
        torch.manual_seed(config.seed)
        model = make_model(config, device)
        corpus = load_corpus(config.data)
        batches = Batches(corpus.train, config.batch, config.length, config.seed)
        if len(corpus.validation) <= config.length:
            raise DataError(f"{len(corpus.validation)} validation tokens are too few for one window of {config.length}")
        out = make_run_folder(config)
    except (
        ValueError,
        OSError,
        RuntimeError,
    ) as error:  # everything the user can mend; the loop's own errors are not caught
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    n_parameters = sum(p.numel() for p in model.parameters())
    source = config.data or "the Python standard library's own sources"
    print(f"{n_parameters / 1e6:.1f}M parameters on {device}, attention {config.attention}, run folder {out}")
    print(f"{len(corpus.train):,} training and {len(corpus.validation):,} validation tokens from {source}")

    train(model, batches, corpus.validation, config, out)
    model.save_pretrained(out)
    print(f"saved {out}/model.safetensors; continue it with: minigpt2 generate --model {out} --prompt 'import '")
    print("a sample of its text:\n" + sample(model, 120, config.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
