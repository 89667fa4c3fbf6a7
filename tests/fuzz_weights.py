"""Mutated checkpoints against from_pretrained: each is refused in one line or loaded right, by the view of the
safetensors library. Run by hand: python tests/fuzz_weights.py --n 10000 --seed 0"""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from fuzzing import Finding, main
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigpt2 import GPT2, ConfigError, GPT2Config, WeightsError

CONFIG = GPT2Config(vocab_size=19, n_positions=7, n_embd=8, n_layer=2, n_head=2)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PREFIXES = ("", "", "transformer.", "module.", "model._orig_mod.", "net.")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ODD_VALUES = (None, True, 0, -1, 1.5, 2**31, 2**63, 10**30, "", "F32", "x" * 300, "\n", "é\0", [], {}, [0, 0], [[]])
SHARDS = ("../other.safetensors", "/etc/passwd", "..", ".", "", "a/b", "config.json", "\0", "x" * 300, INDEX)


def write_checkpoint(rng: random.Random, folder: Path) -> None:
    """A checkpoint that loads, or that has an untied head or an unusual prefix: whole or in shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    torch.manual_seed(rng.randrange(2**32))
    prefix, dtypes = rng.choice(PREFIXES), rng.choice([DTYPES, DTYPES[2:3]])
    tensors = {f"{prefix}{name}": p.detach().to(rng.choice(dtypes)) for name, p in GPT2(CONFIG).named_parameters()}
    if rng.random() < 0.3:
        tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].clone()
        if rng.random() < 0.3:
            tensors["lm_head.weight"][0, 0] += 1
    if rng.random() < 0.3:
        tensors[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 7, 7, dtype=rng.choice([torch.bool, torch.float32]))
    if rng.random() < 0.1:  # two names of one parameter
        name = rng.choice(list(tensors))
        tensors[f"module.{name}"] = tensors[name].clone()
    if rng.random() < 0.6:
        save_file(tensors, folder / WHOLE, metadata={"format": "pt"})
        return
    names = list(tensors)
    rng.shuffle(names)
    n = rng.randint(1, 3)
    shards = {f"model-{i}-of-{n}.safetensors": names[i::n] for i in range(n)}
    for shard, its in shards.items():
        save_file({name: tensors[name] for name in its}, folder / shard)
    weight_map = {name: shard for shard, its in shards.items() for name in its}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# What is done to the bytes of a file.


def flipped(rng: random.Random, data: bytes, start: int = 0, stop: int | None = None) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if changed[start:stop]:
            i = rng.randrange(start, len(changed) if stop is None else min(stop, len(changed)))
            changed[i] = rng.choice([rng.randrange(256), changed[i] ^ 1 << rng.randrange(8), 0, 255, ord('"')])
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice([0, 7, 8, 9, rng.randrange(len(data) + 1), len(data) - 1])]


def spliced(rng: random.Random, data: bytes) -> bytes:
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return rng.choice([data[:a] + data[b:], data[:b] + data[a:], data[:a] + data[b:c] + data[a:b] + data[c:]])


def extended(rng: random.Random, data: bytes) -> bytes:
    more = rng.randbytes(rng.choice([1, 8, 100]))
    return rng.choice([data + more, more + data, data + bytes(len(more))])


# What is done to the header of a safetensors file.


def header_of(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict | str, body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + body


def renamed(rng: random.Random, name: str) -> str:
    i = rng.randrange(len(name) + 1)
    return rng.choice(
        [
            name[:i] + name[i + 1 :],
            name[:i] + rng.choice("\n.\0é0h_") + name[i:],
            name + rng.choice(["_orig", ".weight", "x" * 1000]),
            rng.choice(["model.", "module.", "transformer.", "_orig_mod.", "net.", "h.0."]) + name,
            name.replace("h.0", "h.00").replace("h.1", "h.2"),
            name.replace(".weight", ".bias"),
            name.upper(),
        ]
    )


def changed_header(rng: random.Random, data: bytes) -> bytes:
    header, body = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]

    def rename() -> None:
        header[renamed(rng, name)] = header.pop(name)

    def swap() -> None:
        header[name], header[other] = header[other], entry

    def retype() -> None:
        entry["dtype"] = rng.choice(["F16", "BF16", "F32", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "Q", 3])

    def reshape() -> None:
        shape = entry["shape"]
        choices = [shape[::-1], [*shape, 1], [1, *shape], shape[1:], [2**40, 2**40], [0], [-1], [[1]], "8"]
        entry["shape"] = rng.choice([*choices, [s + rng.choice([-1, 0, 1]) for s in shape]])

    def move() -> None:
        begin, end = entry["data_offsets"]
        step = rng.choice([-8, -4, -1, 1, 4, 8])
        begins = [begin + step, begin, header[other]["data_offsets"][0], 2**63, -1]
        entry["data_offsets"] = rng.choice([[rng.choice(begins), end], [begin, end + step], [end, begin], [begin], []])

    def share() -> None:  # two names of one tensor
        header[name] = dict(header[other])

    def odd() -> None:
        entry[rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice(ODD_VALUES)

    def odd_entry() -> None:
        header[rng.choice([name, "more", "__metadata__"])] = rng.choice(ODD_VALUES)

    def remove() -> None:
        header.pop(name)

    def shuffle() -> None:
        items = list(header.items())
        rng.shuffle(items)
        header.clear()
        header.update(items)

    for change in rng.choices([rename, swap, retype, reshape, move, share, odd, odd_entry, remove, shuffle], k=1):
        change()
    text = json.dumps(header)
    if rng.random() < 0.2:  # a key twice
        key, value = rng.choice([(name, entry), (name, header.get(other, entry))])
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}"
    if rng.random() < 0.1:
        text = rng.choice([text + " " * rng.randrange(64), "[" * 10_000 + text, text.replace('"', "'"), f"[{text}]"])
    return with_header(text, body)


def mutated_weights(rng: random.Random, data: bytes) -> bytes:
    size = 8 + int.from_bytes(data[:8], "little")
    mutations: list[Callable[[], bytes]] = [
        lambda: flipped(rng, data, 0, 8),
        lambda: flipped(rng, data, 8, size),
        lambda: flipped(rng, data, size),
        lambda: cut(rng, data),
        lambda: spliced(rng, data),
        lambda: extended(rng, data),
    ]
    return rng.choice([*mutations, *6 * [lambda: changed_header(rng, data)]])()


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """For the index and for config.json."""
    values = json.loads(data)
    inner = values.get("weight_map", values)
    key = rng.choice(list(inner))

    def shard() -> None:
        inner[key] = rng.choice([*SHARDS, *inner.values(), *ODD_VALUES])

    def drop() -> None:
        wanted = inner[key]
        for name in [name for name, value in inner.items() if value == wanted]:
            del inner[name]

    def odd() -> None:
        rng.choice([values, inner])[rng.choice([key, "more", "weight_map"])] = rng.choice(ODD_VALUES)

    def size() -> None:
        inner[rng.choice(["n_layer", "n_head", "n_embd", "vocab_size", "n_positions", "n_inner"])] = rng.choice(
            [*ODD_VALUES, 1, 2, 3, 4, 7, 8, 16, 19, 20, 32]
        )

    if rng.random() < 0.4:
        return rng.choice([flipped, cut, spliced, extended])(rng, data)
    rng.choice([shard, drop, odd, size])()
    text = json.dumps(values)
    return rng.choice([*6 * [text], "[" * 100_000, f"[{text}]", text.replace("0", "NaN")]).encode()


def mutate(rng: random.Random, folder: Path) -> None:
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2])):
        path = rng.choice([p for p in folder.iterdir() for _ in range(3 if p.suffix == ".safetensors" else 1)])
        data = path.read_bytes()
        try:
            data = mutated_weights(rng, data) if path.suffix == ".safetensors" else mutated_json(rng, data)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            continue  # the first mutation left nothing for the second
        path.unlink()
        if rng.random() < 0.98:
            path.write_bytes(data)


# What is right.


def official_name(key: str) -> str:
    parts = [p for p in key.split(".") if p not in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")]
    while parts and parts[0] in ("module", "model", "transformer"):
        parts = parts[1:]
    return ".".join(parts)


def expected(folder: Path) -> tuple[GPT2Config, dict[str, Tensor]] | None:
    """The configuration and what the parameters must be by the view of the safetensors library; None for a checkpoint
    that must be refused."""
    try:
        config = GPT2Config.from_file(folder / "config.json")
    except ConfigError:
        return None
    if config.n_layer > 50 or config.n_embd > 10_000:
        return None  # no file here is of a model like that
    files = [folder / WHOLE]
    if not files[0].exists():
        try:
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            if not all(len(Path(name).parts) == 1 and Path(name).name not in ("", "..") for name in names):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        files = sorted({folder / Path(name) for name in names})
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: (file.get_slice(key).get_dtype(), file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        except Exception:  # however the library refuses a file
            return None
        for key, (dtype, tensor) in found.items():
            name = official_name(key)
            if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
                continue
            if name in tensors or dtype not in ("F16", "BF16", "F32", "F64"):
                return None
            tensors[name] = tensor
    head = tensors.pop("lm_head.weight", None)
    if head is not None:
        tied = tensors.setdefault("wte.weight", head)
        if tied.dtype != head.dtype or tied.shape != head.shape or not torch.equal(bits(tied), bits(head)):
            return None
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT2(config).named_parameters()}
    return (config, tensors) if shapes == {name: t.shape for name, t in tensors.items()} else None


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def case(rng: random.Random, counts: Counter[str]) -> None:
    root = Path(tempfile.mkdtemp())
    folder = root / "checkpoint"
    try:
        write_checkpoint(rng, folder)
        mutate(rng, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys in config.json
            right = expected(folder)
            try:
                model = GPT2.from_pretrained(folder)
            except (WeightsError, ConfigError) as error:
                if right is not None:
                    raise Finding(f"refused what is right: {error}") from None
                if len(str(error).splitlines()) > 1:
                    raise Finding(f"more than one line: {error!r}") from None
                counts["refused"] += 1
                return
        if right is None:
            raise Finding("loaded what is wrong")
        config, tensors = right
        for name, parameter in model.named_parameters():
            if not torch.equal(bits(parameter.detach()), bits(tensors[name].float())):
                raise Finding(f"{name} is not what the file says")
        if model.config != config:
            raise Finding("another configuration")
        counts["loaded"] += 1
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main(case)
