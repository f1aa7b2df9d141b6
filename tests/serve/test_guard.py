"""Keys, limits and abuse: what must not get through, and must not hurt those who behave."""

import json
import statistics
import time
from pathlib import Path

import pytest

from craton.serve import guard
from craton.serve.guard import Settings

HI = {"model": "chat", "messages": [{"role": "user", "content": "Tell me a joke."}]}
KEYS = ["key-of-alice-0123456789", "key-of-bob-9876543210"]


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
