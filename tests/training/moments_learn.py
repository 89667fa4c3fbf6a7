"""What AdamW's moments in fewer bytes cost: the loss of small models after 1,000 steps, beside that with float32's.

`python tests/training/moments_learn.py` takes ten minutes. The text is Python's standard library, byte by byte; the
models have 2 blocks of width 64. What a run with moments in less is off by is chance in part: so there are eight seeds,
and runs in float32 whose initial weights are off by a thousandth, to say how much. minigpt2/bench/README.md says what
it printed.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from statistics import mean, stdev

import torch

from minigpt2 import GPT2, GPT2Config
from minigpt2.training.optimizer import make_optimizer
from minigpt2.training.trainer import schedule

STEPS, BATCH, LENGTH, SEEDS = 1000, 8, 64, 8


def text() -> torch.Tensor:
    """The bytes of the standard library's larger files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()


def batch(tokens: torch.Tensor, generator: torch.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(tokens) - LENGTH, (n, 1), generator=generator)
    windows = tokens[starts + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss_after(tokens: torch.Tensor, moments: str, off: float, seed: int) -> float:
    """The validation loss, in nats a byte, of a run from weights that are off by that share of each, times noise."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2)
    model = GPT2(config.replace(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + off * torch.randn(p.shape))
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
    tokens = text()

    def losses(moments: str, off: float = 0.0) -> list[float]:
        return [loss_after(tokens, moments, off, seed) for seed in range(SEEDS)]

    def row(name: str, cells: list[str]) -> None:
        print("|", " | ".join([name, *cells]), "|", flush=True)

    exact = losses("fp32")
    row("moments", [*(f"seed {seed}" for seed in range(SEEDS)), "mean", "standard deviation"])
    row("fp32", [f"{x:.4f}" for x in (*exact, mean(exact), stdev(exact))])
    for name, moments, off in (("fp32, weights off", "fp32", 1e-3), ("bf16", "bf16", 0.0), ("8bit", "8bit", 0.0)):
        over = [x / y - 1 for x, y in zip(losses(moments, off), exact, strict=True)]
        row(name, [f"{x:+.2%}" for x in (*over, mean(over))] + [f"{stdev(over):.2%}"])


if __name__ == "__main__":
    main()
