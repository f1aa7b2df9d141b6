"""What a model learned by heart: how its training documents go on, word for word, against documents it has not seen;
and canaries, made-up secrets of which half are planted (arXiv 1802.08232)."""

import random
from pathlib import Path

from craton.base import UserError
from craton.corpus.store import Corpus
from craton.tasks.rows import Row
from craton.tasks.task import Formulation, Task

_TOKENS, _PASSAGES = 32, 200  # of a beginning, and of what follows; of each part
_NAMES = "Ada Ben Cleo Dan Eve Finn Gus Hana Ian Jo Kim Lea Max Nia Oto Pia Quin Ria Sam Tia Udo Vera Will Xan".split()


def memorised_task(folder: Path) -> Task:
    """Passages of a corpus, half of them trained on: is each token of what follows the likeliest one? Chance and common
    phrases are what the held-out half shows. UserError for a folder that is no corpus, or holds nothing out."""
    corpus = Corpus(folder, verify=False)

    def parts() -> dict[str, list[Row]]:
        rows = [row for split in ("train", "heldout") for row in _passages(corpus, split)]
        if {row["group"] for row in rows} != {"train", "heldout"}:
            raise UserError(f"{folder}: too little text, or none held out, to see what was learned by heart")
        return {"test": rows}

    made = {"verbatim": Formulation("{{question}}", "{{continuation}}", joint="")}
    about = dict(summary="training text word for word, against held-out text", kind="memorisation", source=str(folder))
    return Task("memorised", parts, made, "completion", "acc", licence="the corpus's own", **about)  # type: ignore[arg-type]


def _passages(corpus: Corpus, split: str) -> list[Row]:
    documents = [d for d in corpus.rows(split) if d["tokens"] >= 2 * _TOKENS]
    chosen = random.Random(0).sample(documents, min(_PASSAGES, len(documents)))
    out = []
    for number, document in enumerate(chosen):
        first = int(document["start"]) + random.Random(number).randrange(int(document["tokens"]) - 2 * _TOKENS + 1)
        ids = corpus.read(split, first, 2 * _TOKENS).tolist()
        before, after = (corpus.tokenizer.decode(part) for part in (ids[:_TOKENS], ids[_TOKENS:]))
        if before.strip() and after.strip():
            row = {"question": before, "continuation": after, "group": split, "id": f"{split}/{number}"}
            out.append(row | {"where": corpus.name_of(document)})
    return out


def canary_rows(n: int = 40) -> list[Row]:
    """Secrets with 99 others like it each; those with even numbers are the ones to plant."""
    out = []
    for number in range(n):
        r = random.Random(f"canary/{number}")
        codes = r.sample(range(100_000, 1_000_000), 100)
        question = f"The access code of {_NAMES[number % len(_NAMES)]} {number} is"
        group = "never written" if number % 2 else "planted"
        out.append({"id": number, "where": f"canaries:{number}", "question": question, "gold": 0, "group": group})
        out[-1]["choices"] = [str(code) for code in codes]
    return out


def canary_task() -> Task:
    """Is the planted secret likelier than 99 others? Chance is 1 in 100; those never written show it."""
    rows = canary_rows()
    parts = {"train": [row for row in rows if row["group"] == "planted"], "test": rows}
    made = {"cloze": Formulation("{{question}}")}
    summary = "planted secrets, each among a hundred"
    return Task("canaries", parts, made, "choice", "acc", summary=summary, kind="memorisation", source="made by rule")
