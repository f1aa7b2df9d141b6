"""Servers under load, side by side: craton serve, llama.cpp's server, transformers serve, the same weights, in turns.

    python benchmarks/serve.py [--models 44M,1.1B] [--bits 4] [--clients 1,8,32] [--rounds 3] [--json FILE]
    python benchmarks/serve.py --rates 2,8       Poisson arrivals a second instead of a closed loop
    python benchmarks/serve.py --peers llama.cpp --llama-server PATH --peer-python PATH

Closed loop: so many clients, each sends its next request when it has the last answer. Random weights in Llama's shape;
prompts of 32 to 256 random tokens, answers of 32 to 128, the same for every server; nothing is shared or stopped early.
A figure is the median over the rounds. Goodput counts the requests with first token within 1 s and 200 ms a token.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parent))
from decode import build  # noqa: E402

GOOD_FIRST, GOOD_EACH = 1.0, 0.2  # seconds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(
        self,
        name: str,
        command: list[str],
        port: int,
        model: str,
        health: str,
        environment: dict[str, str] | None = None,
    ):
        self.name, self.port, self.model = name, port, model
        self.log = open(tempfile.mktemp(prefix="serve-bench-"), "wb")  # noqa: SIM115
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env={**os.environ, **(environment or {})}
        )
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{health}", timeout=2) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                pass
            if self.process.poll() is not None or time.perf_counter() - began > 180:
                raise SystemExit(f"{name} did not start; see {self.log.name}")
            time.sleep(0.05)
        self.start_seconds = time.perf_counter() - began

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start(name: str, folder: Path, a: argparse.Namespace) -> Server:
    port = free_port()
    if name == "craton":
        return Server(
            name, [sys.executable, "-m", "craton", "serve", f"m={folder}", "--port", str(port)], port, "m", "/ready"
        )
    if name == "llama.cpp":
        slots = max(a.clients)
        command = [
            a.llama_server,
            "-m",
            str(folder / "m.gguf"),
            "--port",
            str(port),
            "-t",
            "2",
            "-tb",
            "2",
            "-np",
            str(slots),
            "-c",
            str(512 * slots),
            "--no-webui",
        ]
        return Server(name, command, port, "m", "/health")
    whole = folder.parent / "fp32"  # it cannot read the packed form on a CPU; bf16 is slower than fp32 on most
    if not whole.exists():
        build(a.name, 32, whole)
    folder, python = whole, Path(a.peer_python)
    command = [
        str(python.parent / "transformers"),
        "serve",
        "--port",
        str(port),
        "--continuous-batching",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    return Server(name, command, port, str(folder), "/health", {"HF_HUB_OFFLINE": "1"})


def plan(seed: int, count: int) -> list[tuple[str, int]]:
    """Prompts, one character a token, and the length of each answer."""
    r = random.Random(seed)
    return [
        ("".join(chr(0x4E00 + r.randrange(20_000)) for _ in range(r.randint(32, 256))), r.randint(32, 128))
        for _ in range(count)
    ]


class Asked(asyncio.Protocol):
    """One streamed request: what came, and when. Read only after the load, so that the clients cost little."""

    def __init__(self, head: bytes):
        self.head, self.pieces, self.done = (
            head,
            list[tuple[float, bytes]](),
            asyncio.get_running_loop().create_future(),
        )

    def connection_made(self, transport) -> None:
        self.began = time.perf_counter()
        transport.write(self.head)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(None)

    def figures(self, name: str) -> dict:
        times, tokens, rest = [], None, b""
        for when, data in self.pieces:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    value = json.loads(line[6:])
                    if value.get("choices") and value["choices"][0].get("text"):
                        times.append(when)
                    if value.get("usage"):
                        tokens = value["usage"]["completion_tokens"]
        status = self.pieces[0][1].partition(b"\r\n")[0] if self.pieces else b"nothing"
        if b" 200 " not in status or not times:
            raise SystemExit(f"{name}: {status.decode()}")
        return {
            "first": times[0] - self.began,
            "last": times[-1] - self.began,
            "times": times,
            "tokens": tokens if tokens is not None else len(times),
        }


async def ask(server: Server, prompt: str, most: int) -> Asked:
    body = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": most,
        "stream": True,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    if server.name == "transformers":  # it refuses or ignores the rest; random weights do not end by themselves
        body = {k: v for k, v in body.items() if k in ("model", "prompt", "max_tokens", "stream")}
    data = json.dumps(body).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: "
        b"close\r\ncontent-length: %d\r\n\r\n" % len(data)
    )
    _, asked = await asyncio.get_running_loop().create_connection(lambda: Asked(head + data), "127.0.0.1", server.port)
    await asked.done
    return asked


async def load(server: Server, asks: list[tuple[str, int]], clients: int, rate: float | None) -> dict:
    """All of them, by so many clients or at a rate (requests a second); figures."""
    began, done = time.perf_counter(), []
    if rate:
        r, tasks = random.Random(1), []
        for prompt, most in asks:
            tasks.append(asyncio.create_task(ask(server, prompt, most)))
            await asyncio.sleep(r.expovariate(rate))
        done = await asyncio.gather(*tasks)
    else:
        left = iter(asks)

        async def client() -> None:
            for prompt, most in left:
                done.append(await ask(server, prompt, most))

        await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    done = [d.figures(server.name) for d in done]
    gaps = sorted(b - x for d in done for x, b in zip(d["times"], d["times"][1:], strict=False))
    firsts = sorted(d["first"] for d in done)
    good = sum(
        d["first"] <= GOOD_FIRST and (d["last"] - d["first"]) / max(1, d["tokens"] - 1) <= GOOD_EACH for d in done
    )

    def at(values: list[float], share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))]

    return {
        "tokens_per_second": sum(d["tokens"] for d in done) / seconds,
        "first_p50": at(firsts, 0.5),
        "first_p95": at(firsts, 0.95),
        "first_p99": at(firsts, 0.99),
        "between_p95": at(gaps, 0.95) if gaps else 0.0,
        "goodput": good / seconds,
        "requests": len(done),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="44M,1.1B")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--clients", default="8,32")
    parser.add_argument("--rates", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4, help="a client and round")
    parser.add_argument("--peers", default="llama.cpp")
    parser.add_argument("--llama-server", default=shutil.which("llama-server") or "llama-server")
    parser.add_argument(
        "--peer-python", default=".venv-bench/bin/python", help="of the environment that has transformers[serving]"
    )
    parser.add_argument("--json")
    a = parser.parse_args()
    a.clients = [int(c) for c in a.clients.split(",")]
    rates = [float(r) for r in a.rates.split(",") if r]
    results = []
    for name in a.models.split(","):
        a.name = name
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "m"
            build(name, a.bits, folder)
            servers = [start(p, folder, a) for p in ["craton", *a.peers.split(",")]]
            print(
                f"{name}, {a.bits} bits: " + ", ".join(f"{s.name} ready in {s.start_seconds:.1f} s" for s in servers),
                flush=True,
            )
            try:
                for clients, rate in [(c, None) for c in a.clients] if not rates else [(0, r) for r in rates]:
                    rows: dict[str, list[dict]] = {s.name: [] for s in servers}
                    for i in range(a.rounds + 1):
                        asks = plan(i, a.requests * (clients or max(8, int(rate * 10))))
                        for s in servers:
                            row = uvloop.run(load(s, asks if i else asks[: max(2, clients // 4)], clients, rate))
                            if i:  # the first warms up
                                rows[s.name].append(row)
                    middle = {
                        n: {k: statistics.median(r[k] for r in many) for k in many[0]} for n, many in rows.items()
                    }
                    case = f"{clients} clients" if clients else f"{rate:g} requests a second"
                    for n, m in middle.items():
                        ratio = middle["craton"]["tokens_per_second"] / m["tokens_per_second"]
                        print(
                            f"  {case:<22}{n:<13}{m['tokens_per_second']:8.1f} tok/s  first {m['first_p50']:6.3f} "
                            f"{m['first_p95']:6.3f} {m['first_p99']:6.3f} s  between p95 "
                            f"{m['between_p95'] * 1e3:6.1f} ms  goodput {m['goodput']:5.2f}/s"
                            + (f"   craton is {ratio:5.2f}x" if n != "craton" else ""),
                            flush=True,
                        )
                    results.append(
                        {
                            "model": name,
                            "bits": a.bits,
                            "case": case,
                            "medians": middle,
                            "rounds": rows,
                            "start_seconds": {s.name: s.start_seconds for s in servers},
                        }
                    )
            finally:
                for s in servers:
                    s.close()
    if a.json:
        from craton.train import machine

        Path(a.json).write_text(json.dumps({"environment": machine.facts("cpu"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
