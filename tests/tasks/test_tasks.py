"""Where tasks come from, what they ask, and how answers are judged."""

import csv
import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.base import UserError
from craton.tasks.export import as_file, write_rows
from craton.tasks.find import find_task, find_tasks
from craton.tasks.generated import GENERATED, VERIFIERS, execute, generate
from craton.tasks.scorers import SCORERS, judge_prompt, judged, math_normalised
from craton.tasks.show import known_tasks
from craton.tasks.task import Example, Task
from tests.conftest import craton


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def first(task, formulation=None, shots=0):
    row = task.items()[0]
    return task.example(row, formulation or next(iter(task.formulations)), task.shots_for(row, shots, 0))


LAYOUTS = {
    "hellaswag, as published": (
        "hellaswag",
        {"activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "endings": ["eats [x] it.", "flies."], "label": "1"},
        "Cooking: A man cooks. He", (" eats it.", " flies."), 1,
    ),
    "hellaswag, one context": (
        "hellaswag", {"ctx": "A man cooks. he", "endings": ["eats.", "flies."], "label": 0},
        "A man cooks. he", (" eats.", " flies."), 0,
    ),
    "arc, as published": (
        "arc_easy",
        {"id": "q1", "question": {"stem": "Why?", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]}, "answerKey": "B"},
        "Question: Why?\nAnswer:", (" x", " y"), 1,
    ),
    "arc, of the hub": (
        "arc_challenge", {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Why?\nAnswer:", (" x", " y"), 1,
    ),
    "openbookqa": (
        "openbookqa", {"question_stem": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": "B"},
        "Ice is", (" hot", " cold"), 1,
    ),
    "piqa": ("piqa", {"goal": "Cut", "sol1": "knife", "sol2": "spoon", "label": 0}, "Question: Cut\nAnswer:", (" knife", " spoon"), 0),
    "boolq": (
        "boolq", {"question": "is it", "passage": "It is.", "answer": True},
        "It is.\nQuestion: is it?\nAnswer:", (" no", " yes"), 1,
    ),
    "siqa": (
        "siqa", {"context": "Al ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "Q: Al ran. Why?\nA:", (" a", " b", " c"), 2,
    ),
    "mmlu, of the hub": (
        "mmlu", {"question": "Why?", "choices": ["p", "q", "r", "s"], "answer": 2, "subject": "us_history"},
        "The following are multiple choice questions (with answers) about us history.\n\nQuestion: Why?\nAnswer:",
        (" p", " q", " r", " s"), 2,
    ),
    "lambada": ("lambada", {"text": "the cat sat on the mat"}, "the cat sat on the", (" mat",), 0),
    "choices of llm-foundry": ("anything", {"query": "Why? Because:", "choices": ["x", "y"], "gold": 1}, "Why? Because:", (" x", " y"), 1),
    "letters of llm-foundry": (
        "commonsense_qa", {"query": "Question: Where?\nChoices:\nA. here\nB. there\nAnswer:", "choices": ["A", "B"], "gold": 1},
        "Question: Where?\nAnswer:", (" here", " there"), 1,
    ),
    "big-bench": ("bb", {"input": "1+1=", "target_scores": {"2": 1, "3": 0}}, "1+1=", (" 2", " 3"), 0),
    "winogender": (
        "winogender", {"sentence": "S.", "pronoun": "she", "occupation": "nurse", "participant": "man", "label": 0},
        "S. \u2018She\u2019 refers to the", (" nurse", " man"), 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_choices(tmp_path, name):
    """Rows in the layouts that they are published in, in lm-eval's words."""
    task_name, row, prompt, choices, gold = LAYOUTS[name]
    e = first(find_task(f"{task_name}={write(tmp_path / 'rows.jsonl', [row])}"))
    assert e.prompts == (prompt,) and e.choices == choices and e.gold == gold


def test_partial_evaluation(tmp_path):
    """WinoGrande: a prompt for each choice, the rest of the sentence is scored."""
    row = {"sentence": "Al beat Bo so _ won.", "option1": "Al", "option2": "Bo", "answer": "1"}
    e = first(find_task(f"winogrande={write(tmp_path / 'rows.jsonl', [row])}"))
    assert e.prompts == ("Al beat Bo so Al", "Al beat Bo so Bo") and e.choices == (" won.", " won.") and e.gold == 0


def test_answers_are_read(tmp_path):
    """Layouts whose answers are written."""
    trivia = {"question": "Who?", "answer": {"value": "Bo", "aliases": ["Bob"]}}
    assert first(find_task(f"triviaqa={write(tmp_path / 'a.jsonl', [trivia])}")).targets == ("Bo", "Bob")
    squad = {
        "data": [{"paragraphs": [{"context": "C", "qas": [{"id": "x", "question": "Q?", "answers": [{"text": "A"}]}]}]}]
    }
    (tmp_path / "b.json").write_text(json.dumps(squad))
    e = first(find_task(f"squad={tmp_path / 'b.json'}"))
    assert e.prompts == ("C\n\nQuestion: Q?\n\nAnswer:",) and e.targets == ("A",) and e.id == "x"
    gsm = {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 1,002"}
    assert first(find_task(f"gsm8k={write(tmp_path / 'c.jsonl', [gsm])}")).targets == ("1002",)
    maths = {"problem": "p", "solution": "so $\\boxed{\\frac{1}{2}}$.", "level": "1", "type": "Algebra"}
    assert first(find_task(f"math={write(tmp_path / 'd.jsonl', [maths])}")).targets == ("\\frac{1}{2}",)


def test_files_open_as_they_are(tmp_path):
    """Compressed, archives, CSV with and without a header, parts by file names."""
    row = {"query": "a", "choices": ["x", "y"], "gold": 0}
    with lzma.open(tmp_path / "rows.jsonl.xz", "wt") as f:
        f.write(json.dumps(row) + "\n")
    assert len(find_task(f"t={tmp_path / 'rows.jsonl.xz'}").items()) == 1
    for header in (False, True):
        archive = tmp_path / f"mmlu{header}.tar.xz"
        with tarfile.open(archive, "w:xz") as tar:
            for part, n in (("dev", 5), ("test", 3)):
                for subject in ("anatomy", "virology"):
                    text = io.StringIO()
                    writer = csv.writer(text)
                    if header:
                        writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                    for i in range(n):
                        writer.writerow([f'{part} {i}, "why"?', "p", "q", "r", "s", 1 if header else "B"])
                    data = text.getvalue().encode()
                    info = tarfile.TarInfo(f"mmlu/{part}/{subject}_{part}.csv")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        task = find_task(f"mmlu={archive}")
        assert len(task.items()) == 6 and len(task.rows["dev"]) == 10
        assert [r["id"] for r in task.items()[2:4]] == ["anatomy/2", "virology/0"] and task.items()[3]["gold"] == 1
        row = task.items()[3]
        shots = task.shots_for(row, 5, 0)
        assert [s["question"][:5] for s in shots] == ["dev 0", "dev 1", "dev 2", "dev 3", "dev 4"]
        assert {s["group"] for s in shots} == {"virology"}
        e = task.example(row, "letter", shots)
        assert e.prompts[0].startswith(
            "The following are multiple choice questions (with answers) about virology.\n\ndev 0"
        )
        assert e.prompts[0].endswith("A. p\nB. q\nC. r\nD. s\nAnswer:") and e.choices == (" A", " B", " C", " D")
    with pytest.raises(UserError, match="6 shots, but its train part has 5"):
        task.shots_for(row, 6, 0)


def test_shots_never_show_the_item(tmp_path):
    """Where only a test part is there its other rows are the shots, the same for all."""
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(6)]
    task = find_task(f"t={write(tmp_path / 'rows.jsonl', rows)}")
    for row in task.items():
        shots = task.shots_for(row, 3, 0)
        assert len(shots) == 3 and row["id"] not in [s["id"] for s in shots]
    assert task.shots_for(task.items()[0], 3, 0) != task.shots_for(task.items()[0], 3, 1)
    with pytest.raises(UserError, match="only 6 rows"):
        task.shots_for(task.items()[0], 6, 0)


OWN = """
name = "capitals"
test = "test.jsonl"
train = "train.jsonl"
prompt = "The capital of {{country}} is"
target = "city"
choices = ["Paris", "Rome"]
shots = 1
"""


def test_own_task(tmp_path):
    """A few lines of TOML."""
    write(tmp_path / "test.jsonl", [{"country": "France", "city": "Paris"}])
    write(tmp_path / "train.jsonl", [{"country": "Italy", "city": "Rome"}])
    (tmp_path / "capitals.toml").write_text(OWN)
    task = find_task(str(tmp_path / "capitals.toml"))
    e = first(task, shots=1)
    assert task.scorer == "choice" and e.prompts == ("The capital of Italy is Rome\n\nThe capital of France is",)
    assert e.choices == (" Paris", " Rome") and e.gold == 0
    made = tmp_path / "rows.jsonl"
    write_rows(str(tmp_path / "capitals.toml"), made, "train", None, None, 0)
    assert json.loads(made.read_text()) == {"prompt": "The capital of Italy is", "response": "Rome"}
    held = as_file(str(tmp_path / "capitals.toml"), tmp_path / "held")
    assert json.loads(Path(held).read_text()) == {"text": "The capital of France is Paris"}
    assert as_file(str(tmp_path / "capitals.toml"), tmp_path / "held") == held
    assert as_file("documents", tmp_path / "held") == "documents"


@pytest.mark.parametrize(
    "change, problem",
    [
        (("choices", "choises"), "unknown key 'choises' \\(did you mean 'choices'\\?\\)"),
        (('test = "test.jsonl"', ""), "has no test part"),
        (('"test.jsonl"', '"gone.jsonl"'), "test is .*gone.jsonl, which is no file"),
        (("{{country}}", "{{contry}}"), "test.jsonl:1: the template of the task's prompt fails .*contry"),
        (("{{country}}", "{{country"), "not a Jinja template"),
        (('"city"', '"town"'), "t.*.jsonl:1: no field 'town' \\(it has country, city\\)"),
        (('["Paris", "Rome"]', '["Oslo", "Rome"]'), "test.jsonl:1: the target 'Paris' is none of the choices"),
        (("shots = 1", "shots = -1"), "shots is -1"),
        (("shots = 1", 'scorer = "chioce"'), "did you mean 'choice'"),
        (("shots = 1", 'metric = "f2"'), "metric is 'f2'"),
        (("shots = 1", "shots = "), "not valid TOML"),
    ],
)
def test_own_tasks_that_are_wrong(tmp_path, change, problem):
    """One line each that names file, row and field."""
    write(tmp_path / "test.jsonl", [{"country": "France", "city": "Paris"}])
    write(tmp_path / "train.jsonl", [{"country": "Italy", "city": "Rome"}])
    (tmp_path / "capitals.toml").write_text(OWN.replace(*change))
    with pytest.raises(UserError, match=problem) as error:
        first(find_task(str(tmp_path / "capitals.toml")))
    assert "\n" not in str(error.value)


def test_names_that_are_none(tmp_path):
    """The nearest is named; a file in no known layout says what it has."""
    with pytest.raises(UserError, match="did you mean 'hellaswag'"):
        find_task("helaswag")
    with pytest.raises(UserError, match="two tasks are named addition"):
        find_tasks("addition,addition")
    with pytest.raises(UserError, match="they have foo, bar"):
        find_task(f"t={write(tmp_path / 'rows.jsonl', [{'foo': 1, 'bar': 2}])}")
    with pytest.raises(UserError, match="are not those of gsm8k"):
        find_task(f"gsm8k={write(tmp_path / 'rows.jsonl', [{'query': 'a', 'choices': ['x', 'y'], 'gold': 0}])}")
    with pytest.raises(UserError, match="the right choice is number 5 of 2"):
        find_task(f"t={write(tmp_path / 'rows.jsonl', [{'query': 'a', 'choices': ['x', 'y'], 'gold': 5}])}")
    with pytest.raises(UserError, match="rows.jsonl: not valid JSON|broken"):
        (tmp_path / "rows.jsonl").write_text("{broken\n")
        find_task(f"t={tmp_path / 'rows.jsonl'}")
    with pytest.raises(UserError, match="dial .* from 1 to 64"):
        find_task("addition=99")
    assert len(known_tasks()) > 30


@pytest.mark.parametrize("name", GENERATED)
def test_generated(name):
    """The same (seed, n) gives the same rows; what was worked out is right by the task's own verifier, and a wrong
    answer is not; no training row asks what the test asks."""
    assert json.dumps(generate(name, 3, 20)) == json.dumps(generate(name, 3, 20))
    assert generate(name, 3, 20) == generate(name, 3, 40)[:20] and generate(name, 3, 20) != generate(name, 4, 20)
    task = find_task(name)
    for row in task.items(60):
        e = task.example(row, "generation")
        if name != "maps:unrelated":
            assert SCORERS[task.scorer](task, e, " " + row["worked"]).score == 1.0, row
        assert SCORERS[task.scorer](task, e, " nothing of the kind").score == 0.0
        assert SCORERS[task.scorer](task, e, "").score == 0.0
    if "shots" not in task.items(1)[0]:
        asked = {row["question"] for row in task.rows["test"]}
        assert not asked & {row["question"] for row in task.rows["train"]}
    hard = generate(name, 0, 50, 7)
    assert sum(len(r["question"]) + len(r["worked"]) for r in hard) >= sum(
        len(r["question"]) + len(r["worked"]) for r in generate(name, 0, 50, 2)
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_addition_is_addition(digits, seed):
    """Against Python's own arithmetic, in each style."""
    for name in ("addition", "addition:reversed", "addition:scratchpad"):
        row = generate(name, seed, 1, digits)[0]
        a, b = map(int, row["question"].rstrip("=").split("+"))
        said = row["answers"][0]
        assert int(said[::-1] if name.endswith("reversed") else said) == a + b
        assert row["worked"].split()[-1] == said


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_verifiers_take_any_text(text):
    """Whatever a model writes is judged, and nothing is run that is no arithmetic."""
    for name in ("countdown", "maze", "program", "hops:scratchpad", "addition:scratchpad"):
        row = generate(name, 0, 1)[0]
        judge = VERIFIERS[GENERATED[name].verifier]
        assert judge(row, text) in (True, False)
    assert not VERIFIERS["countdown"](generate("countdown", 0, 1)[0], "__import__('os')")
    assert execute(text, 3) is None or text.split()


def test_canaries_and_memorisation(corpus):
    """Half of the secrets are planted; passages of a corpus are of both splits."""
    canaries = find_task("canaries")
    assert {r["group"] for r in canaries.rows["train"]} == {"planted"} and len(canaries.items()) == 40
    assert all(len(set(r["choices"])) == 100 for r in canaries.items())
    passages = find_task(f"memorised={corpus}")
    assert {r["group"] for r in passages.items()} == {"train", "heldout"}


def made(scorer, targets=(), **options):
    task = Task("t", {}, {}, scorer, "x", options=options)
    return task, Example(0, ("p",), targets=targets, row={"where": "f:1"})


@pytest.mark.parametrize(
    "scorer, targets, options, answer, score",
    [
        ("exact", ("Onion",), {}, " onion!", 1.0),
        ("exact", ("Onion",), {}, " the onion", 0.0),
        ("normalized", ("Onion",), {}, " the onion.", 1.0),
        ("f1", ("the red house",), {}, "red car", 0.5),
        ("numeric", ("1002",), {}, "so 500 and 502 make $1,002.", 1.0),
        ("numeric", ("72",), {}, "It is 72.\n#### 72", 1.0),
        ("numeric", ("72",), {}, "no idea", 0.0),
        ("numeric", ("-3",), {}, "that gives -3", 1.0),
        ("math", ("\\frac{1}{2}",), {}, "so $x = \\boxed{\\dfrac{1}{2}}$", 1.0),
        ("math", ("1/2",), {}, "The answer is \\frac12.", 1.0),
        ("regex", ("7",), {"pattern": r"answer: (\d+)"}, "my answer: 7", 1.0),
        ("regex", ("7",), {"pattern": r"answer: (\d+)"}, "seven", 0.0),
        ("json", ('{"a": 1, "b": "x"}',), {}, 'Sure: {"a": 1, "b": "y"} there', 0.5),
        ("json", ('{"a": 1}',), {}, "none", 0.0),
        ("json", ('{"a": 1}',), {}, '{"a": true}', 0.0),
        ("chrf", ("the house is small",), {}, "the house is small", 1.0),
        ("bleu", ("the house is very small",), {}, "the house is very small", 1.0),
        ("rouge", ("the house is small",), {}, "the house is small", 1.0),
    ],
)
def test_scorers(scorer, targets, options, answer, score):
    """What counts as right."""
    if scorer in ("chrf", "bleu"):
        pytest.importorskip("sacrebleu")
    if scorer == "rouge":
        pytest.importorskip("rouge_score")
    task, example = made(scorer, targets, **options)
    assert SCORERS[scorer](task, example, answer).score == pytest.approx(score)


def test_math_and_judges():
    """Answers in LaTeX that are the same; a judge's grade, and one that is missing."""
    assert math_normalised("0.5") == math_normalised("\\frac12") and math_normalised("x=5") == "5"
    task, example = made("judge", ("four",), rubric="Is it right?")
    assert "four" in judge_prompt(task, example, "five") and "Is it right?" in judge_prompt(task, example, "five")
    assert judged("Good.\nGrade: 4").score == 0.75 and judged("no").parsed is None


def test_instructions():
    """IFEval's kinds."""
    from craton.tasks.instructions import followed

    row = {"where": "f:1", "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"]}
    row["kwargs"] = [{}, {"relation": "at least", "num_words": 3}]
    assert followed(row, "one two three") == [True, True] and followed(row, "one, two") == [False, False]
    row = {"where": "f:1", "instruction_id_list": ["detectable_format:title", "startend:quotation"], "kwargs": [{}, {}]}
    assert followed(row, '"<<Me>> it is"') == [True, True]
    with pytest.raises(UserError, match="is not one that is checked"):
        followed({"where": "f:1", "instruction_id_list": ["x:y"], "kwargs": [{}]}, "a")


def test_harness_files(tmp_path):
    """lm-eval's own task files, as far as they need no Python."""
    pytest.importorskip("yaml")
    write(tmp_path / "rows.jsonl", [{"q": "1+1=", "options": ["2", "3"], "gold": 0}])
    (tmp_path / "t.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: rows.jsonl\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{options}}'\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n"
    )
    e = first(find_task(str(tmp_path / "t.yaml")))
    assert e.prompts == ("1+1=",) and e.choices == (" 2", " 3") and e.gold == 0
    (tmp_path / "u.yaml").write_text("task: x\nprocess_docs: !function utils.f\n")
    with pytest.raises(UserError, match="without Python code"):
        find_task(str(tmp_path / "u.yaml"))


def test_commands(tmp_path):
    """craton tasks, show and rows, as a newcomer types them."""
    listed = craton("tasks", "--json")
    assert {"hellaswag", "addition", "canaries"} <= {t["name"] for t in json.loads(listed.stdout)["tasks"]}
    shown = craton("tasks", "show", "addition=4", "-n", "1", "--shots", "2")
    assert shown.returncode == 0 and "2 shots, no chat template" in shown.stdout and "⟦" in shown.stdout
    rows = craton("tasks", "rows", "maps", "--n", "5", "--shots", "4", "--out", tmp_path / "rows.jsonl")
    assert rows.returncode == 0 and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 5
    bad = craton("tasks", "show", "addittion")
    assert bad.returncode == 2 and "did you mean 'addition'" in bad.stderr and "Traceback" not in bad.stderr


def test_a_corpus_without_the_test_and_with_the_rows(tmp_path):
    """A task as decontamination list and as training data, without a line of code."""
    seen = "The capital city of the old kingdom of France, on the river Seine, is surely called"
    write(tmp_path / "test.jsonl", [{"q": seen, "a": "Paris"}])
    write(tmp_path / "train.jsonl", [{"q": f"Number {i} of the rows to train on is", "a": str(i)} for i in range(400)])
    text = 'test = "test.jsonl"\ntrain = "train.jsonl"\nprompt = "{{q}}"\ntarget = "a"\nscorer = "normalized"\n'
    (tmp_path / "own.toml").write_text(text)
    write(tmp_path / "docs.jsonl", [{"text": f"{seen} Paris, as all know."}, {"text": "Another text. " * 30}])
    task = tmp_path / "own.toml"
    done = craton(
        "corpus", "build", f"task:{task}", tmp_path / "docs.jsonl", "--decontaminate", task, "--skip", "near",
        "--out", tmp_path / "corpus", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["dropped"]["contaminated"] == 1
    assert sum(s["documents"] for s in facts["splits"].values()) == 401
