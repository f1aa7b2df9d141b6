"""A server under everything at once, for minutes: does it stay whole?

    python benchmarks/soak.py MODEL [--minutes 10] [--clients 64] [--malformed 2000] [--json FILE]

Streaming clients that read well, cancel half-way, read slowly or vanish without a word; malformed bodies; connections
that say half of a request. At the end: failed good requests, answers of 5xx, memory after the first fifth and at the
end, cache blocks that did not come back. Then a burst far beyond the queue: 429 with Retry-After, and the wait of those
that were let in.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from serve import Server, free_port  # noqa: E402

BAD = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b"[" * 50_000,
    b'{"model": "m"}',
    b'{"model": "m", "prompt": {}}',
    b'{"model": "m", "prompt": "x", "max_tokens": -1}',
    b'{"model": "m", "prompt": "x", "n": 1000000}',
    b'{"model": "m", "prompt": "\\ud800"}',
    b'{"model": "nothing", "prompt": "x"}',
    b'{"model": "m", "prompt": [999999999]}',
    b'{"model": "m", "prompt": "x", "stop": [""]}',
    b'{"model": "m", "prompt": "x", "structured_outputs": {"json": {"type": 7}}}',
]


def request(body: bytes, path: str = "/v1/completions") -> bytes:
    return (
        b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: "
        b"close\r\ncontent-length: %d\r\n\r\n%b" % (path.encode(), len(body), body)
    )


def memory(pid: int) -> float:
    """MB of the process, without what it has only mapped."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise SystemExit("the server is gone")


async def metric(port: int, name: str) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((name + "{", name + " ")))


class Soak:
    def __init__(self, server: Server, seed: int):
        self.server, self.random = server, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.firsts: list[float] = []

    async def client(self, until: float) -> None:
        r = self.random
        while time.monotonic() < until:
            kind = r.choices(("good", "cancel", "slow", "vanish"), (70, 15, 10, 5))[0]
            length = r.randint(8, 96)
            body = {
                "model": "m",
                "prompt": "".join(chr(0x4E00 + r.randrange(20_000)) for _ in range(r.randint(4, 200))),
                "max_tokens": length,
                "ignore_eos": True,
                "stream": True,
                "temperature": r.choice((0, 1)),
                "stream_options": {"include_usage": True},
            }
            began = time.monotonic()
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self.server.port, limit=4096 if kind == "slow" else 65536
                )
                writer.write(request(json.dumps(body).encode()))
                status = int((await reader.readline()).split()[1])
                self.counts[f"status {status}"] += 1
                if kind == "vanish":  # neither reads nor closes, for a while
                    await asyncio.sleep(r.uniform(0.5, 5))
                    writer.transport.abort()
                    self.counts["vanished"] += 1
                    continue
                ended, tokens, seen = False, None, 0
                async for line in reader:
                    if line.startswith(b"data: {"):
                        if not seen:
                            self.firsts.append(time.monotonic() - began)
                        seen += 1
                        if kind == "cancel" and seen > length // 3:
                            break
                        if kind == "slow":
                            await asyncio.sleep(0.02)
                        if b'"completion_tokens"' in line:
                            tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                    ended = ended or line.startswith(b"data: [DONE]")
                writer.close()
                if kind == "cancel":
                    self.counts["cancelled"] += 1
                elif status == 200 and ended and tokens == length:
                    self.counts["good"] += 1
                else:
                    self.counts["FAILED"] += 1
            except (OSError, ValueError, IndexError) as error:
                self.counts[f"FAILED {type(error).__name__}"] += 1

    async def malformed(self, count: int, until: float) -> None:
        pause = max(0.0, (until - time.monotonic()) * 0.9 / max(1, count))
        for _ in range(count):
            path = self.random.choice(
                (
                    "/v1/completions",
                    "/v1/chat/completions",
                    "/v1/responses",
                    "/v1/messages",
                    "/v1/embeddings",
                    "/tokenize",
                )
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            writer.write(request(self.random.choice(BAD), path))
            status = int((await reader.readline()).split()[1])
            self.counts["malformed, refused" if 400 <= status < 500 else f"FAILED malformed {status}"] += 1
            writer.close()
            await asyncio.sleep(pause)

    async def half_open(self, until: float) -> None:
        held: list[asyncio.StreamWriter] = []
        while time.monotonic() < until:
            _, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            writer.write(
                self.random.choice(
                    (
                        b"",
                        b"GET /he",
                        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
                        b"application/json\r\ncontent-length: 1000\r\n\r\n{",
                    )
                )
            )
            held.append(writer)
            self.counts["half-open"] += 1
            if len(held) > 100:
                held.pop(0).transport.abort()
            await asyncio.sleep(0.5)
        for writer in held:
            writer.transport.abort()

    async def burst(self, count: int) -> dict[str, object]:
        """So many requests at the same moment."""
        body = json.dumps(
            {"model": "m", "prompt": "\u4e00" * 150, "max_tokens": 64, "ignore_eos": True, "stream": True}
        ).encode()

        async def one() -> tuple[int, float, bytes]:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            began = time.monotonic()
            writer.write(request(body))
            status = int((await reader.readline()).split()[1])
            rest, first = b"", 0.0
            async for line in reader:
                rest += line
                if line.startswith(b"data: {") and not first:
                    first = time.monotonic() - began
            writer.close()
            return status, first, rest

        rows = await asyncio.gather(*(one() for _ in range(count)))
        firsts = [f for s, f, _ in rows if s == 200]
        busy = [r for s, _, r in rows if s == 429]
        return {
            "admitted": len(firsts),
            "refused": len(busy),
            "other": len(rows) - len(firsts) - len(busy),
            "first_max": max(firsts),
            "with_retry_after": sum(b"retry-after:" in r.lower() for r in busy),
        }


async def run(server: Server, a: argparse.Namespace) -> dict[str, object]:
    soak = Soak(server, 0)
    until = time.monotonic() + a.minutes * 60
    memories: list[float] = []

    async def watch() -> None:
        while time.monotonic() < until:
            memories.append(memory(server.process.pid))
            if len(memories) % 30 == 0:
                print(f"  {len(memories)} s  {memories[-1]:.0f} MB  {dict(soak.counts)}", flush=True)
            await asyncio.sleep(1)

    await asyncio.gather(
        watch(),
        soak.malformed(a.malformed, until),
        soak.half_open(until),
        *(soak.client(until) for _ in range(a.clients)),
    )
    await asyncio.sleep(2)
    fifth = len(memories) // 5
    early, late = statistics.median(memories[fifth : 2 * fifth]), statistics.median(memories[-fifth:])
    left = await metric(server.port, "craton_cache_blocks") - await metric(server.port, "craton_cache_blocks_free")
    firsts = sorted(soak.firsts)
    burst = await soak.burst(a.burst)
    return {
        "minutes": a.minutes,
        "counts": dict(soak.counts),
        "failed": sum(v for k, v in soak.counts.items() if k.startswith(("FAILED", "status 5"))),
        "memory_mb_early": early,
        "memory_mb_late": late,
        "memory_drift": late / early - 1,
        "blocks_not_returned": left,
        "first_p50": firsts[len(firsts) // 2],
        "first_p99": firsts[int(0.99 * len(firsts))],
        "first_max": firsts[-1],
        "burst": burst,
        "blocks_not_returned_after_burst": await metric(server.port, "craton_cache_blocks")
        - await metric(server.port, "craton_cache_blocks_free"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--malformed", type=int, default=2000)
    parser.add_argument("--burst", type=int, default=400)
    parser.add_argument("--max-wait", type=float, default=5)
    parser.add_argument("--json")
    a = parser.parse_args()
    port = free_port()
    server = Server(
        "craton",
        [
            sys.executable,
            "-m",
            "craton",
            "serve",
            f"m={a.model}",
            "--port",
            str(port),
            "--max-wait",
            str(a.max_wait),
            "--votes",
            tempfile.mktemp(),
        ],
        port,
        "m",
        "/ready",
    )
    try:
        out = asyncio.run(run(server, a))
        print(json.dumps(out, indent=1))
        if a.json:
            Path(a.json).write_text(json.dumps(out, indent=1) + "\n")
    finally:
        try:
            server.close()
        except subprocess.SubprocessError:
            server.process.kill()


if __name__ == "__main__":
    main()
