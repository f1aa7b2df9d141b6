"""The files in deploy/: each is read by what reads such files, as far as that is here, and says what the server
does."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from craton.base import UserError
from craton.cli import app
from craton.serve.run import local

HERE = Path(__file__).parents[2] / "deploy"


def options(words: list[str]) -> None:
    """The words are a `craton serve` that the command line accepts."""
    import typer.main

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    command.make_context("serve", list(words))


def test_kubernetes():
    documents = list(yaml.safe_load_all((HERE / "kubernetes.yaml").read_text()))
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents:
        validate.validate(document, "1.31", strict=True)
    pod = documents[0]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    options([*shlex.split("--host 0.0.0.0 --port 8000"), *container["args"]])
    drain = int(container["args"][container["args"].index("--drain") + 1])
    assert drain + 5 < pod["terminationGracePeriodSeconds"]
    assert {container[p]["httpGet"]["path"] for p in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        "/ready",
        "/health",
    }
    assert documents[1]["spec"]["selector"] == documents[0]["spec"]["template"]["metadata"]["labels"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_systemd(tmp_path):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(HERE / "craton.service")
    words = shlex.split(unit["Service"]["ExecStart"])
    options(words[2:])
    assert not local(words[words.index("--host") + 1]) and int(words[words.index("--drain") + 1]) < int(
        unit["Service"]["TimeoutStopSec"]
    )
    if (program := shutil.which("systemd-analyze")) is None:
        pytest.skip("no systemd-analyze here")
    text = (HERE / "craton.service").read_text().replace("/opt/craton/bin/craton", shutil.which("true") or "/bin/true")
    (tmp_path / "craton.service").write_text(text)
    done = subprocess.run(
        [program, "verify", "--man=no", str(tmp_path / "craton.service")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "craton.service" not in done.stderr, done.stderr


def test_container():
    parse = pytest.importorskip("dockerfile_parse")
    steps = parse.DockerfileParser(path=str(HERE / "Dockerfile"), cache_content=True).structure
    names = [s["instruction"] for s in steps if s["instruction"] != "COMMENT"]
    assert (
        names.count("FROM") == 2
        and names[0] == "FROM"
        and "USER" in names
        and names.index("ENTRYPOINT") > names.index("USER")
    )
    by = {s["instruction"]: s["value"] for s in steps}
    entry, command = (yaml.safe_load(by[n]) for n in ("ENTRYPOINT", "CMD"))
    options([*entry[2:], *command])
    assert entry[entry.index("--port") + 1] == by["EXPOSE"] and "/ready" in by["HEALTHCHECK"]
    for copied in re.findall(r"^COPY (?!--from)(\S+)", (HERE / "Dockerfile").read_text(), re.M):
        assert (HERE.parent / copied).exists()


def test_what_the_files_say_is_refused_without_a_key(monkeypatch):
    """All three listen for others, so all need CRATON_API_KEY: without it the command refuses."""
    from craton.serve.guard import Settings
    from craton.serve.run import Listening, serve

    monkeypatch.delenv("CRATON_API_KEY", raising=False)
    with pytest.raises(UserError, match="API key"):
        serve([], Listening("0.0.0.0"), Settings())
