"""`craton serve`: from names and flags to a listening server."""

import ctypes
import gc
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from craton.base import UserError, count, local, read_text, say
from craton.model.paging import BLOCK
from craton.serve import grounded
from craton.serve.app import create_app
from craton.serve.guard import Protocol, Settings
from craton.serve.metrics import Metrics
from craton.serve.served import Served, adapter_served, open_served


def populate(caches: list[Any]) -> None:
    """Give the caches their memory now, so that what the server needs is known at its start and not in its busiest
    hour. Contents stay as they are (MADV_POPULATE_WRITE of Linux 5.14; elsewhere memory comes with use)."""
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    piece = 16 << 20  # others fault pages in between
    for cache in caches:
        begin = -(-cache.data_ptr() // 4096) * 4096
        end = (cache.data_ptr() + cache.nbytes) // 4096 * 4096
        for at in range(begin, end, piece):
            if advise is None or advise(ctypes.c_void_p(at), ctypes.c_size_t(min(piece, end - at)), 23) != 0:
                return
            time.sleep(0.002)


def read_keys(path: Path | None) -> list[str]:
    """API keys: one a line of a file, and those in CRATON_API_KEY, separated by commas."""
    keys = [k.strip() for k in os.environ.get("CRATON_API_KEY", "").split(",") if k.strip()]
    if path is not None:
        lines = [line.strip() for line in read_text(path).splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(f"{path}: holds no key; write one a line")
        keys += found
    if short := [k for k in keys if len(k) < 8]:
        raise UserError(f"an API key has {len(short[0])} characters; give at least 8")
    return keys


def named(models: list[str]) -> dict[str, str]:
    """MODEL, NAME[,ALIAS...]=MODEL or NAME=MODEL+ADAPTER -> path by names, which are joined by commas."""
    out: dict[str, str] = {}
    taken: list[str] = []
    for given in models:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            name, path = Path(given).resolve().name.removesuffix(".gguf"), given
        for one in name.split(","):
            if not one:
                raise UserError(f"{given}: a name is empty")
            if one in taken:
                raise UserError(f"two models are named {one!r}; give NAME=MODEL")
            taken.append(one)
        for part in [path] if Path(path).exists() else path.split("+", 1):
            if not Path(part).exists():
                raise UserError(f"{part}: no such model folder or file")
        out[name] = path
    return out


def check_keys(host: str, keys: list[str]) -> None:
    """UserError if others could connect and none needs a key."""
    if not local(host) and not keys:
        fix = "--api-keys FILE, or CRATON_API_KEY"
        raise UserError(f"--host {host} can be reached from elsewhere, so an API key is needed: {fix}")


@dataclass
class Listening:
    """Where a server listens, and how it treats requests. See `craton serve --help`."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_wait: float = 30.0
    max_queue: int = 256
    drain: float = 30.0


def serve(
    models: list[str],
    where: Listening,
    settings: Settings,
    ready: Callable[[dict[str, Any]], None] = lambda facts: None,
    adapters: Sequence[str] = (),
    indexes: Sequence[str] = (),
    **options: Any,
) -> None:
    """Until SIGTERM or SIGINT. ready: is told the address and the models when requests are taken. options: of the
    engine. Raises UserError for what cannot be served."""
    check_keys(where.host, settings.keys)
    paths, listener = named(models), _listen(where.host, where.port)
    _log_to_stderr()
    served: dict[str, Served] = {}
    metrics = Metrics(served)
    settings.indexes = grounded.open_shelves(list(indexes))
    for names, path in paths.items():
        name, *aliases = names.split(",")
        _open(served, name, path, where, metrics, **options)
        settings.aliases |= dict.fromkeys(aliases, name)
    base = next(iter(served.values()))
    for name, path in named(list(adapters)).items():
        if name in served or name in settings.aliases:
            raise UserError(f"--adapter {name}: another model has this name; give NAME=DIR")
        served[name] = adapter_served(base, name, Path(path))
        say(f"{name}: an adapter of {base.name}")
    address = f"[{where.host}]" if ":" in where.host else where.host
    if not settings.keys:
        settings.hosts = {"localhost", "127.0.0.1", "[::1]", address}
    app = create_app(served, settings, metrics)
    sys.setswitchinterval(0.001)  # the engine's thread must not wait long for the one that writes
    gc.collect()
    gc.freeze()  # a full collection would go through every module, in the middle of an answer
    limits: dict[str, Any] = dict(timeout_graceful_shutdown=int(where.drain), timeout_keep_alive=30, backlog=2048)
    without: dict[str, Any] = dict(ws="none", access_log=False, log_config=None, server_header=False)
    config = uvicorn.Config(app, where.host, where.port, http=Protocol, loop="uvloop", **limits, **without)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    key = ", key needed" if settings.keys else ""
    url = f"http://{address}:{listener.getsockname()[1]}"
    say(f"{url}  (page at /, API at /v1{key}); Ctrl-C ends")
    ready({"url": url, "models": [s.describe() for s in served.values()]})
    runners = {s.talker.engine.runner for s in served.values()}
    caches = [t for r in runners if r.device.type == "cpu" for t in (r.cache.keys, r.cache.values)]
    threading.Thread(target=populate, args=(caches,), daemon=True).start()
    uvicorn.Server(config).run(sockets=[listener])


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "asyncio", "multipart"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _open(served: dict[str, Served], name: str, path: str, where: Listening, metrics: Metrics, **options: Any) -> None:
    """Load a model, warm it up, and say what it is."""
    began = time.perf_counter()
    one = served[name] = open_served(name, path, where.max_wait, where.max_queue, metrics.observe, **options)
    one.worker.warm_up()
    talker, pool = one.talker, one.talker.engine.scheduler.pool
    what = "only pretrained, goes on with text" if talker.pretrained_only else "chat"
    say(
        f"{name}: {what}; context {count(talker.engine.context)}, cache {count(pool.total * BLOCK)} tokens, prompts at "
        f"{count(one.worker.rate)} tokens/s; ready in {time.perf_counter() - began:.1f} s"
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({why})") from None
    return listener


def vllm_command(
    models: list[str], host: str, port: int, keys: list[str], origins: list[str], max_queue: int
) -> list[str]:
    """The command that serves the same folder by vLLM. Raises UserError for what vLLM cannot do."""
    paths = named(models)
    if len(paths) > 1:
        raise UserError("--engine vllm serves one model; start one server a model")
    ((names, path),) = paths.items()
    if not Path(path).exists():
        raise UserError("--engine vllm: give vLLM the model alone; its own --lora-modules adds adapters")
    check_keys(host, keys)
    program = shutil.which("vllm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        raise UserError("--engine vllm: vLLM is not installed; pip install 'craton[vllm]' on a machine with a GPU")
    command = [program, "serve", path, "--served-model-name", *names.split(","), "--host", host, "--port", str(port)]
    command += ["--max-num-seqs", str(min(max_queue, 256)), "--shutdown-timeout", "30"]
    if origins:
        command += ["--allowed-origins", "[" + ",".join(f'"{o}"' for o in origins) + "]"]
    return command


def serve_by_vllm(models: list[str], host: str, port: int, keys: list[str], origins: list[str], max_queue: int) -> None:
    """Become vLLM. The key goes by the environment, so that no list of processes shows it."""
    if len(keys) > 1:
        raise UserError(f"--engine vllm takes one API key from the environment, and there are {len(keys)}; give one")
    command = vllm_command(models, host, port, keys, origins, max_queue)
    environment = {**os.environ, **({"VLLM_API_KEY": keys[0]} if keys else {})}
    say("vLLM: " + " ".join(command))
    os.execve(command[0], command, environment)
