"""A downloaded adapter, used and merged by a user who has nothing but its files and the base."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dar.cli.main import main
from dar.training import DARTrainer, JobInputs, NullControl, train_job
from dar.training.model.loading import add_adapter, load_model
from fakes import tiny_models
from fakes.recording_sink import RecordingSink

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
ADAPTER = {"peft": {"type": "lora", "r": 4}}
ROWS = [
    {"prompt": f"w{10 + n}", "completions": ["w40 w41", "w50 w51"], "rewards": [1, 0]}
    for n in range(3)
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:::peft"),  # its advice on options
]


def lora(**options: Any) -> LoraConfig:
    given = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**given | options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(4, 60).unsqueeze(0)).logits


def merge(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """``dar merge`` with these arguments; its exit code."""
    monkeypatch.setattr(sys, "argv", ["dar", "merge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def run_card(folder: Path, **names: str) -> dict[str, Any]:
    """Run the first Python example of a model card."""
    text = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    body = re.sub(r'folder = "[^"]*"', f"folder = {str(folder)!r}", code[1])
    for given, wanted in names.items():
        body = body.replace(f'"{given}"', repr(wanted))
    variables: dict[str, Any] = {}
    exec(body, variables)
    return variables


@pytest.fixture
def published(
    job_inputs: Callable[..., JobInputs], sink: RecordingSink, tmp_path: Path
) -> Callable[..., Path]:
    """The last checkpoint of a job with an adapter, as it is downloaded."""

    def run(**fields: Any) -> Path:
        train_job(job_inputs(ADAPTER, rows=ROWS, steps=1, **fields), sink, NullControl())
        return sink.published[-1][1]

    return run


@pytest.fixture(scope="module")
def saved_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `base` that has not been trained."""
    folder = tmp_path_factory.mktemp("adapters") / "fresh"
    add_adapter(tiny_models.policy(), lora()).save_pretrained(folder)
    return folder


def test_the_files_of_an_adapter_name_a_base_that_no_stranger_can_provide(
    published: Callable[..., Path],
) -> None:
    folder = published()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./tiny"
    assert config["revision"] is None
    with pytest.raises(HFValidationError):
        validate_repo_id(config["base_model_name_or_path"])


def test_an_adapter_of_a_hub_model_names_it(
    published: Callable[..., Path],
    job_inputs: Callable[..., JobInputs],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    tiny_models.save(tiny_models.policy(), tmp_path / "team" / "tiny")
    monkeypatch.chdir(tmp_path)
    spec = job_inputs(ADAPTER, rows=ROWS, steps=1).spec
    folder = published(spec=spec.model_copy(update={"model": "team/tiny"}), model="team/tiny")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "team/tiny"
    # as it is the hub's name for it, no base is needed to load or to merge it
    assert merge(monkeypatch, folder, "-o", "merged") == 0
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(loaded), logits(load_model(tmp_path / "merged")), atol=1e-4)


def test_the_card_of_a_checkpoint_is_ours_and_no_file_has_a_path_of_the_server(
    published: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = published()
    card = (folder / "README.md").read_text()
    assert "# ftjob-1" in card
    assert "Direct Advantage Regression" in card
    for file in folder.rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_the_card_of_full_weights_is_ours_too(
    job_inputs: Callable[..., JobInputs], sink: RecordingSink
) -> None:
    train_job(job_inputs({}, rows=ROWS, steps=1), sink, NullControl())
    folder = sink.published[-1][1]
    assert isinstance(run_card(folder)["model"], nn.Module)


def test_a_user_with_the_base_loads_and_merges_an_adapter_as_its_card_says(
    published: Callable[..., Path],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = published()
    monkeypatch.chdir(base.parent)  # where ./tiny is the base
    loaded = run_card(folder)["model"]
    assert not torch.allclose(logits(loaded), logits(load_model(base)), atol=1e-4)
    monkeypatch.chdir(tmp_path)
    assert merge(monkeypatch, folder, "--base", base, "-o", "merged") == 0
    assert capsys.readouterr().out.strip() == "merged"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(whole), logits(loaded), atol=1e-5)
    assert {file.name for file in (tmp_path / "merged").iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip


def test_the_guide_loads_an_adapter_as_its_user_has_it(
    published: Callable[..., Path], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published()
    monkeypatch.chdir(base.parent)
    (expression,) = re.findall(r"`(PeftModel\.from_pretrained\(.*?\))`", GUIDE.read_text())
    code = expression.replace("my-model", "tiny").replace('"weights"', repr(str(folder)))
    names = {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    loaded = eval(code, names)
    assert torch.equal(logits(loaded), logits(run_card(folder)["model"]))


def test_a_merged_model_keeps_the_number_format_of_its_base(
    published: Callable[..., Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published()
    load_model(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert merge(monkeypatch, folder, "--base", tmp_path / "half", "-o", tmp_path / "merged") == 0
    assert load_model(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{adapter}"], "names the base model './tiny', which is no folder here; give"),
        (["{base}", "--base", "{base}"], "is a whole model, so there is nothing to merge"),
        (["{empty}"], "give the folder of a downloaded adapter"),
        (["{adapter}", "--base", "{adapter}"], "is an adapter, not a whole model"),
        (["{adapter}", "--base", "{other}"], "does not fit the model"),
        (["{adapter}", "--base", "{base}", "-o", "{empty}"], "exists already"),
        (["{adapter}", "--base", "/nope"], "from safetensors: there is no such folder"),
        (["{adapter}", "--base", "~nosuchuser/x"], "~nosuchuser/x is in the home of no user"),
        (["{adapter}", "--base", "{base}", "-o", "{empty}/x/.."], "cannot be made"),
    ],
    ids=[
        *("no base", "whole", "empty", "base is an adapter", "another base", "output exists"),
        *("base is not there", "home of nobody", "dots"),
    ],
)
def test_what_cannot_be_merged_is_said_in_one_line(
    arguments: list[str],
    message: str,
    published: Callable[..., Path],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    other = tiny_models.save(tiny_models.policy(hidden_size=16), tmp_path / "other")
    places = {
        "adapter": published(), "base": base, "empty": tmp_path / "empty", "other": other,
    }  # fmt: skip
    given = [argument.format(**places) for argument in arguments]
    output = [] if "-o" in given else ["-o", tmp_path / "merged"]
    assert merge(monkeypatch, *given, *output) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "merged").exists()


def weights_of(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], Any]:
    """Damages the weights of an adapter."""

    def damage(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return damage


def config_with(**values: Any) -> Callable[[Path], Any]:
    """Changes the config of an adapter."""

    def damage(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def written(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "half of its weights": (weights_of(lambda own: dict(list(own.items())[:2])), "lacks "),
    "no weights": (weights_of(lambda own: {}), "lacks "),
    "other names": (weights_of(lambda own: {f"x.{k}": v for k, v in own.items()}), "lacks "),
    "one more": (weights_of(lambda own: own | {"x": torch.ones(1)}), "has unknown weights"),
    "other shapes": (weights_of(lambda own: {k: v[:1] for k, v in own.items()}), "size mismatch"),
    "NaN": (
        weights_of(lambda own: {k: v * math.nan for k, v in own.items()}),
        "weights that are NaN",
    ),
    "too large": (
        weights_of(lambda own: {k: v + 1e30 for k, v in own.items()}),
        "weights that are NaN",
    ),
    "cut off": (written(WEIGHTS, b"xx"), "does not fit the model, or its files are damaged"),
    "config cut off": (written(CONFIG, b"{"), "is not the config of an adapter"),
    "config in no encoding": (written(CONFIG, b"\xff{}"), "is not the config of an adapter"),
    "config a list": (written(CONFIG, b"[]"), "it holds no JSON object"),
    "config without a kind": (written(CONFIG, b'{"r": 8}'), "its peft_type is None"),
    "kind of no adapter": (config_with(peft_type=["LORA"]), "its peft_type is ['LORA']"),
    "base is a number": (config_with(base_model_name_or_path=7), "is no text"),
    "rank is a text": (config_with(r="eight"), "sets r='eight'"),
    "targets are a number": (config_with(target_modules=7), "the adapter"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_is_refused_and_nothing_is_written(
    name: str,
    saved_adapter: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, message = DAMAGES[name]
    folder = shutil.copytree(saved_adapter, tmp_path / "damaged")
    damage(folder)
    assert merge(monkeypatch, folder, "--base", base, "-o", tmp_path / "merged") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dar: ")
    assert message in line
    assert [one.name for one in tmp_path.iterdir() if "merged" in one.name] == []


def test_a_sum_beyond_the_number_format_of_the_base_is_not_written(
    saved_adapter: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(saved_adapter, tmp_path / "large")
    weights_of(lambda own: {k: v + 1e3 for k, v in own.items()})(folder)
    half = tmp_path / "half"
    load_model(base, dtype=torch.float16).save_pretrained(half)
    tiny_models.tokenizer().save_pretrained(half)
    assert merge(monkeypatch, folder, "--base", half, "-o", tmp_path / "merged") == 1
    assert "has weights that torch.float16 cannot hold" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_is_not_written_where_no_folder_can_be(
    saved_adapter: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "merged"
    assert merge(monkeypatch, saved_adapter, "--base", base, "-o", output) == 1
    assert "cannot be made: Not a directory; give another folder" in capsys.readouterr().err


def test_a_tilde_that_no_shell_has_replaced_is_the_home_folder(
    saved_adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved_adapter, tmp_path / "adapter")
    near = f"~/{base.relative_to(tmp_path)}"
    assert merge(monkeypatch, "~/adapter", "--base", near, "-o", "~/merged") == 0
    assert (tmp_path / "merged" / "config.json").is_file()
    assert not (tmp_path / "~").exists()


def test_an_adapter_is_no_model_to_start_from(
    published: Callable[..., Path], train: Callable[..., DARTrainer]
) -> None:
    folder = published()
    with pytest.raises(Exception, match=f"dar merge {folder} -o FOLDER"):
        train(model=str(folder))


SLOW = pytest.mark.slow  # a run for each; the kinds that differ most are in the fast lane

TIED = {
    "lm_head": {"target_modules": ["lm_head"]},
    "embed_tokens": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "both tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "DoRA": {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
    "saved lm_head": {"modules_to_save": ["lm_head"]},
    "saved embed_tokens": {"modules_to_save": ["embed_tokens"]},
    "saved tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": list(range(4, 60))},
    "attention": {},
}


@pytest.mark.parametrize(
    "name",
    [
        one if one in ("both tied", "saved lm_head") else pytest.param(one, marks=SLOW)
        for one in TIED
    ],
)
def test_an_adapter_of_tied_embeddings_merges_into_the_trained_model(
    name: str,
    train: Callable[..., DARTrainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.policy(scale=0.3, tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight[1] = 0.1  # the padding token's; DoRA divides by the norm of each row
    base = tiny_models.save(model, tmp_path / "base")
    settings = {"max_steps": 2, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 2}
    trainer = train(model=load_model(base), peft_config=lora(**TIED[name]), settings=settings)
    trained = logits(trainer.model)
    assert (trained - logits(load_model(base))).abs().max() > 1e-2
    folder = trainer.checkpoints / "step-2"
    assert merge(monkeypatch, folder, "--base", base, "-o", tmp_path / "merged") == 0
    merged = load_model(tmp_path / "merged")
    assert (logits(merged) - trained).abs().max() < 1e-3
    # what stays the same in both layers is not saved twice
    is_tied = merged.config.tie_word_embeddings
    assert is_tied == torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert is_tied or name not in ("attention", "saved tied", "tokens", "both tied")


GROWN = {
    "attention": {},
    "tokens": {"trainable_token_indices": [10, 64, 65]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("is_tied", [pytest.param(False, marks=SLOW), True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "name", [one if one == "tokens" else pytest.param(one, marks=SLOW) for one in GROWN]
)
def test_tokens_that_were_added_before_an_adapter_are_published_with_it(
    name: str,
    is_tied: bool,
    train: Callable[..., DARTrainer],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = tiny_models.policy(scale=0.3, tie_word_embeddings=is_tied)
    base = tiny_models.save(small, tmp_path / "base")
    grown_tokenizer = type(tokenizer).from_pretrained(base)
    grown_tokenizer.add_tokens(["w64", "w65"])
    settings = {"max_steps": 2, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 1}

    def run(resume: Path | None = None, **more: Any) -> DARTrainer:
        torch.manual_seed(0)
        model = load_model(base)
        model.resize_token_embeddings(66, mean_resizing=False)
        return train(
            resume,
            model=model,
            processing_class=grown_tokenizer,
            peft_config=lora(**GROWN[name]),
            settings=settings | more,
        )

    trainer = run()
    folder = trainer.checkpoints / "step-2"

    def new_logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(torch.tensor([[10, 64, 65, 20, 64]])).logits

    trained = new_logits(trainer.model)
    assert trained.shape[-1] == 66
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert (new_logits(loaded) - trained).abs().max() < 1e-4
    assert (
        new_logits(run_card(folder, **{"./base": str(base)})["model"]) - trained
    ).abs().max() < 1e-4
    assert merge(monkeypatch, folder, "--base", base, "-o", tmp_path / "merged") == 0
    assert (new_logits(load_model(tmp_path / "merged")) - trained).abs().max() < 1e-3
    resumed = run(trainer.checkpoints / "step-1", output_dir=str(tmp_path / "again"))
    assert torch.equal(new_logits(resumed.model), trained)
