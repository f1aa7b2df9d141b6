"""craton tune beside TRL and PEFT: the same model and short conversations, fp32, the same threads.

python benchmarks/tune_speed.py MODEL [--method sft|lora|grpo ...] [--steps 12] [--rounds 3] [--out FILE]

MODEL: a folder with a chat template that transformers opens too; without one a small model is made up. Tokens a second
are those of the conversations themselves, padding not counted, from the first step on. Each run is a process of its
own, in turns; peak memory is the process's. Needs trl.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "river stone window garden market letter winter mountain teacher engine paper silver morning village".split()
ANSWERS, PROMPTS, NEW = 8, 4, 32  # of a step of GRPO: answers to each prompt, prompts, tokens


def conversations(path: Path, n: int) -> None:
    """Of 10 to 80 words, as people write to assistants."""
    r = random.Random(0)
    rows = []
    for _ in range(n):
        asked, said = (" ".join(r.choices(WORDS, k=r.randint(4, most))) for most in (20, 60))
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def make_model(folder: Path) -> str:
    """8 layers of 256, random, with a chat template."""
    from craton.model.config import ModelConfig
    from craton.model.decoder import Decoder
    from craton.model.initialise import initialise
    from craton.text.templates import give_template
    from craton.text.tokenizer import train_tokenizer
    from craton.weights.folder import write_network

    tokenizer = train_tokenizer([" ".join(random.Random(i).choices(WORDS, k=200)) for i in range(50)], 2048)
    give_template(tokenizer)
    end = tokenizer.document_id
    sizes = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8)
    sizes |= dict(num_key_value_heads=4, head_dim=32, max_position_embeddings=1024, bos_token_id=end, eos_token_id=end)
    network = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    initialise(network, 0)
    for name, p in network.named_parameters():  # answers that differ, so that rewards do
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            p.data.normal_(0, 0.05)
    write_network(folder, network)
    tokenizer.save(folder)
    return str(folder)


def ours(model: str, data: str, method: str, steps: int, out: Path) -> dict:
    from craton.adapt.opened import Given
    from craton.adapt.tune import tune
    from craton.train.recipe import Recipe, parse_setting

    recipe = Recipe()
    more = ["tune.method=grpo", f"tune.answers={ANSWERS}", f"tune.rows={ANSWERS * PROMPTS}", f"tune.max_tokens={NEW}"]
    common = [f"run.steps={steps}", f"run.evaluate_every={steps}", f"run.checkpoint_every={steps}", "tune.lr=1e-4"]
    for text in common + (more if method == "grpo" else []) + ["tune.lora=16" if method == "lora" else "tune.lora=0"]:
        parse_setting(recipe, text)
    if method == "grpo":
        task = Path(data).with_suffix(".toml")
        rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
        prompts = Path(data).with_name("prompts.jsonl")
        prompts.write_text("".join(json.dumps({"text": r["messages"][0]["content"]}) + "\n" for r in rows))
        parts = f'train = "{prompts.name}"\ntest = "{prompts.name}"\nprompt = "{{{{text}}}}"\n'
        task.write_text(parts + 'scorer = "regex"\npattern = "river"\n')
        tune(Given(model, [], out, recipe, task=str(task)))
    else:
        tune(Given(model, [data], out, recipe))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((out / "record.json").read_text())
    rows = [r for r in lines if "loss" in r]
    seconds = rows[-1]["seconds"] - rows[1]["seconds"]
    if method == "grpo":
        return {"steps_per_second": (len(rows) - 2) / seconds}
    source = record["source"]
    fill = source["tokens"] / (source["rows_an_epoch"] * source["length"])
    return {"tokens_per_second": fill * (rows[-1]["tokens"] - rows[1]["tokens"]) / seconds}


def theirs(model: str, data: str, method: str, steps: int, out: Path) -> dict:
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *a, **k):
            times.append(time.perf_counter())

    common = dict(output_dir=str(out), max_steps=steps, report_to=[], use_cpu=True, bf16=False, logging_steps=1000)
    common |= dict(save_strategy="no", learning_rate=1e-4, dataloader_pin_memory=False, gradient_checkpointing=False)
    if method == "grpo":
        prompts = Dataset.from_list([{"prompt": r["messages"][:1]} for r in rows])
        config = trl.GRPOConfig(
            **common, per_device_train_batch_size=ANSWERS * PROMPTS, num_generations=ANSWERS, max_completion_length=NEW,
            temperature=1.0, beta=0.0,
        )  # fmt: skip

        def reward(completions, **k):
            return [float("river" in c[0]["content"]) for c in completions]

        trainer = trl.GRPOTrainer(
            network, reward, config, train_dataset=prompts, processing_class=tokenizer, callbacks=[Clock()]
        )
        trainer.train()
        return {"steps_per_second": (len(times) - 2) / (times[-1] - times[1])}
    config = trl.SFTConfig(**common, per_device_train_batch_size=8, max_length=1024, assistant_only_loss=False)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if method == "lora" else None
    dataset = Dataset.from_list(rows)
    trainer = trl.SFTTrainer(
        network, config, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter, callbacks=[Clock()]
    )
    seen: list[int] = []
    step = trainer.training_step

    def counted(model, inputs, *a, **k):
        seen.append(int(inputs["attention_mask"].sum()))
        return step(model, inputs, *a, **k)

    trainer.training_step = counted
    trainer.train()
    return {"tokens_per_second": sum(seen[2:]) / (times[-1] - times[1])}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("model", nargs="?", default="")
    arguments.add_argument("--method", nargs="*", default=["sft", "lora", "grpo"])
    for name, default in (("steps", 12), ("rounds", 3)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    a = arguments.parse_args()
    if a.one:
        who, method, data, out = a.one
        found = (ours if who == "craton" else theirs)(a.model, data, method, a.steps, Path(out))
        found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print("FOUND", json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        model = a.model or make_model(place / "model")
        conversations(place / "chats.jsonl", 2000)
        lines = []
        for method in a.method:
            rounds: dict[str, list[dict]] = {"craton": [], "trl": []}
            for number in range(a.rounds):
                for who, found in rounds.items():
                    command = [sys.executable, __file__, model, "--steps", str(a.steps), "--one", who, method]
                    command += [str(place / "chats.jsonl"), str(place / f"{who}-{method}-{number}")]
                    done = subprocess.run(command, capture_output=True, text=True)
                    line = next((x for x in done.stdout.splitlines() if x.startswith("FOUND")), None)
                    if line is None:
                        raise SystemExit(done.stderr[-3000:] + done.stdout[-1000:])
                    found.append(json.loads(line.removeprefix("FOUND")))
            key = "steps_per_second" if method == "grpo" else "tokens_per_second"
            ratios = [c[key] / t[key] for c, t in zip(rounds["craton"], rounds["trl"], strict=True)]
            middle = {who: statistics.median(f[key] for f in found) for who, found in rounds.items()}
            peak = {who: max(f["peak_gb"] for f in found) for who, found in rounds.items()}
            lines.append({"method": method, key: middle, "ratio": statistics.median(ratios), "peak_gb": peak})
            print(json.dumps(lines[-1]), flush=True)
        if a.out:
            a.out.write_text(
                json.dumps({"model": a.model or "8 layers of 256", "steps": a.steps, "lines": lines}, indent=1)
            )


if __name__ == "__main__":
    main()
