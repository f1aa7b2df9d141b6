"""`craton pull` from a server of the hub's shape on this machine: files, resuming, what is left out, what goes
wrong."""

import hashlib
import http.server
import json
import os
import threading

import pytest

from tests.conftest import craton
from tests.weights.families import make

SHA = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    files: dict = {}
    cut: set = set()  # served to the half, once
    asked: list = []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        Hub.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/org/gated"):
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/org/model/tree/"):
            rows = [
                {
                    "type": "file",
                    "path": n,
                    "size": len(d),
                    "oid": "b" * 40,
                    "lfs": {"oid": hashlib.sha256(d).hexdigest(), "size": len(d), "pointerSize": 100},
                }
                for n, d in Hub.files.items()
            ]
            return self.answer(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
        if path.startswith("/api/models/org/model"):
            body = {
                "id": "org/model",
                "sha": SHA,
                "siblings": [{"rfilename": n, "size": len(d)} for n, d in Hub.files.items()],
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
            }
            return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if path.startswith("/api/models/org/pickled"):
            return self.answer(
                200,
                json.dumps(
                    {"id": "org/pickled", "sha": SHA, "siblings": [{"rfilename": "pytorch_model.bin"}]}
                ).encode(),
                {"Content-Type": "application/json"},
            )
        name = path.removeprefix(f"/org/model/resolve/{SHA}/")
        if name not in Hub.files:
            return self.answer(
                404, b"", {"X-Error-Code": "RepoNotFound" if path.startswith("/api") else "EntryNotFound"}
            )
        data, start = Hub.files[name], 0
        if (wanted := self.headers.get("Range")) is not None:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        head = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": SHA,
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        if start:
            head["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if self.command == "GET" and name in Hub.cut:
            Hub.cut.discard(name)
            self.answer(206 if start else 200, body[: len(body) // 2], head, len(body))
            self.close_connection = True
            return None
        return self.answer(206 if start else 200, body, head)

    def answer(self, code, body, head, length=None):
        self.send_response(code)
        for k, v in head.items():
            self.send_header(k, v)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path):
    make("llama2", tmp_path / "src", max_shard_size="100KB")
    Hub.files = {p.name: p.read_bytes() for p in (tmp_path / "src").iterdir()}
    Hub.files |= {
        "pytorch_model.bin": b"pickle",
        "consolidated.00.pth": b"pickle",
        "original/params.json": b"{}",
        "README.md": b"# Hi",
    }
    Hub.cut, Hub.asked = set(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def pull(hub, tmp_path, name="org/model", *options):
    env = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    env.pop("HF_HUB_OFFLINE", None)
    return craton("pull", name, "--out", tmp_path / "out", "--json", *options, env=env, timeout=120)


def test_pull(hub, tmp_path):
    Hub.cut = {"model-00002-of-00009.safetensors"}
    done = pull(hub, tmp_path)
    for _ in range(3):
        if done.returncode == 0:
            break
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()[-1]) < 400
        done = pull(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["model_type"] == "llama" and facts["revision"] == SHA
    got = {p.name for p in (tmp_path / "out").iterdir() if p.is_file()}
    assert got == {
        n for n in Hub.files if n not in ("pytorch_model.bin", "consolidated.00.pth", "original/params.json")
    }
    assert all((tmp_path / "out" / n).read_bytes() == Hub.files[n] for n in got)
    Hub.asked.clear()
    assert pull(hub, tmp_path).returncode == 0  # nothing is downloaded twice
    assert not [a for a in Hub.asked if a[0] == "GET" and "safetensors" in a[1]]
    from craton.weights.folder import load_network

    assert load_network(tmp_path / "out").config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", "no such model"),
        ("org/pickled", "no safetensors"),
        ("org/gated", "consent"),
        ("model", "ORG/NAME"),
        ("a/b/c", "ORG/NAME"),
        ("org/..", "ORG/NAME"),
    ],
)
def test_pull_refuses(hub, tmp_path, name, message):
    done = pull(hub, tmp_path, name)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_no_network(tmp_path):
    done = pull("http://127.0.0.1:9", tmp_path)
    assert done.returncode == 2 and "cannot be reached" in done.stderr or "download failed" in done.stderr
    assert "Traceback" not in done.stderr
