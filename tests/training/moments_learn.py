"""What AdamW's moments in fewer bytes cost: the loss of small models after 1,000 steps, beside that with float32's.

`python tests/training/moments_learn.py` takes minutes. The text is Python's standard library, byte by byte; the models
have 2 blocks of width 64. minigpt2/bench/README.md says what it printed.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

from minigpt2 import GPT2, GPT2Config
from minigpt2.training.optimizer import make_optimizer
from minigpt2.training.trainer import schedule

STEPS, BATCH, LENGTH = 1000, 8, 64


def text() -> torch.Tensor:
    """The bytes of the standard library's larger files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()


def batch(tokens: torch.Tensor, generator: torch.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(tokens) - LENGTH, (n, 1), generator=generator)
    windows = tokens[starts + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss_after(tokens: torch.Tensor, moments: str, seed: int) -> float:
    """The validation loss, in nats a byte."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2)
    model = GPT2(config.replace(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))
    recipe = {"lr": 3e-3, "embedding_lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.999)}
    optimizer = make_optimizer(model, "adamw", **recipe, moments=moments, in_backward=True, clip=1.0)
    generator, cut = torch.Generator().manual_seed(seed), len(tokens) * 9 // 10
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step, 100, STEPS)
        model.loss(*batch(tokens[:cut], generator, BATCH)).backward()
        optimizer.zero_grad()
    with torch.no_grad():
        return model.loss(*batch(tokens[cut:], torch.Generator().manual_seed(9), 2048)).item()


def main() -> None:
    torch.set_num_threads(1)
    tokens, exact = text(), {}
    print("moments  seed 0  seed 1  seed 2  over that of fp32")
    for moments in ("fp32", "bf16", "8bit"):
        losses = [loss_after(tokens, moments, seed) for seed in range(3)]
        exact = exact or dict(enumerate(losses))
        ratios = ", ".join(f"{loss / exact[seed] - 1:+.2%}" for seed, loss in enumerate(losses))
        print(f"{moments:<7}  " + "  ".join(f"{loss:.4f}" for loss in losses) + f"  {ratios}", flush=True)


if __name__ == "__main__":
    main()
