"""Compile the Triton kernels for GPUs that are not there, and say what they would take of each.

    python tests/ops/attention/compile_for_gpus.py            # what CI runs: see `reduced`
    python tests/ops/attention/compile_for_gpus.py --all      # every variant: 6 minutes of one core

Every program is compiled to machine code for compute capability 8.0, 9.0 and 12.0, and the code is asked for its
registers, its stack (where registers spill) and its shared memory. The exit status is 1 if a thread spills more than
MAX_SPILL bytes, or a program wants more shared memory than its GPU gives to one. How many registers a kernel takes is
for its compiler to say, so spills are judged with the Triton that the tiles were chosen with, JUDGE, and only listed
with any other.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minigpt2.ops.attention import gpu

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Bytes that one program may have, by capability (CUDA C++ Programming Guide, table of technical specifications)."""
MAX_SPILL = 64
"""Bytes a thread: a handful of values outside the inner loop's way."""
JUDGE = "3.7"
"""The Triton whose spills are judged; CI installs it."""

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclasses.dataclass(frozen=True)
class Variant:
    kernel: str
    dtype: torch.dtype
    precision: str
    head_dim: int
    dropout: bool
    tiles: gpu.Tiles
    capability: int

    def __str__(self) -> str:
        dtype = TYPES[self.dtype] if self.precision == "ieee" else self.precision
        dropout = "dropout" if self.dropout else ""
        rows, keys, warps, stages = self.tiles
        program = f"sm_{self.capability:<4}{self.kernel:8} {dtype:5} D{self.head_dim:<4} {dropout:8}"
        return f"{program}{rows:4}x{keys} w{warps} s{stages}"


@dataclasses.dataclass(frozen=True)
class Needs:
    """Registers and bytes of stack of a thread, bytes of shared memory of a program."""

    registers: int
    stack: int
    shared: int


def variants(capabilities: list[int]) -> Iterator[Variant]:
    """Everything that could be chosen: each kernel, dtype, precision, dropout on and off, tiles; a head size that fills
    its tile at each width, and 80, which does not."""
    for capability in capabilities:
        for (kernel, itemsize, width), choices in gpu.TILES.items():
            kinds = [(torch.float32, "ieee"), (torch.float32, "tf32")]
            if itemsize == 2:
                kinds = [(torch.bfloat16, "ieee"), (torch.float16, "ieee")]
            for head_dim in (width, 80) if width == 128 else (width,):
                for dtype, precision in kinds:
                    for tiles in choices:
                        for dropout in (True, False):
                            yield Variant(kernel, dtype, precision, head_dim, dropout, tiles, capability)


def reduced(variant: Variant) -> bool:
    """What is compiled by default. With dropout, which takes the most: at head size 64 all tiles in bfloat16 and
    float32 and the first in float16 and tf32; at the other sizes the first, in bfloat16 and (at 128) float32. Without
    it: the first at head size 64, in bfloat16 and float32."""
    first = variant.tiles == gpu.tiles_for(variant.kernel, variant.dtype, variant.head_dim)[0]
    usual = variant.dtype != torch.float16 and variant.precision != "tf32"
    if variant.head_dim == 64:
        return (first and (usual or variant.dropout)) or (usual and variant.dropout)
    return first and usual and variant.dropout and (variant.head_dim != 80 or variant.dtype == torch.bfloat16)


def source(variant: Variant) -> ASTSource:
    """The kernel with the types that a call with contiguous, aligned tensors has."""
    kernel = gpu.KERNELS[variant.kernel]
    constants = {
        "HEAD_DIM": variant.head_dim,
        "WIDTH": triton.next_power_of_2(variant.head_dim),
        "DROPOUT": variant.dropout,
        "PRECISION": variant.precision,
        "ROWS": variant.tiles.rows,
        "KEYS": variant.tiles.keys,
    }
    if not variant.dropout:
        constants["seed"] = None
    types = dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv"), f"*{TYPES[variant.dtype]}")
    types |= {"lse": "*fp32", "delta": "*fp32", "seed": "*i64", "scale": "fp32", "keep_scale": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or "stride" in name
    }
    return ASTSource(kernel, signature, constants, aligned)


def compile_variant(variant: Variant) -> Needs:
    """Compile for a GPU that need not be there. What the machine code takes is read from it by NVIDIA's cuobjdump."""
    options = {"num_warps": variant.tiles.warps, "num_stages": variant.tiles.stages}
    target = GPUTarget("cuda", variant.capability, 32)
    compiled = triton.compile(source(variant), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(rf"{compiled.metadata.name}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of {compiled.metadata.name}: {text}")
    registers, stack, local = map(int, found.groups())
    return Needs(registers, stack + local, compiled.metadata.shared)


def judges() -> bool:
    """Whether this is the Triton whose spills are judged."""
    return triton.__version__.startswith(f"{JUDGE}.")


def complaint(variant: Variant, needs: Needs) -> str | None:
    """What is wrong with a program that needs so much, or None."""
    if needs.shared > SHARED_MEMORY[variant.capability]:
        return f"{needs.shared} bytes of shared memory, {SHARED_MEMORY[variant.capability]} at most"
    if needs.stack > MAX_SPILL and judges():
        return f"{needs.stack} bytes of stack, {MAX_SPILL} at most"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every variant")
    parser.add_argument("--capability", type=int, nargs="+", choices=list(SHARED_MEMORY), default=list(SHARED_MEMORY))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    chosen = [variant for variant in variants(arguments.capability) if arguments.all or reduced(variant)]
    print(
        f"{len(chosen)} programs, Triton {triton.__version__}; registers and stack of a thread, shared memory in bytes"
    )
    complaints, worst = [], {}
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs) as pool:
        for variant, needs in zip(chosen, pool.map(compile_variant, chosen), strict=True):
            wrong = complaint(variant, needs)
            print(f"{variant!s:48} {needs.registers:4} registers {needs.stack:4} stack {needs.shared:7} shared", end="")
            print(f"  {wrong}" if wrong else "", flush=True)
            complaints += [variant] if wrong else []
            sofar = worst.get(variant.capability, Needs(0, 0, 0))
            pairs = zip(dataclasses.astuple(needs), dataclasses.astuple(sofar), strict=True)
            worst[variant.capability] = Needs(*map(max, pairs))
    for capability, needs in worst.items():
        limit = SHARED_MEMORY[capability]
        print(
            f"sm_{capability}: at most {needs.stack} bytes of stack ({MAX_SPILL} allowed), {needs.shared} of shared",
            end="",
        )
        print(f" memory ({limit} allowed)")
    print(f"{len(complaints)} of {len(chosen)} take too much")
    if not judges():
        print(f"spills were not judged: that is for Triton {JUDGE}, and this is {triton.__version__}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
