"""What is wrong with a command line of `dar train` is said at once, in one sentence."""

import argparse
import json
import subprocess
import sys
from dataclasses import fields
from enum import EnumType
from pathlib import Path

import pytest

from dar.errors import InvalidRequestError
from dar.settings import inherited_environment
from dar.training.script.arguments import MAPPINGS, PATHS, REPEATED, ScriptArguments
from dar.training.script.assembly import config_of
from dar.training.script.exits import in_flags
from dar.training.script.flags import json_object, make_parser
from dar.training.script.usage import QuickParser, config_fields, refused

GIVEN = ["--model_name_or_path=model", "--dataset_name=prompts.jsonl", "--output_dir=out"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, prompts, an adapter and an earlier run."""
    for name in ("model", "used/checkpoints/step-2", "used/checkpoints/step-10", "adapter"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("model/config.json", "used/checkpoints/step-10/MANIFEST.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    (tmp_path / "run.yaml").write_text("learning_rates: 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line_with(arguments: list[str]) -> list[str]:
    """A whole command line, with these arguments in place of those that it has otherwise."""
    names = {argument.partition("=")[0] for argument in arguments}
    return [*(one for one in GIVEN if one.partition("=")[0] not in names), *arguments]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--alhpa", "3"], "unrecognized arguments: --alhpa 3; did you mean --alpha?"),
        (["--alpha", "three"], "argument --alpha: invalid float value: 'three'"),
        (["--alpha", "-1"], "alpha is -1.0, but must be a number, at least 0"),
        (["--dar-k", "0"], "dar_k is 0, but must be a whole number, at least 1"),
        (["--max_steps", "1e3"], "argument --max_steps: invalid int value: '1e3'"),
        (["--adv_norm", "x"], "argument --adv_norm: invalid choice: 'x'"),
        (["--use_peft", "maybe"], "argument --use_peft: 'maybe' is neither true nor false"),
        (["--lora_r", "4"], "--lora_r has no effect without --use_peft"),
        (["--config", "run.yaml"], "run.yaml: there is no option 'learning_rates'"),
        (["--dataset_name", "nothing.jsonl"], "there is no file or folder nothing.jsonl"),
        (["--model_name_or_path", "./nothing"], "--model_name_or_path: there is no folder ./nothing"),
        (["--model_name_or_path", "adapter"], "adapter holds an adapter without its base model"),
        (["--model_name_or_path", "used"], "did you mean its checkpoint used/checkpoints/step-10?"),
        (["--reward_model_name_or_path", "./x"], "--reward_model_name_or_path: there is no folder ./x"),
        (["--reward_url", "localhost:9000"], "--reward_url: not a usable reward URL: it must start with"),
        (["--reward_function", "judge"], "--reward_function is 'judge', but must be module:function"),
        (["--resume_from_checkpoint", "latest"], "there is no checkpoint in out/checkpoints"),
        (["--resume_from_checkpoint", "true"], "there is no checkpoint in out/checkpoints"),
        (
            ["--resume_from_checkpoint", "used"],
            "used is no checkpoint, as it has no MANIFEST.json; give used/checkpoints/step-10",
        ),
        (["--output_dir", "prompts.jsonl"], "prompts.jsonl is a file; give another folder"),
        (["--output_dir", "prompts.jsonl/out"], "prompts.jsonl is a file; give another folder"),
        (["--output_dir", "used"], "--output_dir used holds an earlier run (checkpoints/step-2)"),
        (["--output_dir", "model"], "--output_dir model holds an earlier run (config.json)"),
        (["--output_dir", "model", "--overwrite_output_dir"], "would remove the model model"),
        (
            ["--output_dir", "used", "--overwrite_output_dir", "--resume_from_checkpoint", "latest"],
            "--overwrite_output_dir removes the run that --resume_from_checkpoint would continue",
        ),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_sentence_and_exit_code_64(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert refused(line_with(arguments)) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dar train: ")
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output_dir=~/used"], "/used holds an earlier run (checkpoints/step-2)"),
        (["--config", "~/tilde.yaml"], "/used holds an earlier run (checkpoints/step-2)"),
        (["--output_dir=~/model", "--overwrite_output_dir"], "would remove the model model"),
        (
            ["--model_name_or_path=~/model", "--output_dir=model", "--overwrite_output_dir"],
            "would remove the model ",
        ),
        (
            ["--reward_model_name_or_path=~/model", "--output_dir=~/", "--overwrite_output_dir"],
            "would remove the model ",
        ),
        (
            ["--reward_model_path=~/model", "--output_dir=~/", "--overwrite_output_dir"],
            "would remove the model ",
        ),
        (["--reward_model_path=~/x"], "--reward_model_path: there is no folder"),
        (["--output_dir=~/used", "--resume_from_checkpoint=latest"], None),
        (["--output_dir=used", "--resume_from_checkpoint=~/used/checkpoints/step-10"], None),
        (["--resume_from_checkpoint=~/used"], "/used is no checkpoint"),
        (["--model_name_or_path=~/model", "--dataset_name=~/prompts.jsonl"], None),
        (["--model_name_or_path=~/adapter"], "/adapter holds an adapter without its base model"),
        (["--dataset_name=~/x.jsonl"], "there is no file or folder"),
        (["--output_dir=~nobody-here/out"], "~nobody-here is no folder of a user"),
        (["--dataset_name=~nobody-here.jsonl"], "if the name begins with ~, give ./~nobody-here.jsonl"),
    ],
)  # fmt: skip
def test_a_path_with_a_tilde_is_checked_as_the_folder_that_it_names(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str | None,
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "tilde.yaml").write_text("output_dir: ~/used\n")
    given = [one for one in line_with(arguments) if "--config" not in arguments or one != GIVEN[2]]
    assert refused(given) == (None if said is None else 64)
    if said is not None:
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_every_option_that_takes_a_mapping_is_known_as_one() -> None:
    taking = {name for name, annotation in config_fields().items() if "dict" in annotation}
    assert taking == set(MAPPINGS)
    repeated = {f.name for f in fields(ScriptArguments) if f.metadata.get("action") == "extend"}
    assert repeated == set(REPEATED)


def test_every_option_that_names_a_file_is_known_as_a_path() -> None:
    named = {
        name
        for name in QuickParser().actions_by_name
        if name.endswith(("_dir", "_path", "_file")) or name in {"dataset_name", "config"}
    }
    assert named - {"overwrite_output_dir"} <= set(PATHS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--output_dir", "used", "--resume_from_checkpoint", "latest"],
        ["--output_dir", "used", "--resume_from_checkpoint", "true"],
        ["--output_dir", "used", "--resume_from_checkpoint", "used/checkpoints/step-10"],
        ["--output_dir", "used", "--overwrite_output_dir"],
        ["--output_dir", "used", "--dry_run"],
        ["--model_name_or_path", "somebody/model", "--dataset_name", "somebody/prompts"],
        ["--report_to", "wandb", "tensorboard"],
        ["--help"],
    ],
)
def test_a_command_line_that_may_be_right_passes(folder: Path, arguments: list[str]) -> None:
    assert refused(line_with(arguments)) is None


def test_a_usage_error_costs_no_import_of_torch(folder: Path) -> None:
    environment = inherited_environment(("PATH", "HOME", "LANG", "PYTHONPATH"))
    done = subprocess.run(
        [sys.executable, "-m", "dar.cli", "train", *GIVEN, "--alhpa", "3"],
        cwd=folder,
        env={**environment, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 64
    assert "did you mean --alpha?" in done.stderr
    assert "dar.training.script.usage" in imported
    assert {"torch", "transformers", "datasets"}.isdisjoint(imported)


# --- the quick check and the parser ---------------------------------------------------------------


def example(action: argparse.Action) -> list[str]:
    """Values that the parser accepts."""
    if action.nargs == 0:
        return []
    if action.type is json_object:
        return ['{"rope": true}']
    if isinstance(action.type, EnumType):
        return [next(iter(action.type)).value]
    if action.choices:
        return [str(next(iter(action.choices)))]
    value = {int: "3", float: "0.5", str: "x"}.get(action.type, "true")
    return [value, value] if action.nargs == "+" else [value]


def test_the_quick_check_knows_every_flag_and_is_never_stricter_than_the_parser() -> None:
    whole, quick = make_parser(), QuickParser()
    assert quick.actions_by_name.keys() == whole.actions_by_name.keys() - {"help"}
    for name in quick.actions_by_name:
        if whole.actions_by_name[name].help == argparse.SUPPRESS:
            continue  # it would be refused
        given = [f"--{name}", *example(whole.actions_by_name[name])]
        assert (
            vars(whole.parse_args(given)).keys() == vars(quick.parse_args(given)).keys() == {name}
        )
    for flag in whole._option_string_actions:
        if flag.startswith("--no_"):
            assert vars(whole.parse_args([flag])) == vars(quick.parse_args([flag]))


def test_both_refuse_a_word_in_place_of_a_number() -> None:
    whole, quick = make_parser(), QuickParser()
    numbers = [n for n, action in whole.actions_by_name.items() if action.type in (int, float)]
    assert len(numbers) > 40
    for name in numbers:
        messages = []
        for parser in (whole, quick):
            with pytest.raises(InvalidRequestError) as error:
                parser.parse_args([f"--{name}", "three"])
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_every_value_that_the_help_offers_is_accepted(tmp_path: Path) -> None:
    needed = {"output_dir": str(tmp_path / "out"), "use_cpu": True}
    elsewhere = ("dtype", "ddp_backend")  # of the script; of several processes
    for name, action in make_parser().actions_by_name.items():
        if action.help == argparse.SUPPRESS or name in elsewhere:
            continue
        for choice in action.choices or ():
            more = {"eval_steps": 1} if (name, choice) == ("eval_strategy", "steps") else {}
            config_of({**needed, **more, name: choice})


def test_errors_speak_of_flags_and_not_of_arguments() -> None:
    said = in_flags("train_dataset is missing; give reward_funcs, or rows with 'completion'")
    assert said == (
        "--dataset_name is missing; give --reward_url, --reward_function or "
        "--reward_model_name_or_path, or rows with 'completion'"
    )
    kept = json.dumps(
        {"file": "out/train_dataset", "flag": "--reward_weights", "x": "reward_model=1"}
    )
    assert in_flags(kept) == kept
