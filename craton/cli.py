"""The command line: one thin function a command. Nothing heavy is imported before a command runs."""

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from craton.base import UserError, count, say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From a folder of documents to a foundation model of your own.\n\n"
    "craton corpus build DOCUMENTS --out CORPUS, craton train CORPUS --out MODEL --budget 10m, "
    "craton generate MODEL PROMPT.",
)
corpus_app = typer.Typer(
    no_args_is_help=True, help="Make, look at and trace a corpus: cleaned, deduplicated, tokenised documents."
)
app.add_typer(corpus_app, name="corpus")


def _json_alone(context: typer.Context, wanted: bool) -> bool:
    """With --json what a command says goes to stderr, so that stdout holds the JSON alone."""
    if wanted:
        context.with_resource(redirect_stdout(sys.stderr))
    return wanted


Json = Annotated[
    bool, typer.Option("--json", callback=_json_alone, help="One JSON object on stdout, the rest on stderr before it.")
]


def _emit(wanted: bool, value: dict[str, Any]) -> None:
    if wanted:
        sys.stderr.flush()
        print(json.dumps(value, ensure_ascii=False), file=sys.__stdout__, flush=True)


@corpus_app.command("build")
def corpus_build(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="Files, folders, globs (quoted), or hub datasets (hf://ORG/NAME). "
            "Text, Markdown, reStructuredText, HTML, source code, .jsonl (also .gz, .xz, .zst), .parquet.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="A step to leave out: repair, html, quality, english (rules that fit English only), exact, near, "
            "decontaminate. Repeatable."
        ),
    ] = None,
    decontaminate: Annotated[
        list[str] | None,
        typer.Option(help="Evaluation files; documents that share 13 words in a row with one are dropped. Repeatable."),
    ] = None,
    mask_pii: Annotated[
        bool, typer.Option("--mask-pii", help="Replace e-mail addresses, public IP addresses and phone numbers.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder with tokenizer.json to use, instead of training one.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Vocabulary of the trained tokenizer; chosen by corpus size if left out.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Pass over files and lines that cannot be read, and count them.")
    ] = False,
    json_: Json = False,
) -> None:
    """Clean, deduplicate and tokenise documents into a corpus.

    Run the same command again after an interruption: it goes on where it stopped.
    """
    from craton.corpus.build import BuildOptions, build

    options = BuildOptions(
        sources, sorted(skip or []), list(decontaminate or []), mask_pii, tokenizer, vocab_size, skip_bad
    )
    manifest = build(options, out)
    kept = {s: {k: v for k, v in facts.items() if k != "shards"} for s, facts in manifest["splits"].items()}
    _emit(
        json_,
        {
            "out": str(out),
            "splits": kept,
            "counts": manifest["counts"],
            "dropped": {k: v["documents"] for k, v in manifest["dropped"].items()},
            "vocab_size": manifest["vocab_size"],
            "seconds": manifest["seconds"],
            "digest": manifest["digest"],
        },
    )


@corpus_app.command("show")
def corpus_show(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    examples: Annotated[int, typer.Option(help="Examples a rule, at most 3.")] = 2,
    json_: Json = False,
) -> None:
    """What a corpus holds, what was dropped, and why, with examples."""
    from craton.corpus.show import show

    _emit(json_, show(folder, examples))


@corpus_app.command("trace")
def corpus_trace(
    run: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that 'craton train' wrote.")],
    step: Annotated[int, typer.Option(help="The training step, from 1.")],
    json_: Json = False,
) -> None:
    """Which documents a training step saw."""
    from craton.train.trace import trace

    _emit(json_, trace(run, step))


@app.command()
def train(
    corpora: Annotated[
        list[str], typer.Argument(metavar="CORPUS...", help="Corpora to train on, each as DIR or DIR=WEIGHT.")
    ],
    out: Annotated[Path, typer.Option(help="The model folder to make.")],
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time on this machine (90s, 10m, 2h) or compute (1e16flop); everything else follows from it."
        ),
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Layers; fixes the model's size instead.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; fixes the run's length instead.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initialisation and data order.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file of settings; see recipes/.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override one setting, for example optimizer.matrix_lr=0.01. Repeatable."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    json_: Json = False,
) -> None:
    """Train a model from a corpus.

    Say how much: --budget, or --depth, or --steps. --out becomes a Hugging Face model folder with a report.
    Under torchrun the same command trains on many processes: torchrun --nproc-per-node 2 -m craton train ...
    """
    from craton.report.page import write_report
    from craton.train.loop import Interrupted
    from craton.train.recipe import Recipe, assign, parse_setting, read_recipe
    from craton.train.start import train as run

    settings = Recipe()
    if recipe:
        read_recipe(recipe, settings)
    flags = {
        "run.budget": budget,
        "model.num_hidden_layers": depth,
        "run.steps": steps,
        "run.seed": seed,
        "run.checkpoint_every": checkpoint_every,
    }
    for key, value in flags.items():
        if value is not None:
            name = "depth" if key == "model.num_hidden_layers" else key.partition(".")[2].replace("_", "-")
            assign(settings, key, value, f"--{name}")
    for text in set_ or []:
        parse_setting(settings, text)
    asked = (settings.run.budget, settings.run.steps, settings.model.num_hidden_layers)
    if not resume and not any(asked):
        settings.run.budget = "10m"
    try:
        result = run(corpora, out, settings, resume)
    except Interrupted as signal:
        if int(os.environ.get("RANK", 0)) == 0:
            write_report(out)
            _emit(json_, {"out": str(out), "status": "interrupted", "signal": str(signal)})
        raise typer.Exit(130 if str(signal) == "SIGINT" else 143) from None
    if result:  # empty in all but the first process
        say(f"{write_report(out)}: how it went")
        _emit(json_, result)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a GGUF file.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    max_tokens: Annotated[int, typer.Option()] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option()] = 0,
    json_: Json = False,
) -> None:
    """Continue a prompt."""
    from craton.engine.model import load_model
    from craton.engine.request import Sampling

    if max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}, must be at least 1")
    sampling = Sampling(max_tokens, temperature, seed=seed)
    loaded, ids, text = load_model(model), list[int](), ""
    for event in loaded.engine.stream(loaded.tokenizer.encode(prompt), sampling):
        print(event.text if ids or text else prompt + event.text, end="", flush=True)
        ids += event.token_ids
        text += event.text
    print()
    _emit(json_, {"text": text, "token_ids": ids})


@app.command()
def chat(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|URL", help="A model folder, a GGUF file, or the address of a server with OpenAI's API."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Which of a server's models.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="An answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="The model's own default if left out.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    json_: Json = False,
) -> None:
    """Talk with a model; /help lists what can be done, Ctrl-D ends it."""
    from craton.serve.chat import chat as run

    _emit(json_, run(target, model, {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}))


@app.command()
def serve(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Model folders or GGUF files, each as MODEL, NAME=MODEL, or NAME=MODEL+ADAPTER with a LoRA adapter "
            "merged in.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Where to listen; anything but this machine needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    api_keys: Annotated[Path | None, typer.Option(help="A file with one API key a line; also CRATON_API_KEY.")] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may call the API (CORS). Repeatable.")
    ] = None,
    max_wait: Annotated[
        float, typer.Option(help="Seconds that a request may wait before it is begun; what would wait longer gets 429.")
    ] = 30.0,
    max_queue: Annotated[int, typer.Option(help="Requests at once, waiting ones included.")] = 256,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.")] = 16 << 20,
    max_n: Annotated[int, typer.Option(help="Answers to one request.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take.")] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds that answers in the making get after SIGTERM.")] = 30.0,
    cache: Annotated[float | None, typer.Option(help="GB of keys and values, for each model.")] = None,
    lookup: Annotated[
        bool,
        typer.Option("--lookup", help="Guess ahead from the text so far: faster where answers repeat their prompts."),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    votes: Annotated[Path, typer.Option(help="Where votes from the page are kept, one JSON object a line.")] = Path(
        "votes.jsonl"
    ),
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write the requests' bodies to the log.")] = False,
    engine: Annotated[str, typer.Option(help="craton, or vllm to hand the folder to vLLM.")] = "craton",
) -> None:
    """Serve models: a page to chat with, and the APIs of OpenAI, Open Responses and Anthropic."""
    from craton.serve import run
    from craton.serve.reply import Settings

    if engine not in ("craton", "vllm"):
        raise UserError(f"--engine is {engine!r}; known: craton, vllm")
    for name, value in (
        ("--max-wait", max_wait),
        ("--max-queue", max_queue),
        ("--max-body", max_body),
        ("--max-n", max_n),
        ("--timeout", timeout),
    ):
        if value <= 0:
            raise UserError(f"{name} is {value}, must be above 0")
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}, must be from 0 to 65535")
    keys, origins = run.read_keys(api_keys), allow_origin or []
    if engine == "vllm":
        here = tuple("max_wait max_body max_n timeout drain cache lookup device votes log_prompts".split())
        if given := [n for n in here if str(context.get_parameter_source(n)).endswith("COMMANDLINE")]:
            raise UserError(
                f"--{given[0].replace('_', '-')} is of craton's engine and means nothing to vLLM; leave it out"
            )
        run.serve_by_vllm(models, host, port, keys, origins, max_queue)
    options = {
        "device": device,
        "speculate": "lookup" if lookup else "",
        "cache_bytes": int(cache * 1e9) if cache else None,
    }
    settings = Settings(
        keys, origins=origins, max_body=max_body, max_n=max_n, timeout=timeout, log_prompts=log_prompts, votes=votes
    )
    run.serve(models, run.Listening(host, port, max_wait, max_queue, drain), settings, **options)


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="A model on the hub (HF_ENDPOINT, or huggingface.co).")
    ],
    out: Annotated[Path | None, typer.Option(help="The folder; NAME if left out.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
    json_: Json = False,
) -> None:
    """Download a published model; run again, it goes on where it stopped."""
    from craton.weights.hub import pull as run

    _emit(json_, run(name, out or Path(name.split("/")[-1]), revision))


@app.command()
def inspect(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model folder; config.json is enough without --prompt.")
    ],
    context: Annotated[
        int | None, typer.Option(help="Tokens a sequence, for the memory; at most 4096 if left out.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once, for the memory.")] = 1,
    prompt: Annotated[str | None, typer.Option(help="Write a page on what the model computes for this text.")] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("inspect.html"),
    json_: Json = False,
) -> None:
    """What a model is made of, what it needs, and with --prompt what it computes: probabilities, attention, layers."""
    from craton.report import inspect as look

    facts = look.inspect(model, context, batch)
    if prompt is not None:
        from craton.engine.model import load_model

        look.write_page(out, f"{model.resolve().name}: {prompt[:60]}", look.observe(load_model(str(model)), prompt))
        say(f"\n{out}: probabilities, attention and layers for the prompt")
        facts["page"] = str(out)
    _emit(json_, facts)


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    bits: Annotated[int, typer.Option(help="4 or 8.")] = 4,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on; Python's own reference documentation if left out.")
    ] = None,
    measure: Annotated[int, typer.Option(help="Characters to measure on; 0 measures nothing.")] = 50_000,
    json_: Json = False,
) -> None:
    """Store a model in 4 or 8 bits a weight, and say what that costs: bits per byte before and after."""
    from craton.engine.measure import bits_per_byte, read_text
    from craton.engine.model import load_model
    from craton.weights.quantize import quantise_folder

    if measure < 0:
        raise UserError(f"--measure is {measure}, must be at least 0")
    words = read_text(text, measure) if measure else ""
    result = quantise_folder(model, out, bits)
    if words:
        result["bits_per_byte_before"], result["bits_per_byte_after"] = (
            bits_per_byte(load_model(str(p)), words) for p in (model, out)
        )
        before, after = result["bits_per_byte_before"], result["bits_per_byte_after"]
        say(
            f"bits per byte on {text or 'the Python documentation'} ({count(len(words))} characters): {before:.4f} "
            f"before, {after:.4f} after ({after / before - 1:+.2%})"
        )
    _emit(json_, result)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder.")],
    gguf: Annotated[Path, typer.Option(help="The GGUF file to write, for llama.cpp and what is built on it.")],
    type_: Annotated[
        str, typer.Option("--type", help="Of the matrices that are not quantised: f16, bf16 or f32.")
    ] = "f16",
    json_: Json = False,
) -> None:
    """Write a model as GGUF. What 'craton quantize' stored in 4 or 8 bits keeps its values (Q4_0, Q8_0)."""
    from craton.weights.export import export_gguf

    _emit(json_, export_gguf(model, gguf, type_))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that 'craton train' wrote.")],
    json_: Json = False,
) -> None:
    """Write DIR/report.html from DIR/record.json."""
    from craton.report.page import write_report

    path = write_report(folder)
    say(f"{path}: {count(path.stat().st_size)}B")
    _emit(json_, {"report": str(path)})


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The model folder to make.")] = Path("runs/demo"),
    budget: Annotated[str, typer.Option(help="Training time.")] = "3m",
    json_: Json = False,
) -> None:
    """Train a small model on the Python library of this installation, from documents to report, without a network."""
    from craton.demo import demo as run

    _emit(json_, run(out, budget))


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"craton: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except OSError as error:
        print(f"craton: error: {error.filename or 'file system'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
