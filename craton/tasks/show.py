"""`craton tasks`: what tasks there are, and exactly what a model sees of one."""

from pathlib import Path
from typing import Any

from craton.base import UserError, say
from craton.tasks.find import find_task
from craton.tasks.generated import GENERATED
from craton.tasks.published import PUBLISHED


def known_tasks() -> list[dict[str, Any]]:
    """Every task that has a name of its own: its kind, metric, size and source."""
    out: list[dict[str, Any]] = []
    for name, p in PUBLISHED.items():
        kind = "choices" if p.scorer == "choice" else p.scorer
        row = {"name": name, "kind": kind, "metric": p.metric, "shots": p.shots, "size": "the file's"}
        row |= {"source": f"hub {p.hub}" if p.hub else "a file", "licence": p.licence, "summary": p.summary}
        out.append(row | {"formulations": list(p.formulations)})
    for name, g in GENERATED.items():
        row = {"name": name, "kind": "generated", "metric": "exact_match", "shots": g.shots, "size": "any"}
        row |= {"source": f"made by rule; {name}=N sets {g.dial}", "licence": "none needed", "summary": g.summary}
        out.append(row | {"formulations": ["generation"]})
    more = {
        "kind": "memorisation",
        "metric": "acc",
        "shots": 0,
        "size": "",
        "source": "",
        "licence": "the corpus's own",
    }
    named = (("memorised", "training text word for word (memorised=CORPUS)"), ("canaries", "planted secrets"))
    return out + [{"name": name, "summary": what} | more for name, what in named]


_WHENCE = """
Published ones come from a file (NAME=PATH) or the hub (NAME, with the hf extra); generated ones are made by rule
(NAME=N sets how hard). A .toml file describes a task of your own; lm-eval's .yaml files and reasoning-gym (gym:NAME)
work too. See docs/eval.md."""


def list_tasks() -> dict[str, Any]:
    """Print every task that has a name of its own."""
    rows = [{"name": "task", "kind": "kind", "metric": "metric", "shots": "shots", "summary": "what it asks for"}]
    for row in rows + known_tasks():
        say(f"{row['name']:<26}{row['kind']:<14}{row['metric']:<24}{row['shots']:<7}{row['summary']}")
    say(_WHENCE)
    return {"tasks": known_tasks()}


def show_task(name: str, items: int, shots: int | None, chat: bool | None, model: str | None) -> dict[str, Any]:
    """Print the first items of a task as a model sees them, special tokens marked. model: whose template and special
    tokens they are; without one a template that names the roles stands in. UserError for what cannot be shown."""
    if items < 1:
        raise UserError(f"-n is {items}, must be at least 1", field="n")
    task = find_task(name)
    shown = _Shown(model) if model is not None else None
    chat = bool(chat) if chat is not None else not task.by_likelihood and shown is not None and shown.chats
    sizes = {part: len(rows) for part, rows in task.rows.items()}
    say(
        f"{task.name}: {task.summary or task.kind}; {task.scorer}, metric {task.metric}; {task.source} ({task.licence})"
    )
    say("rows: " + ", ".join(f"{part} {size}" for part, size in sizes.items()))
    k = task.shots if shots is None else shots
    out: dict[str, Any] = {"name": task.name, "scorer": task.scorer, "metric": task.metric, "rows": sizes, "items": []}
    for row in task.items(items):
        for formulation in task.formulations:
            e = task.example(row, formulation, task.shots_for(row, k, 0))
            say(
                f"\n--- {task.name} {e.id}: {formulation}, {k} shots, {'chat template' if chat else 'no chat template'}"
            )
            prompts = [_rendered(shown, e.messages)] if chat else [_begun(shown, p) for p in e.prompts]
            for number, prompt in enumerate(prompts):
                say(prompt + (f"⟦{e.choices[number]}⟧" if len(e.prompts) > 1 and not chat else ""))
            if e.choices and len(e.prompts) == 1:
                for number, choice in enumerate(e.texts if chat else e.choices):
                    say(f"  {'*' if number == e.gold else ' '} ⟦{choice}⟧")
            elif e.targets:
                say(f"  * ⟦{e.targets[0]}⟧")
            made = {"id": e.id, "formulation": formulation, "prompts": prompts, "choices": list(e.choices)}
            out["items"].append(made | {"gold": e.gold, "targets": list(e.targets)})
    return out


class _Shown:
    """A model's tokenizer, as far as it is seen in prompts."""

    def __init__(self, model: str):
        from craton.engine.converse import open_talker

        if not Path(model.partition("+")[0]).exists():
            raise UserError(f"{model}: no such model folder or GGUF file")
        self.talker = open_talker(model, model)
        self.chats = self.talker.dialogue is not None and not self.talker.pretrained_only

    def marked(self, ids: list[int]) -> str:
        """Text with special tokens as ⟨name⟩."""
        tokenizer = self.talker.tokenizer
        out, run = "", list[int]()
        for i in [*ids, None]:
            if i is not None and i not in tokenizer.special_ids:
                run.append(i)
                continue
            out += tokenizer.backend.decode(run, skip_special_tokens=False) if run else ""
            run = []
            out += f"⟨{tokenizer.backend.id_to_token(i)}⟩" if i is not None else ""
        return out


def _rendered(shown: _Shown | None, messages: tuple[dict[str, Any], ...]) -> str:
    if shown is None:
        return "".join(f"⟨{m['role']}⟩\n{m['content']}\n" for m in messages) + "⟨assistant⟩\n"
    from craton.engine.converse import Ask, prepare

    if not shown.chats:
        raise UserError("the model has no chat template; leave out --chat", field="chat")
    return shown.marked(prepare(shown.talker, Ask({"max_tokens": 1}, messages=list(messages))).ids)


def _begun(shown: _Shown | None, text: str) -> str:
    """A prompt, behind what the tokenizer puts before it."""
    if shown is None:
        return text
    ids = shown.talker.tokenizer.encode(text) if text else [shown.talker.tokenizer.document_id]
    return shown.marked(ids)
