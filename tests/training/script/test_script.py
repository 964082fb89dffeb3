"""`dar train`: from a command line to a model, and what it says on the way."""

import json
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
)

from dar.errors import InvalidRequestError
from dar.settings import inherited_environment
from dar.training import DARConfig, DARTrainer
from dar.training.script.assembly import config_of
from dar.training.script.flags import ScriptArguments, make_parser, read_command_line
from dar.training.script.main import main
from fakes.training.folder import command


def test_the_quick_start_runs_as_written(folder: Path) -> None:
    trainer = DARTrainer(
        model="policy",
        args=DARConfig(
            output_dir="out",
            learning_rate=5e-7,
            dar_k=2,
            num_train_epochs=1,
            use_cpu=True,
            max_new_tokens=4,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"Question {i}"} for i in range(9)]),
        reward_model="judge-model",
    )
    trainer.train()
    assert trainer.state.global_step == 2
    trainer.save_model()
    assert AutoModelForCausalLM.from_pretrained("out").config.model_type == "qwen2"


def test_a_run_trains_shows_samples_and_says_how_to_load_the_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command("--learning-rate", "1e-3", reward_model_name_or_path="judge-model")
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.out == ""
    for expected in (
        "step 1/2  reward -", "samples of step 1", "» The ", "Trained 2 steps.", "  reward ", "→", "  KL ",
        "at the clip, effective sample size", "tokens/s", "out/checkpoints/step-2",
        "AutoModelForCausalLM.from_pretrained('out')",
    ):  # fmt: skip
        assert expected in said.err, said.err
    lines = [line for line in said.err.splitlines() if not line.startswith("warn: ")]
    assert all(len(line) <= 80 for line in lines)
    before = AutoModelForCausalLM.from_pretrained("policy").state_dict()
    after = AutoModelForCausalLM.from_pretrained("out").state_dict()
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in folder.iterdir()} | {"__pycache__"}
    options = command("--dry-run", reward_model_name_or_path="judge-model", max_steps=30)
    assert main([*options, "--push_to_hub", "--hub_model_id", "team/pleased"]) == 0
    said = capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} | {"__pycache__"} == before
    for expected in (
        "Completions of the first prompts", "(nothing was written)", "10 passes over 6 rows",
        "2 prompts x 4 completions = 8 completions, at most 32 new tokens", "short, reward_model", "reward models", "out, checkpoints too",
        "team/pleased", "a KL of 1 to the base model", "from at most 60 completions before the first step",
    ):  # fmt: skip
        assert expected in said, said
    assert said.count("» The ") == 2
    assert "alpha + beta" not in said  # they are not chosen yet, so nothing is judged by them


def test_rewards_too_small_for_alpha_and_beta_are_a_line_of_a_run_and_of_its_preview(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (["--dry_run"], []):
        assert main(command(*more, reward_function="judge:small", alpha=0.1, beta=0.3)) == 0
        said = capsys.readouterr().err.splitlines()
        (line,) = [one for one in said if one.startswith("warn: ") and "alpha" in one]
        assert "the rewards had hardly any effect" in line
        assert "std(reward) is " in line
        assert "lower alpha + beta to about" in line
        assert "the learning rate is " in line


def test_a_run_says_which_learning_rate_it_has_chosen(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.yaml").write_text("learning_rate: null\nlearning_rate_multiplier: 0.5\n")
    assert main(command("--dry_run", "--config", "run.yaml")) == 0
    planned = " ".join(capsys.readouterr().err.split())
    assert "a peak learning rate of 0.0005, chosen for the full weights of a model of" in planned
    assert main(command(max_steps=1)) == 0
    said = capsys.readouterr().err
    assert (
        "info: the peak learning rate is 0.001, chosen for the full weights of a model of" in said
    )
    card = (folder / "out" / "README.md").read_text()
    assert "| `learning_rate` | `0.001` |" in card
    assert main(command("--dry_run", learning_rate="2e-5")) == 0
    planned = " ".join(capsys.readouterr().err.split())
    assert "a peak learning rate of 2e-05" in planned
    assert "chosen for the full weights" not in planned


def test_a_run_is_not_overwritten_unless_the_user_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command()) == 0
    (folder / "out" / "notes.txt").write_text("mine")
    assert "Trained 2 steps." in capsys.readouterr().err
    before = (folder / "out" / "model.safetensors").read_bytes()
    assert main(command(max_steps=1)) == 64
    said = capsys.readouterr().err
    assert "--resume_from_checkpoint out/checkpoints/step-2 to continue it" in said
    assert (folder / "out" / "model.safetensors").read_bytes() == before
    assert main(command("--overwrite_output_dir", max_steps=1)) == 0
    assert "Trained 1 step." in capsys.readouterr().err
    assert [one.name for one in (folder / "out" / "checkpoints").iterdir()] == ["step-1"]
    assert (folder / "out" / "notes.txt").read_text() == "mine"
    assert main(command("--resume_from_checkpoint", "true", max_steps=3)) == 0
    assert "Trained 2 steps after step 1." in capsys.readouterr().err


def test_wandb_without_a_key_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    assert main(command("--report_to", "wandb")) == 64
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dar train: the tracker wandb cannot start: ")
    assert "leave it out of --report_to" in last


@pytest.mark.parametrize(
    ("function", "said", "shown"),
    [
        ("judge:failing", "the reward function raised KeyError: 'answer'", 'columns["answer"]'),
        ("unfinished:short", "importing unfinished raised SyntaxError: '(' was never closed", ""),
        ("divided:short", "importing divided raised ZeroDivisionError: division by zero", ""),
        ("judge:leaving", "the reward function raised SystemExit: 3", "sys.exit(3)"),
        ("judge:cancelled", "the reward function raised CancelledError: mine", "CancelledError("),
        (
            "judge:ended",
            "the reward function raised RuntimeError: StopIteration was raised",
            "next(",
        ),
        ("left:short", "importing left raised SystemExit: 0", ""),
    ],
)
def test_an_exception_of_a_reward_function_is_told_without_our_own_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], function: str, said: str, shown: str
) -> None:
    (folder / "unfinished.py").write_text("def short(")
    (folder / "divided.py").write_text("1 / 0")
    (folder / "left.py").write_text("import sys; sys.exit(0)")
    assert main(command(reward_function=function)) in (1, 64)
    text = capsys.readouterr().err
    assert said in text.splitlines()[-1]
    assert shown in text
    assert "/dar/" not in text
    assert "Traceback" not in text


def test_a_forecast_shows_what_each_budget_buys_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in folder.iterdir()} | {"__pycache__"}
    options = command("--forecast", output_dir=None, reward_function="judge:spread")
    assert main(options) == 0
    said = capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} | {"__pycache__"} == before
    lines = said.splitlines()
    header = next(i for i, line in enumerate(lines) if "KL (nats)" in line)
    rows = [line.split() for line in lines[header + 1 :] if line.strip()[:1].isdigit()]
    assert rows[0][0] == "0"
    assert rows[1][0] == "0.25"
    rewards = [float(row[1]) for row in rows]
    assert rewards == sorted(rewards)
    assert rewards[1] > rewards[0] + 0.5
    assert float(rows[1][3]) == pytest.approx(3 * float(rows[1][2]), rel=1e-3)
    assert "completions of 6 prompts" in said


def test_the_help_of_a_forecast_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--forecast", "--help"])
    text = capsys.readouterr().out
    assert "dar forecast --model_name_or_path MODEL --dataset_name DATA" in text
    assert "how much reward each distance from the base model buys" in text
    assert "dar train --model" not in text
    assert "--kl_budget" in text
    assert "--warmup_steps" not in text  # trains nothing
    assert main(["--forecast", "--dataset_name", "x"]) == 64
    assert "dar forecast --help lists all options" in capsys.readouterr().err


def test_a_forecast_of_equal_rewards_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--forecast", reward_function="judge:equal")) == 1
    assert "nothing distinguishes them" in capsys.readouterr().err


def test_a_dry_run_fails_when_every_reward_is_skipped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--dry_run", reward_function="judge:silent")) == 1
    assert "every reward of the 8 completions of the first 2 prompts" in capsys.readouterr().err


def test_a_dry_run_fails_when_a_reward_does(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--dry_run", reward_function="judge:broken")) == 1
    assert "1 of the 8 completions of the first 2 prompts got no reward" in capsys.readouterr().err


# peft 0.19 asks transformers 5.23 for a property that is being renamed
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_trained_and_goes_on_from_the_latest_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = ("--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj")
    (folder / "scored").write_text("")
    interrupted = command(*adapter, alpha=0.1, reward_function="judge:interrupting", max_steps=3)
    before = signal.getsignal(signal.SIGINT)  # a shell's background job is born without one
    assert main(interrupted) == 130
    said = " ".join(capsys.readouterr().err.split())
    hint = "--resume_from_checkpoint out/checkpoints/step-1"
    assert "Stopped after step 1 of 3; a checkpoint was written." in said
    assert hint in said
    assert signal.getsignal(signal.SIGINT) is before
    assert main([*interrupted, "--resume_from_checkpoint", "latest"]) == 0
    model = AutoPeftModelForCausalLM.from_pretrained("out")
    assert model.active_peft_config.target_modules == {"q_proj", "v_proj"}
    assert "step 3/3" in capsys.readouterr().err


@pytest.mark.slow  # a process imports torch, which takes six CPU seconds
def test_the_command_is_the_script_in_a_process_and_passes_signals_and_exit_codes_on(
    folder: Path,
) -> None:
    environment = inherited_environment(("PATH", "HOME", "LANG", "PYTHONPATH"))
    settings = {**environment, "DAR_HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dar.cli", "train", *command(max_steps=100_000)],
        cwd=folder,
        env=settings,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("step 2/"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert "a checkpoint was written" in rest
    (checkpoint,) = (folder / "out" / "checkpoints").iterdir()
    assert (checkpoint / "MANIFEST.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--alpha", "three"], "argument --alpha: invalid float value: 'three'"),
        (["--alhpa", "3"], "unrecognized arguments: --alhpa 3"),
        (["--alpha", "-1"], "alpha is -1.0, but must be a number, at least 0"),
        (["--fp16_full_eval"], "fp16_full_eval=True has no effect"),
        (["--dataset_name", "nothing.jsonl"], "there is no file or folder nothing.jsonl"),
        (["--dataset_name", "judge.py"], "must end with .jsonl"),
        (["--dataset_config", "en"], "has no configurations"),
        (["--reward_function", "judge:nothing"], "module 'judge' has no attribute 'nothing'"),
        (["--reward_function", "judge:number"], "judge:number is of the type int, not a function"),
        (
            ["--use_peft", "--lora_target_modules", r"([\w.]+)+!"],
            r"--lora_target_modules '([\\w.]+)+!' is no pattern of modules: matching it might never end",
        ),
        (["--reward_function", "judge"], "must be module:function"),
        (["--reward_function", "./judge.py:short"], "and give judge:short"),
        (["--output_dir", "a\0b"], "but must be a path without NUL characters"),
        (["--dataset_name", "a\0b.jsonl"], "--dataset_name has a NUL character"),
        (["--output_dir", "dangling"], "dangling is a link to a place that does not exist"),
        (["--output_dir", "dangling/out"], "dangling is a link to a place that does not exist"),
        (["--reward_model_name_or_path", "policy"], "'policy' is no reward model: its weights lack score.weight"),
        (["--lora_r", "4"], "--lora_r has no effect without --use_peft"),
        (["--use_peft", "--lora_target_modules", "v_proj", "q_prjo"], "names 'q_prjo', which the model lacks"),
        (["--use_peft", "--lora_alpha", "0"], "--lora_alpha: Input should be greater than 0"),
        (["--use_peft", "--lora_dropout", "1"], "--lora_dropout: Input should be less than 1"),
        (["--max_steps", "1", "--preset", "paper"], "warmup_steps is 15, but the run has one step"),
        (["--max_steps", "1", "--warmup_steps", "0.1"], "warmup_steps is 0.1, but the run has one step"),
        (["--max_steps", "0"], "max_steps is 0, but must be a whole number, at least 1, or -1"),
        (["--optim", "sgd", "--optim_args", "momentum=0.9,foo=1"], "optim_args has 'foo', which sgd ignores"),
        (["--dtype", "float16"], "weights that are trained must not be float16"),
        (["--config", "twice.yaml"], "twice.yaml, line 2: 'top-k' occurs twice; keep one"),
        (["--use_peft", "--lora_r", "0"], "--lora_r: Input should be greater than or equal to 1, but it is 0"),
        (["--reward_weights", "1", "2"], "the number of reward weights is 2, but that of rewards is 1"),
        (["--reward_weights", "nan"], "--reward_weights has nan, but must be a list of numbers from -1,000,000"),
        (["--reward_weights", "inf"], "--reward_weights has inf"),
        (["--reward_weights", "1e300"], "--reward_weights has 1e+300"),
        (["--optim", "paged_adamw_8bit"], "optim paged_adamw_8bit cannot be used: You need to install `bitsandbytes`"),
        (["--use_liger_kernel"], "use_liger_kernel needs the library liger-kernel, 0.3.0 or newer"),
        (["--optim_args", "foo"], "optim_args has 'foo', which adamw_torch ignores"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type cosine_with_min_lr cannot be used with lr_scheduler_kwargs None: One of min_lr"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "missing 1 required positional argument: 'num_decay_steps'"),
        (["--lr_scheduler_kwargs", '{"x": 1}'], "with lr_scheduler_kwargs {'x': 1}: TypeError: "),
        (["--lr_scheduler_kwargs", "[1]"], "cannot be used with lr_scheduler_kwargs [1]: TypeError: "),
        (["--resume_from_checkpoint", "latest"], "there is no checkpoint in"),
        (["--config", "missing.yaml"], "No such file"),
        (["--eval_strategy", "steps", "--eval_dataset_name", "no.jsonl"], "no file or folder no.jsonl"),
        (["--eval_strategy", "steps"], "prompts.jsonl is one split, which is trained on"),
        (["--eval_dataset_name", "prompts.jsonl"], "--eval_dataset_name has no effect without --eval_strategy"),
        (["--dataset_test_split", "x"], "--dataset_test_split has no effect without --eval_strategy"),
        (["--dataset_train_split", "nonsense"], "has no splits, so there is no 'nonsense'"),
    ],
)  # fmt: skip
def test_bad_input_is_a_paragraph_and_exit_code_64(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (folder / "twice.yaml").write_text("top_k: 3\ntop-k: 1\n")
    (folder / "dangling").symlink_to("nowhere")
    base = command()
    for name in {flag.partition("=")[0] for flag in base} & set(arguments):
        base = [flag for flag in base if flag.partition("=")[0] != name]
    assert main([*base, *arguments]) == 64
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dar train: ")
    assert said in error


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("more.csv", "prompt,a\nhello,1\n\nyes,2,3\n", "more.csv, line 4: 3 fields, but the header has 2; a text with a comma"),
        ("all.csv", "prompt,a\nHello, world,1\nSay a, then b,2\n", "all.csv, line 2: 3 fields, but the header has 2"),
        ("less.csv", 'prompt,a\n"two\nlines",1\nyes\n', "less.csv, line 4: 1 field, but the header has 2"),
        ("same.csv", "prompt,a,a\nhello,1,2\n", "same.csv: the column 'a' occurs twice in the header"),
        ("index.csv", ",prompt\n0,hello\n", "index.csv: column 1 has no name in the header; name it, or remove it (pandas"),
        ("quote.csv", 'prompt,a\n"hello" you,1\n', "quote.csv, line 2: not CSV: "),
        ("open.csv", 'prompt,a\nyes,1\n"hello,1\n', "open.csv, line 3: not CSV: "),
        ("empty.csv", "", "empty.csv has no rows"),
        ("header.csv", "prompt\n", "header.csv has no rows"),
        ("twice.json", '[{"prompt": "a"}, {"prompt": "b", "x": {"y": 1, "y": 2}}]', "twice.json, row 2: the key 'y' occurs twice"),
        ("cut.json", '[{"prompt": "a"},\n {"prompt": "b"}, {"prom', "cut.json, row 3: not JSON"),
        ("deep.json", f'[{{"prompt": "a"}}, {{"x": {"[" * 5000}', "deep.json, row 2: "),
        ("huge.json", '[{"prompt": "a"}, {"prompt": "b", "x": 1e999}]', "huge.json, row 2: 1e999 is too large"),
    ],
    ids=lambda value: value[:8],
)  # fmt: skip
def test_a_data_file_that_cannot_be_read_is_told_with_its_cause_and_row(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
    said: str,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    (folder / name).write_text(content)
    assert main(command(dataset_name=name)) == 64
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"dar train: {said}")


def test_a_damaged_checkpoint_names_the_one_before(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(save_strategy="steps", save_steps=1)) == 0
    newest, older = (folder / "out" / "checkpoints" / f"step-{n}" for n in (2, 1))
    resumed = command(resume_from_checkpoint="latest", max_steps=3)
    manifest = (newest / "MANIFEST.json").read_bytes()
    for damaged in (b"{", b"[]", manifest.replace(b'"files"', b'"fils"')):
        (newest / "MANIFEST.json").write_bytes(damaged)
        assert main(resumed) == 64
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "MANIFEST.json cannot be read: " in error
        assert error.endswith(f"; resume from the one before, {older.relative_to(folder)}, instead")
        assert "pydantic" not in error
    (newest / "MANIFEST.json").write_bytes(manifest)
    newest.rename(newest.with_name("step-7"))
    assert main(resumed) == 0
    assert " after step 2" in capsys.readouterr().err


def test_the_weights_of_a_model_lie_beside_its_config(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder / "policy"
    (model / "model.safetensors").rename(folder / "elsewhere.safetensors")
    places = {"model.embed_tokens.weight": "../elsewhere.safetensors"}
    index = model / "model.safetensors.index.json"
    for content, said in (
        (json.dumps({"weight_map": places}), "'../elsewhere.safetensors', which is outside of"),
        ("[]", "has no weight_map, so it is no index"),
    ):
        index.write_text(content)
        assert main(command()) == 64
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama", "num_attention_heads": 7}, "'validate_architecture': ValueError: The hidden size (32) is not a multiple"),
        ({"dtype": "nope"}, "the model 'policy' cannot be loaded as a causal language model"),
    ],
)  # fmt: skip
def test_a_fault_of_a_models_config_is_told_as_such(
    folder: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    file = folder / "policy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert main(command()) == 64
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_in_which_nothing_was_rewarded_fails_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(reward_function="judge:silent")) == 1
    said = capsys.readouterr().err
    assert "Trained" not in said
    error = said.strip().splitlines()[-1]
    assert error.startswith("dar train: none of the 2 steps changed the model: ")
    assert "look at what the reward source returns" in error
    assert not (folder / "out" / "model.safetensors").exists()


def test_offline_data_without_any_reward_are_refused_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "completions": ["b", "c"], "rewards": [None, None]}] * 2
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(command(reward_function=None, dataset_name="rows.jsonl")) == 64
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dar train: rows.jsonl: every reward is null")


# --- flags and files ------------------------------------------------------------------------------


def test_every_config_field_is_a_flag_and_the_help_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = make_parser().actions_by_name
    names = {f.name for f in fields(DARConfig) if f.init} | {
        f.name for f in fields(ScriptArguments)
    }
    assert names <= flags.keys()
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    assert ending.value.code == 0
    said = capsys.readouterr().out
    for name in ("alpha", "dar_k", "reward_url", "preset", "dry_run", "learning_rate", "stop"):
        assert f"--{name}" in said
    hidden = ("label_smoothing_factor", "no_eval_do_concat_batches", "parallelism_config")
    for name in hidden:  # they would be refused
        assert f"--{name}" not in said
    assert "Deprecated" not in said


def test_flags_go_before_the_file_and_both_before_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: m\ndataset-name: d\noutput_dir: o\npreset: paper\nlearning_rate: 5e-7\nalpha: 1\n"
        "stop: [END, '--']\nbf16: no\nreward_url: https://a.example/score\nuse_cpu: yes\n"
    )
    line = read_command_line(
        [
            "--config",
            str(file),
            "--alpha",
            "2",
            "--reward-url",
            "https://b.example/x",
            "--reward_url=https://c-d.example",
        ]
    )
    assert line.script.reward_url == ["https://b.example/x", "https://c-d.example"]
    config = config_of(line.config)
    assert (config.alpha, config.learning_rate, config.beta) == (2.0, 5e-7, 0.045)
    assert (config.adv_norm, config.temperature, config.dar_wclip) == ("batch", 0.9, 20.0)
    assert config.stop == ["END", "--"]
    assert config.per_device_train_batch_size == 128
    default = config_of(read_command_line(command()).config)
    assert (default.alpha, default.baseline) == (DARConfig.alpha, "leave_one_out")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("alhpa: 1", "there is no option 'alhpa'"),
        ("config: other.yaml", "there is no option 'config'"),
        ("alpha: [1]", "alpha takes texts and numbers, but it is a list"),
        ("stop: [a, null]", "stop takes texts and numbers, but an item is null"),
        ("stop: [[a]]", "stop takes texts and numbers, but an item is a list"),
        ("report_to: [a, {b: c}]", "report_to takes texts and numbers, but an item is a mapping"),
        ("run_name: {a: b}", "run_name takes texts and numbers, but it is a mapping"),
        ("model_name_or_path: {a: b}", "model_name_or_path takes texts and numbers"),
        (
            "run_name: !!binary aGk=",
            "run_name takes texts and numbers, but it is of the type bytes",
        ),
        ("run_name: !!timestamp 2026-13-01", "is not YAML: month must be in 1..12"),
        (f"deepspeed: {{a: {'1' * 5000}}}", "is not YAML: Exceeds the limit"),
        (f"seed: {'1' * 5000}", "seed: invalid value '1111"),
        (f"stop: {'[' * 3000}", "is nested too deeply"),
        ("max_steps: yes", "max_steps: invalid value 'yes'"),
        (
            "adv_norm: sideways",
            "adv_norm is 'sideways', but must be one of none, per_prompt, batch",
        ),
        ("- alpha", "must hold a mapping"),
        ("alpha: {", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(InvalidRequestError) as error:
        read_command_line(command("--config", str(file)))
    assert said in str(error.value)


def test_the_texts_of_a_file_are_read_as_they_are_written(tmp_path: Path) -> None:
    """To YAML itself they are the numbers 7 and 750, a boolean, a date and the number 1000."""
    file = tmp_path / "run.yaml"
    texts = ["007", "12:30", "yes", "2026-01-02", "1e3", "1_000", "="]
    lines = [f"stop: [{', '.join(texts)}]", "run_name: 010", "save_strategy: no", "bf16: off"]
    lines += ["seed: 010", "chat_template_kwargs: {depth: 3, is_short: no}", "max_grad_norm: 1e-2"]
    file.write_text("\n".join(lines))
    config = read_command_line(command("--config", str(file))).config
    assert config["stop"] == texts
    assert config["run_name"] == "010"
    assert config["chat_template_kwargs"] == {"depth": 3, "is_short": False}
    assert (config["seed"], config["bf16"], config["max_grad_norm"]) == (10, False, 0.01)
    assert getattr(config["save_strategy"], "value", config["save_strategy"]) == "no"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stop", "a", "--stop", "b"], "--stop occurs twice; give all its values at once: --stop A B"),
        (["--seed=1", "--seed=1"], "--seed occurs twice; keep one"),
        (["--save-steps", "1", "--save_steps=2"], "--save_steps occurs twice; keep one"),
        (["--dataloader_pin_memory", "--no_dataloader_pin_memory"], "--dataloader_pin_memory occurs twice"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config occurs twice; keep one"),
    ],
)  # fmt: skip
def test_a_flag_that_occurs_twice_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        read_command_line(command(*arguments))
