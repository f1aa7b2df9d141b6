"""Keys, limits and abuse: what must not get through, and must not hurt those who behave."""

import asyncio
import contextlib
import json
import socket
import statistics
import threading
import time
from pathlib import Path

import httpx
import pytest
import tiny
import uvicorn
from conftest import Running

from craton.serve import guard
from craton.serve import reply as reply_module
from craton.serve.app import create_app
from craton.serve.metrics import Metrics
from craton.serve.reply import Settings
from craton.serve.served import open_served

HI = {"model": "chat", "messages": [{"role": "user", "content": "Tell me a joke."}]}
KEYS = ["key-of-alice-0123456789", "key-of-bob-9876543210"]


class InProcess:
    """A server in a thread, so that its limits can be set low."""

    def __init__(
        self, folder: Path, settings: Settings, max_wait: float = 30.0, max_queue: int = 64, **options: object
    ):
        models: dict = {}
        self.metrics = Metrics(models)
        self.served = models["chat"] = open_served(
            "chat", str(folder), max_wait, max_queue, self.metrics.observe, **options
        )
        self.served.worker.warm_up()
        self.server = uvicorn.Server(
            uvicorn.Config(
                create_app(models, settings, self.metrics),
                port=0,
                http=guard.Protocol,
                access_log=False,
                log_config=None,
                ws="none",
                timeout_graceful_shutdown=1,
            )
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def idle(self, seconds: float = 10) -> bool:
        """Whether nothing runs and every block is back, soon."""
        until = time.monotonic() + seconds
        pool = self.served.talker.engine.scheduler.pool
        while time.monotonic() < until:
            if not self.served.worker.alive and not self.served.talker.engine.busy and pool.free == pool.total:
                return True
            time.sleep(0.02)
        return False

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def start(chat_folder, monkeypatch):
    running = []

    def go(settings=None, constants=None, **more):
        for name, value in (constants or {}).items():
            monkeypatch.setattr(guard if hasattr(guard, name) else reply_module, name, value)
        running.append(InProcess(chat_folder, settings or Settings(), **more))
        return running[-1]

    yield go
    for r in running:
        r.close()


# ---- keys -------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_learned(start):
    s = start(Settings(keys=KEYS))
    answers = set()
    for method, path in [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/chat"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/messages/x"),
        ("DELETE", "/v1/responses/x"),
        ("GET", "/page/../app.py"),
        ("OPTIONS", "/v1/models"),
    ]:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic " + KEYS[0]},
            {"x-api-key": KEYS[0][:-1]},
            {"authorization": "Bearer " + KEYS[0] + "x"},
        ):
            got = s.client.request(method, path, headers=headers, content=b"{" if method == "POST" else None)
            assert got.status_code == 401, (method, path, headers)
            answers.add((got.json()["error"]["message"], tuple(sorted(k for k in got.headers if k != "date"))))
    assert len({a[0] for a in answers}) == 1 and len({a[1] for a in answers}) == 1
    for headers in (
        {"authorization": "Bearer " + KEYS[0]},
        {"authorization": "bearer " + KEYS[1]},
        {"x-api-key": KEYS[1]},
    ):
        assert s.client.get("/v1/models", headers=headers).status_code == 200
    assert s.client.get("/health").json() == {"status": "ok"} and s.client.get("/ready").status_code == 200
    page = s.client.get("/")
    assert page.status_code == 200 and "chat" not in page.text.replace("The chat page was not built", "")


def test_a_key_is_compared_in_constant_time(start):
    """The time of a refusal does not tell how much of a key was right."""
    s = start(Settings(keys=KEYS))
    wrong = ["x" * len(KEYS[0]), KEYS[0][:-1] + "x"]
    times = [[], []]
    for _ in range(400):
        for i, key in enumerate(wrong):
            began = time.perf_counter()
            s.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            times[i].append(time.perf_counter() - began)
    a, b = (statistics.median(t) for t in times)
    assert abs(a - b) < 0.25 * max(a, b)
    assert "compare_digest" in Path(guard.__file__).read_text()


def test_owners_do_not_see_each_others_responses(start):
    s = start(Settings(keys=KEYS))
    alice, bob = ({"authorization": f"Bearer {k}"} for k in KEYS)
    made = s.client.post("/v1/responses", json={"model": "chat", "input": "Tell me a joke."}, headers=alice).json()
    assert s.client.get(f"/v1/responses/{made['id']}", headers=alice).status_code == 200
    assert s.client.get(f"/v1/responses/{made['id']}", headers=bob).status_code == 404
    assert (
        s.client.post(
            "/v1/responses", json={"model": "chat", "input": "x", "previous_response_id": made["id"]}, headers=bob
        ).status_code
        == 404
    )


# ---- hosts, origins, paths --------------------------------------------------------------------------------------


def test_hosts_and_origins(start):
    s = start(Settings(hosts={"localhost", "127.0.0.1", "[::1]"}))
    assert s.client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    for host in ("localhost:1", "localhost", "[::1]:80", "[::1]"):
        assert s.client.get("/v1/models", headers={"host": host}).status_code == 200
    got = s.client.get("/v1/models", headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in got.headers
    assert (
        s.client.post(
            "/v1/chat/completions", content=json.dumps(HI), headers={"content-type": "text/plain"}
        ).status_code
        == 415
    )
    o = start(Settings(origins=["http://good.example"]))
    assert (
        o.client.get("/v1/models", headers={"origin": "http://good.example"}).headers["access-control-allow-origin"]
        == "http://good.example"
    )
    assert (
        "access-control-allow-origin"
        not in o.client.get("/v1/models", headers={"origin": "http://evil.example"}).headers
    )


@pytest.mark.parametrize(
    "path",
    [
        "/page/../app.py",
        "/page/..%2fapp.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
        "/page/%00",
        "/../../etc/passwd",
        "/page/..\\app.py",
        "/static/app.py",
        "//etc/passwd",
        "/page/app.js%00.html",
    ],
)
def test_path_tricks(start, path):
    s = start()
    with s.connect() as c:
        c.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: c.recv(65536), b""))
    assert answer.split(b" ")[1] in (b"404", b"400") and b"import" not in answer and b"root:" not in answer


# ---- sizes and times --------------------------------------------------------------------------------------------


def test_body_sizes(start):
    s = start(Settings(max_body=10_000))
    big = {**HI, "messages": [{"role": "user", "content": "x" * 20_000}]}
    assert s.client.post("/v1/chat/completions", json=big).status_code == 413

    def pieces():
        for _ in range(100):
            yield b"x" * 1000

    assert (
        s.client.post(
            "/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"}
        ).status_code
        == 413
    )
    with s.connect() as c:  # says that much will come, and never sends it
        c.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
            b"application/json\r\ncontent-length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in c.recv(1000)
    assert s.client.post("/v1/chat/completions", json=HI).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"{" * 5000,
        b"[" * 200_000,
        b'{"model": "chat", "messages": "x"}',
        b'{"model": "chat", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "chat", "seed": 1e999, "messages": []}',
        b'{"model": "chat", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": ' + b"9" * 10_000 + b"}",
    ],
)
def test_malformed_bodies(start, body):
    s = start()
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/tokenize",
        "/detokenize",
        "/votes",
    ):
        got = s.client.post(path, content=body, headers={"content-type": "application/json"})
        assert got.status_code == 400 and got.json()["error"]["message"], (path, got.text)


def test_slow_heads_and_bodies_are_cut_off(start):
    s = start(constants={"HEADER_SECONDS": 0.4, "BODY_SECONDS": 0.4})
    sockets = [s.connect() for _ in range(20)]
    began = time.monotonic()
    for c in sockets[:10]:
        c.sendall(b"GET /health HTTP/1.1\r\nhost: loc")
    for c in sockets[10:]:
        c.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
            b"application/json\r\ncontent-length: 100\r\n\r\n{"
        )
    assert s.client.post("/v1/chat/completions", json=HI).status_code == 200
    for i, c in enumerate(sockets):
        c.settimeout(5)
        try:
            data = c.recv(1000)
        except ConnectionResetError:
            data = b""
        assert data == b"" if i < 10 else b" 408 " in data
        c.close()
    assert time.monotonic() - began < 5
    with s.connect() as c:  # on a connection that was used well before
        c.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"200" in c.recv(1000)
        c.sendall(b"GET /hea")
        c.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert c.recv(1000) == b""


def test_a_head_without_end(start):
    """64 at once: connections are closed and memory stays; it was +396 MiB in 6 s once, before any key was asked."""
    s = start(constants={"HEADER_SECONDS": 60.0})
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    sockets = [s.connect() for _ in range(64)]
    for c in sockets:
        c.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
    closed, line, sent = set(), b"x-more: " + b"y" * 4000 + b"\r\n", 0
    for _ in range(400):
        for c in set(sockets) - closed:
            try:
                c.settimeout(5)
                c.sendall(line)
                sent += len(line)
            except OSError:
                closed.add(c)
        if len(closed) == 64:
            break
    after = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    assert len(closed) == 64 and after - before < 40 << 20, (len(closed), after - before)
    assert s.client.post("/v1/chat/completions", json=HI).status_code == 200
    for c in sockets:
        c.close()


def test_an_answer_that_takes_too_long_ends(start):
    s = start(Settings(timeout=0.5))
    endless = {**HI, "ignore_eos": True, "max_tokens": 3500, "temperature": 1}
    assert s.client.post("/v1/chat/completions", json=endless).status_code == 408
    stream = s.client.post("/v1/chat/completions", json={**endless, "stream": True})
    assert stream.status_code == 200 and "longer than" in stream.text
    assert s.idle()


def test_disconnect_frees_the_cache(start):
    s = start()
    for stream in (True, False):
        body = json.dumps({**HI, "ignore_eos": True, "max_tokens": 3500, "stream": stream}).encode()
        with s.connect() as c:
            c.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
                b"application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            if stream:
                c.recv(100)
            until = time.monotonic() + 5
            while not s.served.talker.engine.scheduler.running and time.monotonic() < until:
                time.sleep(0.005)
            assert s.served.talker.engine.scheduler.running
        began = time.monotonic()
        assert s.idle(2) and time.monotonic() - began < 1.5
    assert s.served.talker.engine.counters.cancelled >= 2


def test_a_reader_that_takes_nothing_is_cut_off(start):
    s = start(constants={"SLOW_READER": 0.5})
    body = json.dumps(
        {
            **HI,
            "ignore_eos": True,
            "max_tokens": 3800,
            "n": 16,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 20,
            "temperature": 1,
        }
    ).encode()
    c = socket.socket()
    c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    c.connect(("127.0.0.1", s.port))
    c.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
        b"%d\r\n\r\n" % len(body) + body
    )
    time.sleep(0.3)
    assert s.client.post("/v1/chat/completions", json=HI).status_code == 200  # others are served meanwhile
    assert s.idle(20) and s.served.talker.engine.counters.cancelled
    c.close()


def test_a_reader_that_takes_nothing_until_time_is_up(start):
    """The limit on the answer's time strikes first, and must not wait for the reader either."""
    s = start(Settings(timeout=0.6), constants={"SLOW_READER": 30.0})
    body = json.dumps(
        {
            **HI,
            "ignore_eos": True,
            "max_tokens": 3800,
            "n": 16,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 20,
            "temperature": 1,
        }
    ).encode()
    c = socket.socket()
    c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    c.connect(("127.0.0.1", s.port))
    c.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
        b"%d\r\n\r\n" % len(body) + body
    )
    time.sleep(1.5)
    assert s.idle(5) and s.served.talker.engine.counters.cancelled
    c.close()


def test_what_waited_too_long_is_never_an_empty_answer():
    """An error comes before what the engine still delivers."""
    from craton.serve.worker import Stream, Unavailable

    stream = Stream(None, 1)
    stream.ready.append(object())
    stream.fail(Unavailable("late"))
    with pytest.raises(Unavailable):
        asyncio.run(stream.take())


# ---- too much ---------------------------------------------------------------------------------------------------


def test_overload(start):
    """Beyond the queue: 429 with Retry-After, and the rest are answered."""
    s = start(max_queue=8)
    many = {**HI, "ignore_eos": True, "max_tokens": 400}

    async def go():
        async with httpx.AsyncClient(
            base_url=s.client.base_url, timeout=60, limits=httpx.Limits(max_connections=64)
        ) as client:
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=many) for _ in range(32)))

    answers = asyncio.run(go())
    good, busy = [a for a in answers if a.status_code == 200], [a for a in answers if a.status_code == 429]
    assert len(good) + len(busy) == 32 and len(good) >= 8 and busy
    assert all(int(a.headers["retry-after"]) >= 1 and "busy" in a.json()["error"]["message"] for a in busy)
    assert len({a.json()["choices"][0]["message"]["content"] for a in good}) == 1 and s.idle()


def test_predicted_wait(start):
    """What would wait longer than the bound is turned away at once, and is let in when the time has passed."""
    s = start(max_wait=0.4, max_queue=1000)
    worker = s.served.worker
    worker.rate = 1000.0  # prompt tokens a second, as if the machine were slow
    worker.backlog = 1400
    got = s.client.post("/v1/chat/completions", json=HI)
    assert got.status_code == 429 and int(got.headers["retry-after"]) == 1 and "wait is about 1 s" in got.text
    worker.backlog = 0
    assert s.client.post("/v1/chat/completions", json=HI).status_code == 200


def test_waited_too_long(start):
    """A request that was let in and does not begin within the bound gets 429 too."""
    s = start(max_wait=0.5, max_queue=1000)
    s.served.talker.engine.scheduler.max_running = 1
    s.served.worker.finish_rate = 1e9  # as if everything were done at once
    body = {**HI, "ignore_eos": True, "max_tokens": 3900}

    async def go():
        async with httpx.AsyncClient(base_url=s.client.base_url, timeout=60) as client:
            long = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await asyncio.sleep(0.1)
            began = time.monotonic()
            late = await client.post("/v1/chat/completions", json=HI)
            waited = time.monotonic() - began
            long.cancel()
            return late, waited

    late, waited = asyncio.run(go())
    assert late.status_code == 429 and 0.4 < waited < 1.5 and "has waited" in late.text
    assert s.idle()


def test_a_failing_step_does_not_take_the_server_with_it(start, monkeypatch):
    s = start()
    broken = s.served.talker.engine.step
    monkeypatch.setattr(s.served.talker.engine, "step", lambda: 1 / 0)
    got = s.client.post("/v1/chat/completions", json=HI)
    assert got.status_code == 503 and "division" in got.json()["error"]["message"]
    monkeypatch.setattr(s.served.talker.engine, "step", broken)
    assert (
        s.client.post("/v1/chat/completions", json=HI).json()["choices"][0]["message"]["content"] == tiny.SHORT
        and s.idle()
    )


# ---- logs, votes, metrics ---------------------------------------------------------------------------------------


def test_logs_hold_no_prompts(chat_folder, tmp_path):
    secret = "Xylophone77"
    for more, wanted in ((), False), (("--log-prompts",), True):
        r = Running(f"chat={chat_folder}", "--votes", tmp_path / "v", *more)
        r.post("/v1/chat/completions", json={**HI, "messages": [{"role": "user", "content": secret}]})
        r.post("/v1/chat/completions", json={**HI, "wrong": secret})
        r.post(
            "/v1/chat/completions",
            json={**HI, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": secret}}}]},
        )
        r.client.get(f"/v1/models/{secret}")
        r.client.get(f"/{secret}?{secret}")
        r.stop()
        assert (secret in "".join(r.lines)) == wanted
        assert "POST /v1/chat/completions 200" in "".join(r.lines)


def test_votes_and_metrics(server):
    vote = {
        "messages": [{"role": "user", "content": "x"}],
        "left": {"model": "chat", "text": "a", "settings": {"temperature": 0.5}},
        "right": {"model": "base", "text": "b"},
        "vote": "right",
    }
    assert server.post("/votes", json=vote).json() == {"stored": True}
    assert server.post("/votes", json={**vote, "vote": "maybe"}).status_code == 400
    before = server.metric("craton_generated_tokens_total")
    answer = server.post("/v1/chat/completions", json=HI).json()
    assert server.metric("craton_generated_tokens_total") - before == pytest.approx(
        answer["usage"]["completion_tokens"], abs=1
    )
    assert server.metric("craton_cache_blocks") == server.metric("craton_cache_blocks_free")
