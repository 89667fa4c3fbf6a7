"""The command line, as a user meets it: what it prints, and one clear line with exit status 2 for a mistake."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys

import pytest
import torch
import tyro

import minigpt2
import train
from minigpt2 import __main__ as cli
from minigpt2.generate import generate
from minigpt2.ops import kernel
from minigpt2.ops.attention import BACKENDS
from minigpt2.ops.products import explain_products
from minigpt2.recompute import RECOMPUTE
from minigpt2.tokenizer import BYTES, get_tokenizer
from minigpt2.tokenizer_files import read_tokenizer
from minigpt2.training.precision import fastest_precision

PROMPT = "in the"  # two tokens that the tiny vocabulary has


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """The kernel, before its first use, which says on standard error that it compiles."""
    kernel.unavailable()


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "minigpt2", *map(str, arguments)],
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
    )


def in_process(monkeypatch, capsys, *arguments):
    """The same without a new interpreter: (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["minigpt2", *map(str, arguments)])
    try:
        status = cli.main()
    except SystemExit as end:  # tyro's own
        status = end.code
    return (status, *capsys.readouterr())


def test_generate_prints_the_prompt_and_what_generate_gives(hf_tiny, tiny_model):
    dials = {"temperature": 0.7, "top_k": 40, "top_p": 0.9}
    flags = [word for name, value in dials.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = command("generate", "--model", hf_tiny, "--prompt", PROMPT, "--max-new-tokens", 30, "--seed", 5, *flags)
    ids = torch.tensor([get_tokenizer().encode(PROMPT)])
    expected = generate(tiny_model, ids, 30, generator=torch.Generator().manual_seed(5), **dials)[0].tolist()
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == get_tokenizer().decode(expected) + "\n"


def test_a_character_split_over_tokens_is_printed_whole_and_as_it_comes(monkeypatch, capsys, hf_tiny, tiny_config):
    text = "é漢👩‍🚀"
    ids = [BYTES.index(b) for b in text.encode()]
    seen = []

    def stream(*args, **kwargs):
        for i in [*ids, ids[0], tiny_config.eos_token_id]:
            yield torch.tensor([i])
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr("minigpt2.generate.stream", stream)
    cli.generate(str(hf_tiny), PROMPT)
    assert seen[:5] == [PROMPT, "é", "", "", "漢"]
    assert "".join(seen) == PROMPT + text
    assert capsys.readouterr().out == "\ufffd\n"  # the one that was cut short


def test_an_id_beyond_the_tokenizer_is_printed_as_the_replacement_character(monkeypatch, capsys, hf_tiny):
    monkeypatch.setattr("minigpt2.generate.stream", lambda *args, **kwargs: iter([torch.tensor([50300])]))
    cli.generate(str(hf_tiny), PROMPT)
    assert capsys.readouterr().out == PROMPT + "\ufffd\n"


def test_the_seed_decides_the_text(monkeypatch, capsys, hf_tiny):
    def text(*flags):
        return in_process(monkeypatch, capsys, "generate", "--model", hf_tiny, "--prompt", PROMPT, *flags)[1]

    short = ("--max-new-tokens", 20)
    assert text(*short, "--seed", 1) == text(*short, "--seed", 1) != text(*short, "--seed", 2)
    assert text(*short) != text(*short)


def test_the_context_limit_ends_with_a_message_and_success(hf_tiny):
    result = command("generate", "--model", hf_tiny, "--prompt", PROMPT, "--temperature", 0)
    assert result.returncode == 0
    assert result.stdout.decode().startswith(PROMPT)
    assert result.stderr == b"minigpt2: stopped at the context length of 64 tokens, after 62 of 100\n"


def test_a_terminal_that_is_not_utf8_gets_replacements(hf_tiny):
    result = command(
        "generate", "--model", hf_tiny, "--prompt", PROMPT, "--max-new-tokens", 20, PYTHONIOENCODING="ascii"
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.isascii()


def test_a_reader_that_leaves_early_is_no_error(hf_tiny):
    arguments = ["generate", "--model", hf_tiny, "--prompt", PROMPT, "--max-new-tokens", "20"]
    with subprocess.Popen(
        [sys.executable, "-m", "minigpt2", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


GENERATE = {"--model": "HF_TINY", "--prompt": PROMPT}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "gpt3"}, "'gpt3' is neither an official name (gpt2, "),
        ({"--model": os.devnull}, "neither an official name"),
        ({"--model": os.curdir}, "config.json: no such file"),
        ({"--file": os.devnull}, "--prompt and --file are both given"),
        ({"--num": "0"}, "--num must be >= 1, got 0"),
        ({"--prompt": "a" + " b" * 64}, "65 tokens exceed the context length n_positions=64"),
        ({"--temperature": "-1"}, "temperature must be"),
        ({"--temperature": "nan"}, "temperature must be"),
        ({"--top-k": "0"}, "top_k must be >= 1, got 0"),
        ({"--top-p": "1.1"}, "top_p must be in (0, 1], got 1.1"),
        ({"--seed": "-1"}, "--seed must be from 0 to 2**64 - 1, got -1"),
        ({"--seed": str(2**64)}, "--seed must be from 0 to 2**64 - 1, got 18446744073709551616"),
        ({"--max-new-tokens": "-1"}, "max_new_tokens must be >= 0, got -1"),
        ({"--attention": "flash"}, "attention backend must be one of auto, eager, sdpa, fused"),
        ({"--device": "abacus"}, "--device abacus is not available; there is "),
        pytest.param(
            {"--device": "cuda"},
            "--device cuda is not available; there is ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_mistake_is_one_clear_line(monkeypatch, capsys, hf_tiny, changes, message):
    flags = [word.replace("HF_TINY", str(hf_tiny)) for pair in (GENERATE | changes).items() for word in pair]
    status, out, err = in_process(monkeypatch, capsys, "generate", *flags)
    assert (status, out) == (2, "")
    assert err.startswith("minigpt2: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_weights_that_are_not_finite_are_one_clear_line(monkeypatch, capsys, hf_tiny, tiny_model, tmp_path, verb):
    with torch.no_grad():
        tiny_model.h[1].ln_1.weight[3] = float("nan")
    tiny_model.save_pretrained(tmp_path, read_tokenizer(hf_tiny))
    (tmp_path / "tokens.bin").write_bytes(bytes(8))
    rest = ("--prompt", PROMPT) if verb == "generate" else ("--data", tmp_path / "tokens.bin")
    status, out, err = in_process(monkeypatch, capsys, verb, "--model", tmp_path, *rest)
    assert (status, out) == (2, "")
    assert err.startswith("minigpt2: ")
    assert err.endswith("h.1.ln_1.weight holds a NaN or an infinity\n")
    assert err.count("\n") == 1


def test_end_of_text_in_a_prompt_is_its_token(monkeypatch, capsys, hf_tiny, tiny_config):
    prompts = []
    monkeypatch.setattr("minigpt2.generate.stream", lambda model, ids, *args, **kwargs: prompts.append(ids) or iter([]))
    status, out, err = in_process(monkeypatch, capsys, "generate", "--model", hf_tiny, "--prompt", "a<|endoftext|>b")
    assert (status, out, err) == (0, "a<|endoftext|>b\n", "")
    a, b = (get_tokenizer().encode(letter) for letter in "ab")
    assert prompts[0].tolist() == [[*a, tiny_config.eos_token_id, *b]]


def test_attention_that_cannot_serve_is_one_clear_line(monkeypatch, capsys, hf_tiny):
    monkeypatch.setattr("minigpt2.ops.attention.unavailable", lambda *args: "there is no compiler")
    flags = ("--model", hf_tiny, "--prompt", PROMPT, "--attention", "fused")
    status, out, err = in_process(monkeypatch, capsys, "generate", *flags)
    assert (status, out, err) == (2, "", "minigpt2: fused attention is not available: there is no compiler\n")


def test_a_mistake_has_exit_status_2_and_no_traceback(tmp_path):
    (tmp_path / "config.json").write_text('{"add_cross_attention": true}')
    result = command("generate", "--model", tmp_path, "--prompt", "x")
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.decode() == (
        f"minigpt2: {tmp_path}/config.json: add_cross_attention=True is not implemented (only False)\n"
    )


def test_an_unknown_download_is_one_clear_line(monkeypatch, capsys):
    status, out, err = in_process(monkeypatch, capsys, "download", "gpt3")
    assert (status, out) == (2, "")
    assert err == (
        "minigpt2: 'gpt3' is neither an official name (gpt2, gpt2-medium, gpt2-large, gpt2-xl), nor OWNER/NAME, nor a "
        "folder with weights\n"
    )


@pytest.mark.parametrize("arguments", [["generate", "--help"], ["bench", "step", "--help"], ["info"]], ids=" ".join)
def test_no_verb_needs_the_compiler_to_say_what_it_does(arguments):
    source = f"""
import sys
sys.argv = ["minigpt2", *{arguments}]
from minigpt2.__main__ import main
try:
    main()
finally:
    found = sys.modules.keys() & {{"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "matplotlib"}}
    print(found or "nothing heavy", file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "nothing heavy\n")


def test_a_mistake_in_a_benchmark_is_one_clear_line(monkeypatch, capsys):
    status, out, err = in_process(monkeypatch, capsys, "bench", "step", "--model", "gpt3")
    assert (status, out) == (2, "")
    assert err.startswith("minigpt2: model must be one of gpt2, ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["generate"],
        ["generate", "--model", "x", "--prompt", "x", "--top-k", "many"],
        ["generate", "--model", "x", "--prompt", "x", "--temprature", "0"],
        ["plan", "--device", "tpu"],
        ["plan", "--batch"],
        ["bench"],
        ["bench", "fly"],
    ],
    ids=str,
)
def test_a_command_line_that_cannot_be_read_has_exit_status_2(monkeypatch, capsys, arguments):
    status, out, err = in_process(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("minigpt2: ")
    assert " --help" in err
    assert err.count("\n") == 1
    assert not set(err) & set("╭│╰─")


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (["--help"], ["generate", "download", "info"]),
        (["generate", "--help"], ["--model", "--prompt", "--max-new-tokens", "--temperature", "--top-k", "--top-p"]),
        (["download", "--help"], ["gpt2-medium"]),
        (["info", "--help"], ["attention backend"]),
        (["bench", "--help"], ["attention", "memory", "step"]),
        (["bench", "attention", "--help"], ["--shapes", "--dtype", "--repeats", "Rounds, each of which"]),
        (["bench", "memory", "--help"], ["--every", "--out", "Sequences in a batch"]),
        (["bench", "step", "--help"], ["--compare", "Sequences in a batch"]),
    ],
    ids=" ".join,
)
def test_help(monkeypatch, capsys, arguments, mentioned):
    status, out, _ = in_process(monkeypatch, capsys, *arguments)
    assert status in (0, None)
    assert [word for word in mentioned if word not in out] == []


VERBS = ["train", "generate", "eval", "parity", "prepare", "plan", "bench", "download", "info"]


def test_the_help_has_an_example_of_each_verb(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    lines = in_process(monkeypatch, capsys, "--help")[1].splitlines()
    examples = [line.strip("│ ").removeprefix("$ minigpt2 ").split()[0] for line in lines if "$ minigpt2 " in line]
    assert sorted(set(examples)) == sorted(VERBS)
    assert "docstring" not in "".join(lines)


BENCHMARKS = ["attention", "generate", "loss", "memory", "step"]


@pytest.mark.parametrize("verb", [*VERBS, *(f"bench {name}" for name in BENCHMARKS)])
def test_help_shows_an_example_and_each_default_once(monkeypatch, capsys, verb):
    monkeypatch.setenv("COLUMNS", "500")
    out = in_process(monkeypatch, capsys, *verb.split(), "--help")[1]
    examples = [line.strip()[2:] for line in out.splitlines() if line.startswith("$ ")]
    assert examples
    monkeypatch.setattr(cli, "parsed", lambda parse: (parse(), lambda: 0)[1])  # parses, and then does nothing
    monkeypatch.setattr(train, "main", lambda: tyro.cli(train.TrainConfig, args=sys.argv[1:]) is None)
    monkeypatch.setitem(sys.modules, "minigpt2._train", train)
    monkeypatch.setattr(cli, "module_from_spec", lambda spec: train)
    monkeypatch.setattr(cli.SourceFileLoader, "exec_module", lambda loader, module: None)
    for example in examples:
        monkeypatch.setattr(sys, "argv", shlex.split(example))
        assert example.startswith(f"minigpt2 {verb}")
        assert cli.main() == 0
    described = [line for line in out.splitlines() if line.startswith("│")]
    assert [line for line in described if line.lower().count("default") > 1] == []
    assert "None" not in out


def test_the_help_names_every_choice_that_the_model_checks(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    out = in_process(monkeypatch, capsys, "bench", "step", "--help")[1]
    out += in_process(monkeypatch, capsys, "generate", "--help")[1]
    for name, choices in (("recompute", RECOMPUTE), ("attention", BACKENDS)):
        (found,) = re.findall(rf"--{name} {{(.*?)}}", out)
        assert sorted(found.split(",")) == sorted(choices)


def test_a_reader_of_the_help_may_leave_early():
    for words in (["train", "--help"], ["generate", "--help"]):
        with subprocess.Popen(
            [sys.executable, "-m", "minigpt2", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 141


def test_a_budget_needs_a_unit_and_is_repeated_as_it_was_given(monkeypatch, capsys):
    status, out, err = in_process(monkeypatch, capsys, "plan", "--budget", "4")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "4 of which unit?" in err
    assert "4GiB" in err
    assert "; the budget is 7.5GB\n" in in_process(monkeypatch, capsys, "plan", "--budget", "7.5GB")[1]
    status, _, err = in_process(monkeypatch, capsys, "plan", "--budget", "1 KiB")
    assert status == 2
    assert err.startswith("minigpt2: nothing fits 1 KiB: the least is ")


def test_info_prints_versions_device_and_what_computes_attention_and_products_and_why():
    result = command("info")
    assert (result.returncode, result.stderr) == (0, b"")
    versions, libraries, device, attention, products, precision = result.stdout.decode().splitlines()
    assert versions == f"minigpt2 {minigpt2.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    assert libraries.startswith("safetensors ")
    assert device.startswith("device: ")
    assert minigpt2.ops.attention.explain_backend() in attention
    assert "(" in attention
    assert products == f"products of training, float32 on the CPU: {explain_products()}"
    assert precision.startswith(f"train --precision auto: {fastest_precision(torch.device('cpu'))[0]}, since ")


def test_the_console_script_is_main():
    result = subprocess.run(
        [sys.executable, "-c", "from minigpt2.__main__ import main; raise SystemExit(main())", "download", "gpt3"],
        capture_output=True,
    )
    assert result.returncode == 2


def test_what_programs_read_is_json(monkeypatch, capsys, hf_tiny, tmp_path):
    (tmp_path / "text.txt").write_text("in the " * 50)
    status, out, _ = in_process(monkeypatch, capsys, "eval", "--model", hf_tiny, "--data", tmp_path, "--json")
    assert status == 0
    assert json.loads(out).keys() == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}
    status, out, _ = in_process(monkeypatch, capsys, "info", "--json")
    assert json.loads(out)["torch"] == torch.__version__
    few = ("plan", "--batch", 4, "--json", "--budget", "2.5GiB")
    rows = json.loads(in_process(monkeypatch, capsys, *few)[1])
    assert {True, False} == {row["fits"] for row in rows}
    assert [row["peak"] for row in rows] == sorted(row["peak"] for row in rows)
    assert rows[0]["stepping"]["moments"] == "8bit"
