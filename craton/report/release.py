"""`craton release`: a folder to give away, with a model card, checked to open where people will open it."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from craton.base import UserError, amount, claim, read_json, remove_inside, say, write_json, write_text
from craton.engine.model import load_model
from craton.report.card import card
from craton.weights.export import export_gguf
from craton.weights.folder import only_pretrained, read_config

_PRIVATE = ("command", "plan", "problem")  # of a record: what may name the user's folders
_LEFT = {"record.json", "metrics.jsonl", "report.html", "README.md"}  # not copied as they are
_TEXT = "In 1984 there was a text of 1234567 letters. It's read from the start, word by word:\n\n  x = 3.14159"


def release(model: Path, out: Path, gguf: bool, push: str | None) -> dict[str, Any]:
    """Make the folder and check it. UserError if the model is none, `out` is in use, or a check fails."""
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: no model folder (no config.json)")
    if push is not None and push.count("/") != 1:
        raise UserError(f"--push {push}: write it as ORG/NAME", field="push")
    config = read_config(model)
    name = push or out.resolve().name
    with claim(out, hint="give another --out, or remove it first"), _emptied(out):
        for path in sorted(model.iterdir()):
            if path.is_file() and path.name not in _LEFT and not path.name.startswith("."):
                shutil.copyfile(path, out / path.name)
        if (templates := model / "additional_chat_templates").is_dir():
            shutil.copytree(templates, out / templates.name)
        if only_pretrained(model):
            _without_template(out)
        record = _record(model, out)
        made = f"{out.resolve().name}.gguf" if gguf else None
        if made:
            export_gguf(out, out / made, "f16")
        write_text(out / "README.md", card(name, config, record, made))
        checks = [_in_transformers(out), *([_in_llama_cpp(out, out / made)] if made else [])]
    for line in checks:
        say(f"checked  {line}")
    files = sorted(p.name for p in out.iterdir() if p.name != ".lock")
    say(f"{out}: {', '.join(files)}")
    if record is None:
        say("WARNING  the model has no record, so the card says nothing of its data and licences: add what you know")
    result: dict[str, Any] = {"out": str(out), "files": files, "checks": checks, "pushed": None}
    if push:
        result["pushed"] = _push(out, push)
    return result


@contextlib.contextmanager
def _emptied(out: Path) -> Iterator[None]:
    """Where something is wrong with the model nothing of it is left, which could be taken for a release."""
    try:
        yield
    except BaseException:
        remove_inside(out, {".lock"})
        raise


def _without_template(out: Path) -> None:
    """Older versions gave every model a chat template, which a base model never learned."""
    path = out / "tokenizer_config.json"
    if path.exists() and "chat_template" in (config := read_json(path)):
        write_json(path, {k: v for k, v in config.items() if k != "chat_template"})


def _record(model: Path, out: Path) -> dict[str, Any] | None:
    """The record without what names the user's folders; written to `out` too."""
    if not (model / "record.json").is_file():
        return None
    record: Any = read_json(model / "record.json")
    if not isinstance(record, dict) or "corpora" not in record:
        return None
    for key in _PRIVATE:
        record.pop(key, None)
    names: dict[str, str] = {}
    for corpus in record["corpora"]:
        corpus["folder"] = Path(corpus["folder"]).name
        corpus.pop("notes", None)  # they name files
        for source in corpus["sources"]:
            source["name"] = names.setdefault(source["name"], _public(source["name"], set(names.values())))
    record["by_source"] = {names.get(k, k): v for k, v in (record.get("by_source") or {}).items()}
    write_json(out / "record.json", record)
    return record


def _public(name: str, taken: set[str]) -> str:
    """A source's name without the folders that it lies in; a hub dataset's whole."""
    local = name.startswith(("/", "./", "../", "~")) or Path(name).exists() or name.count("/") > 1
    short = Path(name).name if local and not name.startswith("hf:") else name
    number = 2
    while short in taken:
        short = f"{Path(name).name} ({number})"
        number += 1
    return short


@torch.no_grad()
def _in_transformers(out: Path) -> str:
    """Logits beside ours. UserError if they differ."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        return "not in transformers, which is not installed here (pip install transformers)"
    ours = load_model(str(out))
    try:
        theirs, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        ids = tokenizer(_TEXT, return_tensors="pt").input_ids
    except Exception as error:
        raise UserError(f"{out}: transformers cannot open it ({str(error).splitlines()[0]})") from None
    if ids[0].tolist() != ours.tokenizer.encode(_TEXT):
        raise UserError(f"{out}: transformers makes other tokens of a text")
    a, b = ours.network.float()(ids).float(), theirs.float()(ids).logits.float()
    difference = float((a - b).abs().max())
    if difference > 1e-2 * max(1.0, float(b.abs().max())):
        raise UserError(f"{out}: transformers computes other logits (they differ by {difference:.3g})")
    return f"in transformers: the same tokens, logits within {difference:.1g}"


def _in_llama_cpp(out: Path, gguf: Path) -> str:
    """Tokens and the likeliest next one beside ours. UserError if they differ."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return "not in llama.cpp, which is not installed here (pip install llama-cpp-python)"
    ours = load_model(str(out))
    try:
        theirs = Llama(str(gguf), n_ctx=256, logits_all=True, verbose=False)
        ids = theirs.tokenize(_TEXT.encode(), add_bos=True, special=False)
        theirs.eval(ids)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{gguf}: llama.cpp cannot open it ({error})") from None
    if ids != ours.tokenizer.encode(_TEXT):
        raise UserError(f"{gguf}: llama.cpp makes other tokens of a text")
    with torch.no_grad():
        logits = ours.network.float()(torch.tensor([ids]))[0, -1]
    difference = float((logits - torch.tensor(theirs.scores[len(ids) - 1])).abs().max())
    spread = float(logits.std())
    if difference > spread:
        raise UserError(f"{gguf}: llama.cpp computes other logits (they differ by {difference:.3g})")
    return f"in llama.cpp: the same tokens, logits within {difference / spread:.1%} of their spread"


def _push(out: Path, name: str) -> str:
    """To the hub, as a private repository. UserError if that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        url = str(api.create_repo(name, private=True, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=out, commit_message="Release")
    except LocalTokenNotFoundError:
        raise UserError("--push: not logged in to the hub; run 'hf auth login', or set HF_TOKEN") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        problem = str(error).strip().splitlines()[0]
        raise UserError(f"--push {name}: {problem}") from None
    size = sum(p.stat().st_size for p in out.iterdir())
    say(f"{url}: {amount(size, 'B')}; it is private until you make it public there")
    return url
