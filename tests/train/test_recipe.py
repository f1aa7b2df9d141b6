"""Recipes: keys are checked, the dial resolves everything."""

import time

import pytest

from craton.base import UserError
from craton.corpus.store import Corpus
from craton.train import schedule
from craton.train.plan import parse_budget, plan
from craton.train.recipe import Recipe, as_dict, assign, from_dict, parse_setting, read_recipe
from tests.conftest import small


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.matrix_rl=0.1", "did you mean 'optimizer.matrix_lr'"),
        ("matrix_lr=0.1", "did you mean 'optimizer.matrix_lr'"),
        ("run.steps=many", "run.steps must be int"),
        ("run.steps=-3", "must be positive"),
        ("run.steps=1.5", "must be int"),
        ("run.precision=int8", "one of fp32, bf16"),
        ("schedule.decay_share=2", "at most 1"),
        ("optimizer.matrix_lr=nan", "must be positive"),
        ("run.steps", "key=value"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(UserError, match=message):
        parse_setting(Recipe(), setting)


def test_good_settings(tmp_path):
    recipe = Recipe()
    for text in (
        "optimizer.matrix_lr=1",
        "run.precision=bf16",
        'optimizer.name="adamw"',
        "data.document_mask=false",
        "run.seed=0",
    ):
        parse_setting(recipe, text)
    assert recipe.optimizer.matrix_lr == 1.0 and recipe.run.precision == "bf16" and recipe.data.document_mask is False
    (tmp_path / "r.toml").write_text('[run]\nsteps = 7\n[optimizer]\nname = "muon"\n')
    read_recipe(tmp_path / "r.toml", recipe)
    assert recipe.run.steps == 7 and recipe.optimizer.name == "muon"
    assert as_dict(from_dict(as_dict(recipe))) == as_dict(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[runn]\nsteps = 1", "'run'"),
        ("[run]\nstep = 1", "'run.steps'"),
        ("steps = 1", "'run.steps'"),
        ("[run", "not valid TOML"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "r.toml", Recipe())
    with pytest.raises(UserError, match="no such recipe"):
        read_recipe(tmp_path / "absent.toml", Recipe())


def test_budgets():
    assert (
        parse_budget("90s") == ("seconds", 90)
        and parse_budget("10m") == ("seconds", 600)
        and parse_budget("1.5h") == ("seconds", 5400)
    )
    assert parse_budget("1e16flop") == ("flop", 1e16) and parse_budget("2E15 FLOPs") == ("flop", 2e15)
    for bad in ("", "10", "m", "-3m", "0m", "1e400flop", "ten minutes", "20usd"):
        with pytest.raises(UserError, match="--budget"):
            parse_budget(bad)


def planned(recipe, corpus, rate=1e11):
    opened = Corpus(corpus)
    return plan(
        recipe,
        [opened],
        1e12,
        lambda c, r: r.data.batch_tokens * c.flops_per_token(r.data.sequence_length) / rate,
        time.monotonic(),
        "cpu",
    )


def test_the_dial_fills_everything(corpus):
    sizes = []
    for budget in ("1e12flop", "1e13flop", "1e14flop", "1e15flop"):
        recipe = Recipe()
        recipe.run.budget = budget
        recipe.data.sequence_length = 256
        resolved, config, why = planned(recipe, corpus)
        flat = {f"{p}.{k}": v for p, part in as_dict(resolved).items() for k, v in part.items()}
        assert [k for k, v in flat.items() if v is None] == [] and len(why) >= 4
        spent = resolved.run.steps * resolved.data.batch_tokens * config.flops_per_token(256)
        assert 0.8 * float(budget[:-4]) <= spent <= float(budget[:-4])
        sizes.append(config.parameters)
        assert recipe.run.steps is None  # the request is left as it was
    assert sizes == sorted(sizes) and sizes[-1] > 4 * sizes[0]


def test_time_budgets_cover_the_command(corpus):
    recipe = Recipe()
    recipe.run.budget = "60s"
    resolved, config, _ = planned(recipe, corpus)
    seconds = resolved.run.steps * resolved.data.batch_tokens * config.flops_per_token(512) / 1e11
    assert 40 < seconds < 58


def test_depth_and_steps_fix_size_and_length(corpus):
    recipe = Recipe()
    assign(recipe, "model.num_hidden_layers", 3, "--depth")
    assign(recipe, "run.steps", 50, "--steps")
    resolved, config, _ = planned(recipe, corpus)
    assert config.num_hidden_layers == 3 and config.hidden_size == 192 and resolved.run.steps == 50
    again, _, _ = plan(
        recipe, [Corpus(corpus)], 5e13, lambda c, r: 1 / 0, 0.0, "cpu"
    )  # nothing measured: the same everywhere
    assert as_dict(again) == as_dict(resolved)


def test_too_small_a_budget(corpus):
    for budget in ("1s", "1e6flop"):
        recipe = Recipe()
        recipe.run.budget = budget
        with pytest.raises(UserError, match="too small for any model"):
            planned(recipe, corpus, rate=1e9)


def test_sizes_that_do_not_fit(corpus):
    for settings, message in (
        ({"model__num_attention_heads": 3, "model__num_key_value_heads": 2}, "multiple"),
        ({"data__batch_tokens": 200}, "multiple of data.sequence_length"),
        ({"model__max_position_embeddings": 64}, "max_position"),
    ):
        with pytest.raises(UserError, match=message):
            planned(small(**settings), corpus)


def test_schedule():
    recipe = small(run__steps=100, schedule__warmup_steps=10, schedule__decay_share=0.4, schedule__final_share=0.1)
    shares = [schedule.planned(recipe).share(recipe, s) for s in range(100)]
    assert shares[0] == 0.1 and shares[9:60] == [1.0] * 51
    assert shares[60:] == sorted(shares[60:], reverse=True) and shares[-1] == pytest.approx(0.1 + 0.9 / 40)
