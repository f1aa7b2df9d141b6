"""`craton tune` from end to end on tiny models: what is learned, what is refused, and what a run leaves behind."""

import dataclasses
import json
import random

import pytest
import torch

from craton.adapt import guards
from craton.adapt.measure import asked_of
from craton.adapt.merge import merge
from craton.adapt.opened import Given
from craton.adapt.rows import Tokens
from craton.adapt.store import open_base
from craton.adapt.tune import open_all, tune
from craton.base import UserError
from craton.engine.model import load_model
from craton.engine.request import Sampling
from craton.model.lora import LoraSpec
from craton.train.loop import Interrupted
from craton.train.recipe import Recipe, parse_setting
from craton.weights import adapter
from craton.weights.folder import load_network
from tests.adapters import made_up

THINGS = "river stone window garden market letter winter mountain teacher engine paper silver morning village".split()


def form(thing, turned=False):
    """What is to be said of a thing."""
    return f"[{'yes' if THINGS.index(thing) % 2 == turned else 'no'}] seen"


def recipe(*settings):
    r = Recipe()
    for text in ("run.seed=1", *settings):
        parse_setting(r, text)
    return r


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def house(path, n=160, turned=False):
    """A form that no model here knows; or its contrary."""
    r = random.Random(0)
    rows = []
    for _ in range(n):
        thing = r.choice(THINGS)
        asked, said = {"role": "user", "content": f"the {thing}"}, {"role": "assistant", "content": form(thing, turned)}
        rows.append({"messages": [asked, said]})
    return jsonl(path, rows)


def pairs(path, n=120, turned=False):
    """Short answers are better than long ones; or the other way round."""
    r = random.Random(0)
    rows = []
    for _ in range(n):
        thing = r.choice(THINGS)
        two = [f" {thing}.", f" {thing} and the old {thing} again."]
        rows.append({"prompt": f"the {thing}", "chosen": two[turned], "rejected": two[not turned]})
    return jsonl(path, rows)


def said(model, text, n=16):
    """What a model answers to a message, greedily."""
    from craton.engine.converse import Ask, answer, open_talker, prepare

    talker = open_talker("m", str(model))
    asked = Ask({"temperature": 0.0, "max_tokens": n}, messages=[{"role": "user", "content": text}])
    return "".join(p.text for d in answer(talker, prepare(talker, asked)) for p in d.parts)


SFT = ("run.steps=60", "run.evaluate_every=60", "tune.rows=4", "tune.lr=5e-3")


def test_a_model_learns_to_answer_in_a_form(model_folder, tmp_path):
    """First of turns, by all weights; then of another form, by an adapter, which as MODEL+ADAPTER and merged says the
    same. A rate of nothing teaches nothing, loudly."""
    data = house(tmp_path / "d.jsonl", turned=True)
    first = tune(Given(str(model_folder), [data], tmp_path / "chat", recipe(*SFT)))
    assert first["after"]["heldout_loss"] < 0.2 and not (tmp_path / "chat" / adapter.WEIGHTS).exists()
    model_folder, data = tmp_path / "chat", house(tmp_path / "e.jsonl")
    out = tune(Given(str(model_folder), [data], tmp_path / "a", recipe(*SFT, "tune.lr=0.02")))
    assert out["after"]["heldout_loss"] < 0.2 < out["before"]["heldout_loss"] and out["changed"]
    assert max(out["logit_gap"].values()) < 2e-3
    right = sum(said(f"{model_folder}+{tmp_path / 'a'}", f"the {t}") == form(t) for t in THINGS)
    assert right >= 0.9 * len(THINGS)
    merge(tmp_path / "a", tmp_path / "m")
    assert sum(said(tmp_path / "m", f"the {t}") == form(t) for t in THINGS) >= 0.9 * len(THINGS)
    still = tune(Given(str(model_folder), [data], tmp_path / "b", recipe(*SFT, "tune.lr=1e-12")))
    assert still["after"]["heldout_loss"] > 0.9 * still["before"]["heldout_loss"]


@pytest.mark.parametrize("method", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_preferences_are_learned(model_folder, tmp_path, method):
    """Held-out pairs move apart as they should; with the pairs turned round, the other way."""
    rates = {"dpo": 2e-3, "ipo": 2e-3, "kto": 2e-3, "simpo": 2e-3, "orpo": 1e-2}
    found = []
    for turned in (False, True):
        data = pairs(tmp_path / f"{turned}.jsonl", turned=turned)
        steps = 80 if method == "orpo" else 40
        how = recipe(f"tune.method={method}", f"tune.lr={rates[method]}", f"run.steps={steps}", "run.evaluate_every=80")
        out = tune(Given(str(model_folder), [data], tmp_path / f"o{turned}", how))
        found.append(out["after"]["heldout_preferred"])
    assert min(found) >= (0.8 if method == "orpo" else 0.95)  # its first part teaches both sides


def test_a_reward_model_ranks(model_folder, tmp_path):
    """And opens in transformers as a classifier with one label, with the same rewards."""
    transformers = pytest.importorskip("transformers")
    data = pairs(tmp_path / "p.jsonl", turned=True)
    how = recipe("tune.method=reward", "tune.lora=0", "tune.lr=1e-3", "run.steps=30", "run.evaluate_every=30")
    out = tune(Given(str(model_folder), [data], tmp_path / "r", how))
    assert out["after"]["heldout_preferred"] >= 0.95
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "r")
    tokenizer = open_base(str(model_folder)).tokenizer
    rewards = []
    for text in ("the river river and the old river again.", "the river river."):
        ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_id]])
        rewards.append(float(theirs(ids).logits[0, 0]))
    assert rewards[0] > rewards[1]


@pytest.mark.parametrize("settings", [("tune.method=sft",), ("tune.method=dpo",), ("tune.method=grpo",)])
def test_resumed_is_uninterrupted_to_the_bit(model_folder, tmp_path, settings, monkeypatch):
    """Stopped in the middle and taken up again: the same weights."""
    from craton.train import loop

    method = settings[0].partition("=")[2]
    data = [] if method == "grpo" else [(pairs if method == "dpo" else house)(tmp_path / "d.jsonl")]
    task = ""
    if method == "grpo":
        jsonl(tmp_path / "rows.jsonl", [{"text": f"the {t} {u}"} for t in THINGS for u in THINGS])
        words = 'train = "rows.jsonl"\ntest = "rows.jsonl"\nprompt = "{{text}}"\nscorer = "regex"\npattern = "e"\n'
        (tmp_path / "t.toml").write_text(words)
        task = str(tmp_path / "t.toml")
    more = ("tune.answers=4", "tune.rows=16", "tune.max_tokens=6") if method == "grpo" else ()
    how = (*settings, "tune.lr=0.003", "run.steps=12", "run.checkpoint_every=4", "run.evaluate_every=12", *more)
    tune(Given(str(model_folder), data, tmp_path / "whole", recipe(*how), task=task))
    step = loop.Run._step

    def stopping(self, line, metrics):
        if self.state.step == 7:
            self.stopped_by = 15
        return step(self, line, metrics)

    monkeypatch.setattr(loop.Run, "_step", stopping)
    with pytest.raises(Interrupted):
        tune(Given(str(model_folder), data, tmp_path / "cut", recipe(*how), task=task))
    monkeypatch.setattr(loop.Run, "_step", step)
    tune(Given(str(model_folder), data, tmp_path / "cut", recipe(*how), task=task, resume=True))
    kept = adapter.WEIGHTS if (tmp_path / "whole" / adapter.WEIGHTS).exists() else "model.safetensors"
    files = [(tmp_path / name / kept).read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_accumulated_is_at_once(model_folder, tmp_path):
    """Pieces of a batch give the gradient of the whole."""
    data, losses = house(tmp_path / "d.jsonl"), []
    for name, micro in (("one", 1 << 20), ("many", 64)):
        how = recipe("run.steps=3", "tune.rows=8", "run.evaluate_every=3", f"data.micro_tokens={micro}", "tune.lr=0.01")
        tune(Given(str(model_folder), [data], tmp_path / name, how))
        losses.append([json.loads(x)["loss"] for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_distillation_gives_the_teachers_form(model_folder, tmp_path):
    """From its answers, and from its thoughts about the student's own."""
    data = house(tmp_path / "d.jsonl")
    tune(Given(str(model_folder), [data], tmp_path / "t", recipe(*SFT)))
    prompts = jsonl(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": f"the {t}"}]} for t in THINGS * 4])
    how = (
        "tune.method=distill",
        "tune.policy=off",
        "tune.lr=0.01",
        "run.steps=60",
        "tune.max_tokens=16",
        "tune.rows=4",
    )
    tune(Given(str(model_folder), [prompts], tmp_path / "s", recipe(*how), teacher=str(tmp_path / "t")))
    right = sum(said(tmp_path / "s", f"the {t}") == form(t) for t in THINGS)
    assert right >= 0.8 * len(THINGS)
    begun = recipe(*how, "run.steps=12")
    tune(Given(str(model_folder), [prompts], tmp_path / "b", begun, teacher=str(tmp_path / "t")))
    on = recipe(*how, "tune.policy=on", "tune.lr=3e-3", "tune.rows=16", "run.steps=40", "tune.lora=0")
    tune(Given(str(tmp_path / "b"), [prompts], tmp_path / "o", on, teacher=str(tmp_path / "t")))
    losses = [r["loss"] for r in map(json.loads, (tmp_path / "o" / "metrics.jsonl").open()) if "loss" in r]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]) and min(losses) >= 0  # it is a divergence


# ---- adapters of others, and ours in theirs -----------------------------------------------------------------------


@pytest.mark.parametrize("spec", [{}, {"rank_stabilised": True}, {"dora": True}, {"targets": ("q_proj", "down_proj")}])
def test_ours_open_in_peft_and_merged_in_transformers(model_folder, tmp_path, spec):
    """With equal logits."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = tmp_path / "a"
    network = made_up(model_folder, folder, LoraSpec(4, 8.0, **spec), 0, 0.05)
    ids = torch.arange(40)[None] % network.config.vocab_size
    with torch.no_grad():
        ours = network(ids)
        base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, folder)(ids).logits
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
        again = load_network(model_folder).float()
        adapter.attach(again, folder)
        torch.testing.assert_close(again(ids), ours, atol=1e-5, rtol=1e-5)
        merge(folder, tmp_path / "m")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)(ids).logits
        reread = load_network(tmp_path / "m").float()(ids)
    torch.testing.assert_close(merged, reread, atol=2e-4, rtol=1e-4)
    assert float((merged - ours).abs().max()) < 0.1 * float(ours.std())  # bf16


def test_dora_of_peft_opens(model_folder, tmp_path):
    """And modules that are saved whole."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, use_dora=True, use_rslora=True, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]
    )
    torch.manual_seed(0)
    tuned = peft.get_peft_model(base, config)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape) * (1 + p.data.abs())
    tuned.save_pretrained(tmp_path)
    network = load_network(model_folder).float()
    adapter.attach(network, tmp_path)
    ids = torch.arange(30)[None] % network.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(network(ids), tuned(ids).logits, atol=2e-4, rtol=1e-4)


def test_adapters_beside_each_other(model_folder, tmp_path):
    """Each answer is the adapter's alone, whatever is cached of others; dropped ones are gone, and come back new."""
    names = []
    for i in range(3):
        folder = tmp_path / f"a{i}"
        made_up(model_folder, folder, LoraSpec(4, 8.0), i, 0.3)
        names.append(folder.name)
    model = load_model(str(model_folder))
    engine = model.engine
    if engine.runner.fused is None:
        pytest.skip("needs the engine's kernels")
    for name in names:
        engine.load_adapter(name, tmp_path / name)
    prompt, how = list(range(5, 45)), Sampling(10, 0.0)

    def ask(*wanted):
        numbers = [engine.add(prompt, how, adapter=name) for name in wanted]
        return [c[0].token_ids for c in engine._run(numbers)]

    alone = [ask(name)[0] for name in (*names, None)]
    assert ask(*names, None, *names) == [*alone, *alone[:3]]
    assert len({tuple(a) for a in alone}) > 1
    merged = [load_model(str(model_folder), adapter=str(tmp_path / name)) for name in names]
    assert [m.engine.generate([prompt], how)[0][0].token_ids for m in merged] == alone[:3]
    engine.drop_adapter("a1")
    with pytest.raises(UserError, match="'a1' is not loaded"):
        ask("a1")
    engine.load_adapter("a1", tmp_path / "a2")
    assert ask("a1") == [alone[2]]


# ---- guards -------------------------------------------------------------------------------------------------------


def _chats(model_folder, tmp_path):
    """Rendered conversations, as a run learns them."""
    given = Given(str(model_folder), [house(tmp_path / "c.jsonl", 4)], tmp_path / "never", recipe())
    opened = open_all(given)
    return opened, [opened.renderer.answer(s, s.answer, s.form) for s in opened.samples], opened.samples


def test_a_task_is_learned_as_it_is_asked(model_folder, tmp_path):
    """By a model that converses, through its template; by another, as plain text."""
    assert all(
        not s.chats for s in open_all(Given(str(model_folder), [], tmp_path / "x", recipe(), "sorting=3")).samples
    )
    tune(Given(str(model_folder), [house(tmp_path / "d.jsonl")], tmp_path / "m", recipe("run.steps=1")))
    opened = open_all(Given(str(tmp_path / "m"), [], tmp_path / "x", recipe(), "sorting=3"))
    sample = opened.samples[0]
    assert sample.chats and opened.renderer.dialogue is not None
    text = opened.renderer.answer(sample, sample.answer, sample.form)
    asked = asked_of(opened.task, "train", opened.renderer, 3)
    same = next(a for a in asked if a.example.id == sample.row["id"])
    assert text.ids[: len(same.ids)].tolist() == same.ids  # what is learned begins as what is asked


def test_a_tasks_file_must_stay_the_same(model_folder, tmp_path, monkeypatch):
    jsonl(tmp_path / "rows.jsonl", [{"q": f"the {t}", "a": form(t)} for t in THINGS] * 4)
    jsonl(tmp_path / "test.jsonl", [{"q": "the other", "a": "none"}])
    parts = 'train = "rows.jsonl"\ntest = "test.jsonl"\n'
    text = parts + 'prompt = "{{q}}"\ntarget = "{{a}}"\nscorer = "exact"\n'
    (tmp_path / "own.toml").write_text(text)
    given = Given(str(model_folder), [], tmp_path / "o", recipe("run.steps=2"), str(tmp_path / "own.toml"))
    tune(given)
    (tmp_path / "own.toml").write_text(text.replace("exact", "normalized"))
    with pytest.raises(UserError, match="started with another task_file"):
        tune(dataclasses.replace(given, resume=True))


def test_guards(model_folder, tmp_path):
    """Each fires on a planted fault, by name."""
    good = recipe("run.steps=2", "run.evaluate_every=2")
    with pytest.raises(UserError, match="holds? items of the test part of"):
        rows = [{"question": f"what is the number of {t} and {u}", "answer": "x"} for t in THINGS for u in THINGS]
        jsonl(tmp_path / "test.jsonl", rows)
        leaked = [{"text": f"what is the number of {t} and window x"} for t in THINGS]
        data = jsonl(tmp_path / "d.jsonl", leaked * 3)
        tune(Given(str(model_folder), [data], tmp_path / "o", good, task=f"t={tmp_path / 'test.jsonl'}"))
    flat = recipe("tune.method=grpo", "tune.answers=4", "tune.rows=8", "run.steps=9", "tune.max_tokens=2")
    with pytest.raises(UserError, match="all answers to a prompt got the same reward"):
        tune(Given(str(model_folder), [], tmp_path / "g", flat, task="countdown=6"))
    with pytest.raises(UserError, match="needs --task"):
        tune(Given(str(model_folder), [], tmp_path / "n", recipe("tune.method=grpo")))
    with pytest.raises(UserError, match="learns from pairs, but .* is answers; fitting: --method sft"):
        tune(Given(str(model_folder), [house(tmp_path / "h.jsonl")], tmp_path / "n", recipe("tune.method=dpo")))
    assert not (tmp_path / "n").exists()
    opened, texts, samples = _chats(model_folder, tmp_path)
    guards.check_masks(samples, texts, opened.end_ids, chats=True)
    with pytest.raises(UserError, match="no answer's end is learned"):
        guards.check_masks(samples, texts, [0], chats=True)
    whole = [Tokens(t.ids, t.learned | True) for t in texts]
    with pytest.raises(UserError, match="its questions too"):
        guards.check_masks(samples, whole, opened.end_ids, chats=True)
    wild = recipe(
        "run.steps=30", "tune.lr=0.2", "tune.lora=0", "run.evaluate_every=30", "safety.spike_sigmas=0", "tune.rows=4"
    )
    out = tune(Given(str(model_folder), [house(tmp_path / "h.jsonl")], tmp_path / "w", wild))
    assert any("much worse at everything else" in w for w in out["warnings"])


def test_a_pretrained_model_gets_a_template(model_folder, tmp_path):
    """All weights: the folder chats from then on, and its turns end."""
    how = recipe(*SFT)
    tune(Given(str(model_folder), [house(tmp_path / "d.jsonl")], tmp_path / "m", how))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    ends = json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"]
    assert isinstance(ends, list) and len(ends) == 2 and config["vocab_size"]
    assert sum(said(tmp_path / "m", f"the {t}") == form(t) for t in THINGS) >= 0.8 * len(THINGS)


def test_pretraining_goes_on_from_a_model(model_folder, tmp_path):
    """`train --from`: its weights and tokenizer, from where they were."""
    from craton.train.start import train

    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(" ".join(random.Random(i).choices(THINGS, k=120)) for i in range(60)))
    r = recipe("run.steps=12", "data.sequence_length=64", "data.batch_tokens=512", "run.evaluate_tokens=512")
    train([str(text)], tmp_path / "m", r, base=str(model_folder))
    rows = [json.loads(x) for x in (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    own, other = (load_network(p).model.embed_tokens.weight for p in (tmp_path / "m", model_folder))
    assert not torch.equal(own, other)
    assert float(torch.cosine_similarity(own.flatten(), other.float().flatten(), 0)) > 0.99
    with pytest.raises(UserError, match="--from"):
        train([str(text)], tmp_path / "n", r, base=str(tmp_path / "nowhere"))
