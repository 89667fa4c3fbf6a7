"""Official weights over HTTP, from a server on this machine that answers as the Hugging Face hub does."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minigpt2.weights import OFFICIAL, WeightsError, download

REVISION = "0123456789abcdef0123456789abcdef01234567"

# Runs the command line, or another statement, with a small pinned file in place of the published one. The hub's client
# tries several times, and waits in between; not here.
DRIVER = """
import sys, time
from pathlib import Path
from minigpt2 import GPT2, weights
from minigpt2.__main__ import main

time.sleep = lambda seconds: None
root, revision, size, sha256, statement = sys.argv[1:6]
weights.weights_root = lambda: Path(root)
weights.OFFICIAL["gpt2"] = weights.OfficialFile("openai-community/gpt2", revision, int(size), sha256)
sys.argv[1:] = ["download", "gpt2"]
sys.exit(eval(statement))
"""


class Hub(ThreadingHTTPServer):
    """Serves `files` at /openai-community/gpt2/resolve/REVISION/; cuts off what `breaks` after half of it."""

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
        contents = self.server.files.get(name)
        if contents is None or folder != f"/openai-community/gpt2/resolve/{REVISION}":
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
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


def test_other_names_are_refused():
    with pytest.raises(WeightsError, match=r"'gpt3'; there are gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
        download("gpt3")


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
