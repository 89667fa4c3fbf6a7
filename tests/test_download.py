"""Models of the hub: over HTTP, from a server on this machine that answers as the Hugging Face hub does, and from a
cache of huggingface_hub."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import GPT2LMHeadModel

from minigpt2 import GPT2, ConfigError
from minigpt2.weights import OFFICIAL, WeightsError, download, find_folder

REVISION = "0123456789abcdef0123456789abcdef01234567"

# Runs the command line, or another statement, with a small pinned file in place of the published one. The hub's client
# tries several times, and waits in between; not here.
DRIVER = """
import sys, time
from pathlib import Path
from minigpt2 import GPT2, weights
from minigpt2.__main__ import main

def said(call, *names):
    for name in names:
        try:
            call(name)
        except ValueError as error:
            print(error)

time.sleep = lambda seconds: None
root, revision, size, sha256, statement = sys.argv[1:6]
weights.weights_root = lambda: Path(root)
weights.OFFICIAL["gpt2"] = weights.OfficialFile("openai-community/gpt2", revision, int(size), sha256)
sys.argv[1:] = ["download", "gpt2"]
sys.exit(eval(statement))
"""


class Hub(ThreadingHTTPServer):
    """Serves `files` at /openai-community/gpt2/resolve/REVISION/, and at branch main of somebody/small; cuts off what
    `breaks` after half of it."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.breaks, self.starts = files, set(), []
        # Those of the first contents: what is spoiled on its way has the tag of what it should be.
        self.etags = {name: f'"{hashlib.sha256(contents).hexdigest()}"' for name, contents in files.items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        folder, _, name = self.path.rpartition("/")
        contents, error = self.server.files.get(name), "EntryNotFound"
        served = {f"/openai-community/gpt2/resolve/{REVISION}"}
        served |= {f"/somebody/small/resolve/{revision}" for revision in ("main", "v1", REVISION)}
        if folder not in served:
            error = {"gated": "GatedRepo", "small": "RevisionNotFound"}.get(folder.split("/")[2], "RepoNotFound")
        if contents is None or folder not in served:
            self.send_response(403 if error == "GatedRepo" else 404)
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(start[1]) if start else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {first}-{len(contents) - 1}/{len(contents)}")
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", self.server.etags[name])
        self.send_header("X-Linked-Size", str(len(contents)))
        self.send_header("Content-Length", str(len(contents) - first))
        self.end_headers()
        if body:
            stop = len(contents) // 2 if name in self.server.breaks else len(contents)
            self.wfile.write(contents[first:stop])
            self.server.starts.append((name, first))
            self.close_connection = stop < len(contents)


@pytest.fixture
def hub(hf_tiny):
    server = Hub({name: (hf_tiny / name).read_bytes() for name in ("config.json", "model.safetensors")})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def drive(hub, hf_tiny, tmp_path):
    """Run DRIVER against the hub; the pins are those of hf_tiny, whatever the hub serves."""
    good = (hf_tiny / "model.safetensors").read_bytes()
    pins = [str(len(good)), hashlib.sha256(good).hexdigest()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def drive(statement="main()", **extra):
        command = [sys.executable, "-c", DRIVER, str(tmp_path / "weights"), REVISION, *pins, statement]
        return subprocess.run(command, capture_output=True, text=True, env=environment | extra, timeout=60)

    (tmp_path / "weights").mkdir()
    return drive


def spoiled(contents):
    return contents[:-1] + bytes([contents[-1] ^ 1])


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_the_pins_are_the_published_figures():
    pins = {name: (f.repository, f.revision, f.size, f.sha256) for name, f in OFFICIAL.items()}
    assert pins == {
        "gpt2": (
            "openai-community/gpt2",
            "607a30d783dfa663caf39e06633721c8d4cfcd7e",
            548_105_171,
            "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        ),
        "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None, None),
        "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", None, None),
        "gpt2-xl": (
            "openai-community/gpt2-xl",
            "15ea56dee5df4983c59b2538573817e1667135e2",
            None,
            "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        ),
    }


def test_a_good_download_lands_whole_and_is_not_fetched_again(drive, hub, hf_tiny, tmp_path):
    result = drive("main() or main() or print(GPT2.from_pretrained('gpt2').config.n_embd)")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == 2 * [f"gpt2: verified, in {tmp_path / 'weights/gpt2'}"] + ["64"]
    assert hub.starts == [("config.json", 0), ("model.safetensors", 0)]
    assert listing(tmp_path / "weights") == ["gpt2", "gpt2/config.json", "gpt2/model.safetensors"]
    landed = tmp_path / "weights/gpt2/model.safetensors"
    assert landed.read_bytes() == (hf_tiny / "model.safetensors").read_bytes()


def test_a_download_that_was_spoiled_since_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr("minigpt2.weights.weights_root", lambda: tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=rf"0 bytes, expected 548105171; delete {tmp_path}/gpt2 and download again"):
        download("gpt2")
    assert (tmp_path / "gpt2/model.safetensors").exists()


@pytest.mark.parametrize("name", ["gpt3", "a/b/c", "../gpt2", "a/", "/a", "", "a/b@", "gpt2@"])
def test_other_names_are_refused(name):
    with pytest.raises(
        WeightsError, match=f"^{re.escape(repr(name))} (is neither an official name|must be followed by)"
    ):
        download(name)


def test_a_wrong_digest_is_refused_and_the_next_download_starts_anew(drive, hub, tmp_path):
    good = hub.files["model.safetensors"]
    bad = hub.files["model.safetensors"] = spoiled(good)
    result = drive()
    assert (result.returncode, result.stdout) == (2, "")
    assert hashlib.sha256(good).hexdigest() in result.stderr
    assert hashlib.sha256(bad).hexdigest() in result.stderr
    assert result.stderr.startswith("minigpt2: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "weights/gpt2").exists()

    hub.files["model.safetensors"] = good
    assert drive().returncode == 0
    assert listing(tmp_path / "weights") == ["gpt2", "gpt2/config.json", "gpt2/model.safetensors"]


def test_a_wrong_size_is_refused(drive, hub, tmp_path):
    hub.files["model.safetensors"] += b"\0"
    result = drive()
    assert result.returncode == 2
    assert re.search(r"(\d+) bytes, expected (\d+)", result.stderr)
    assert not (tmp_path / "weights/gpt2").exists()


def test_an_interrupted_download_leaves_no_folder_and_can_be_repeated(drive, hub, tmp_path):
    hub.breaks.add("model.safetensors")
    result = drive()
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("minigpt2: gpt2: could not be fetched from openai-community/gpt2")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "weights/gpt2").exists()

    hub.breaks.clear()
    assert drive().returncode == 0
    assert listing(tmp_path / "weights") == ["gpt2", "gpt2/config.json", "gpt2/model.safetensors"]


def test_a_file_the_hub_does_not_have_is_one_clear_line(drive, hub, tmp_path):
    del hub.files["model.safetensors"]
    result = drive()
    assert result.returncode == 2
    assert result.stderr.startswith("minigpt2: gpt2: could not be fetched from openai-community/gpt2 at 01234567")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "weights/gpt2").exists()


def test_from_pretrained_fetches_into_the_shared_cache(drive, hub, tmp_path):
    statement = "print(GPT2.from_pretrained('gpt2').config.n_embd)"
    assert drive(statement).stdout == "64\n"
    assert listing(tmp_path / "weights") == []
    assert list((tmp_path / "hf_home").rglob("model.safetensors"))
    hub.files.clear()
    assert drive(statement, HF_HUB_OFFLINE="1").stdout == "64\n"


@pytest.mark.slow
def test_from_pretrained_refuses_a_wrong_digest_and_fetches_anew(drive, hub, tmp_path):
    good = hub.files["model.safetensors"]
    hub.files["model.safetensors"] = spoiled(good)
    result = drive("GPT2.from_pretrained('gpt2')")
    assert result.returncode == 1
    assert f"expected {hashlib.sha256(good).hexdigest()}; what was fetched is deleted" in result.stderr
    hub.files["model.safetensors"] = good
    assert drive("print(GPT2.from_pretrained('gpt2').config.n_embd)").stdout == "64\n"


def test_without_a_network_the_error_is_one_clear_line(drive):
    result = drive(HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert result.stderr.startswith("minigpt2: gpt2: could not be fetched")
    assert result.stderr.count("\n") == 1


def test_a_model_of_anybody_is_fetched_with_its_tokenizer(drive, hub, hf_tiny, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        hub.files[name] = name.encode()
        hub.etags[name] = f'"{name}"'
    statement = "print(*(GPT2.from_pretrained(n).config.n_embd for n in ('somebody/small', 'somebody/small@v1')))"
    assert drive(statement).stdout == "64 64\n"
    kept = {path.name for path in (tmp_path / "hf_home").rglob("snapshots/*/*")}
    assert kept == {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    hub.files.clear()
    assert drive(statement, HF_HUB_OFFLINE="1").stdout == "64 64\n"


def test_a_model_of_anybody_is_downloaded(drive, tmp_path):
    result = drive("weights.download('somebody/small') and print(GPT2.from_pretrained('somebody/small').config.n_embd)")
    assert (result.stdout, result.returncode) == ("64\n", 0)
    assert listing(tmp_path / "weights/somebody") == ["small", "small/config.json", "small/model.safetensors"]


def test_what_the_hub_does_not_give_is_one_clear_line_each(drive, hub):
    del hub.files["model.safetensors"]
    names = ("somebody/gated", "nobody/none", "somebody/small@v2", "somebody/small")
    result = drive(f"said(GPT2.from_pretrained, *{names})")
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    for name, line, reason in zip(
        names,
        lines,
        (
            "it is gated: accept its terms at https://huggingface.co/somebody/gated",
            "there is no such repository on the hub, or it is private",
            "the repository has no such revision",
            "A pytorch_model.bin is a pickle, which can run any code, and is not read; convert it once",
        ),
        strict=True,
    ):
        assert line.startswith(f"{name}: no folder here, and could not be fetched from {name.partition('@')[0]}")
        assert reason in line


@pytest.fixture
def cached(hf_tiny, tmp_path, monkeypatch):
    """Put files into a cache laid out as huggingface_hub's; the tests are offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("minigpt2.weights.weights_root", lambda: tmp_path / "weights")

    def cached(repository, files, commit=REVISION, ref="main"):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        for name, contents in files.items():
            path = folder / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)

    return cached


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cached_model_by_its_names_and_revisions(cached, hf_tiny, tmp_path):
    files = contents_of(hf_tiny)
    cached("distilbert/distilgpt2", files)
    cached("distilbert/distilgpt2", files | {"config.json": b"{}"}, "f" * 40, "odd")
    for name in ("distilgpt2", "distilbert/distilgpt2", f"distilbert/distilgpt2@{REVISION}", "distilgpt2@main"):
        assert GPT2.from_pretrained(name).config.n_embd == 64
    assert GPT2.from_pretrained("distilgpt2", revision="main").config.n_embd == 64
    for name, revision in (("distilgpt2@odd", None), ("distilgpt2", "f" * 40)):
        with pytest.raises(WeightsError, match="is missing"):
            GPT2.from_pretrained(name, revision=revision)
    with pytest.raises(WeightsError, match="'distilgpt2@odd' must be followed by one revision"):
        GPT2.from_pretrained("distilgpt2@odd", revision="main")
    with pytest.raises(WeightsError, match="is a folder here"):
        GPT2.from_pretrained(hf_tiny, revision="main")
    assert find_folder("distilgpt2") == tmp_path / f"models--distilbert--distilgpt2/snapshots/{REVISION}"


def test_a_cached_model_in_shards(cached, hf_tiny, tmp_path):
    GPT2LMHeadModel.from_pretrained(hf_tiny).save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    files = contents_of(tmp_path / "shards")
    assert len(files) > 4
    cached("somebody/large", files)
    found = GPT2.from_pretrained("somebody/large").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in GPT2.from_pretrained(hf_tiny).state_dict().items())
    cached("somebody/partial", {name: files[name] for name in files if "00002" not in name})
    with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE is set, and the cache of huggingface_hub.* does not hold"):
        GPT2.from_pretrained("somebody/partial")


def test_what_is_not_in_the_cache_is_one_clear_line(cached):
    with pytest.raises(
        WeightsError, match=r"^no/model: no folder here, and could not be fetched from no/model: HF_HUB"
    ):
        GPT2.from_pretrained("no/model")
    cached("some/llama", {"config.json": b'{"model_type": "llama"}'})
    with pytest.raises(ConfigError, match="model_type='llama' is not implemented"):
        GPT2.from_pretrained("some/llama")


def test_an_official_name_may_have_another_revision(cached, hf_tiny):
    cached("openai-community/gpt2", contents_of(hf_tiny))
    assert GPT2.from_pretrained("gpt2@main").config.n_embd == 64
    with pytest.raises(
        WeightsError, match=r"^gpt2: could not be fetched from openai-community/gpt2 at 607a30d7: HF_HUB"
    ):
        GPT2.from_pretrained("gpt2")
