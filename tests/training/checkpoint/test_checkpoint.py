import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

from dar.errors import CheckpointError, TrainingError
from dar.protocol.checkpoints import Manifest
from dar.protocol.reward_spec import Rewards
from dar.training import DARTrainer
from dar.training.checkpoint.checkpoint import publish, verify
from dar.training.checkpoint.fingerprint import differences, environment, reward_terms
from fakes import tiny_models
from fakes.recording_sink import RecordingSink

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}


def lora() -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs `trained` leaves it for the others."""
    return tmp_path_factory.mktemp("kept") / "checkpoints"


@pytest.fixture
def trained(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink], kept: Path, tmp_path: Path
) -> Path:
    """A folder of checkpoints of steps 2, 4 and 6, where `train` would write them."""
    if not kept.exists():
        sink = new_sink()
        train(sink=sink, settings={**SAVING, "output_dir": str(kept.parent)})
        assert sink.published[0][1].parent == kept
    return shutil.copytree(kept, tmp_path / "out" / "checkpoints")


SLOW = pytest.mark.slow  # the same at another step


@pytest.mark.parametrize("is_adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("step", [2, pytest.param(4, marks=SLOW)])
def test_a_resumed_run_ends_bit_identical_to_an_undisturbed_one(
    train: Callable[..., DARTrainer],
    new_sink: type[RecordingSink],
    tmp_path: Path,
    is_adapter: bool,
    step: int,
) -> None:
    undisturbed, resumed = new_sink(), new_sink()
    peft = {"peft_config": lora()} if is_adapter else {}
    train(sink=undisturbed, settings=SAVING, **peft)
    first = undisturbed.published[0][1].parent
    other = {**SAVING, "output_dir": str(tmp_path / "other")}
    torch.manual_seed(99)
    train(first / f"step-{step}", sink=resumed, settings=other, **peft)

    last, again = undisturbed.published[-1], resumed.published[-1]
    assert (last[0], again[0]) == (6, 6)
    names = [file.name for file in last[2].files if file.name.endswith(".safetensors")]
    assert len(names) == 2
    for name in names:
        one, two = load_file(last[1] / name), load_file(again[1] / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    before, after = undisturbed.deterministic_reports(), resumed.deterministic_reports()
    assert after == {number: before[number] for number in after}
    assert sorted(after) == ([3, 6] if step == 2 else [6])
    assert resumed.events == []


def test_a_checkpoint_loads_like_any_model(trained: Path) -> None:
    folder = trained / "step-6"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 3
    assert model.config.use_cache
    assert tokenizer.decode(tokenizer("w10 w11")["input_ids"]) == "w10 w11"


@pytest.mark.parametrize("is_adapter", [False, True], ids=["full", "lora"])
def test_an_end_token_of_the_config_alone_ends_completions_and_is_published(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
    is_adapter: bool,
) -> None:
    model = make_model()
    model.config.eos_token_id = 40
    assert model.generation_config.eos_token_id == 3
    written: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        written.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    peft = {"peft_config": lora()} if is_adapter else {}
    settings = {"max_steps": 1, "save_strategy": "steps", "dar_k": 32, "max_new_tokens": 20}
    train(model=model, sink=sink, reward_funcs=reward, settings=settings, **peft)
    assert any(ids[-1] == 40 for ids in written)
    assert all(40 not in ids[:-1] for ids in written)
    published = GenerationConfig.from_pretrained(sink.published[-1][1])
    assert published.eos_token_id == [3, 40]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for it
def test_an_adapter_checkpoint_names_its_base_as_it_was_given(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    train(model=str(base), sink=sink, settings={"save_strategy": "steps"}, peft_config=lora())
    folder = sink.published[-1][1]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert sink.published[-1][2].kind == "adapter"
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in model.named_parameters())


def test_a_checkpoint_holds_tensors_and_json_and_no_pickle(trained: Path) -> None:
    for path in trained.rglob("*"):
        if path.is_file():
            assert path.suffix in {".safetensors", ".json", ".jinja", ".md"}, path
            if path.suffix == ".json":
                json.loads(path.read_text())


def test_the_manifest_describes_every_file(
    train: Callable[..., DARTrainer], sink: RecordingSink, tmp_path: Path
) -> None:
    train(sink=sink, settings=SAVING)
    step, folder, manifest, sha256 = sink.published[1]
    assert (step, folder) == (4, tmp_path / "out" / "checkpoints" / "step-4")
    body = (folder / "MANIFEST.json").read_bytes()
    assert hashlib.sha256(body).hexdigest() == sha256
    assert Manifest.model_validate_json(body) == manifest == verify(folder)
    names = [file.name for file in manifest.files]
    assert names == sorted(names)
    assert {"model.safetensors", "resume/optimizer.safetensors", "resume/state.json"} < set(names)
    assert manifest.last_seq == 2  # the report of step 3 and its samples
    assert manifest.metrics == sink.reports[3]


def damage(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "altered":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif kind == "missing":
        (folder / "resume" / "state.json").unlink()
    elif kind == "foreign":
        (folder / "rng_state.pth").write_bytes(b"")
    elif kind == "no manifest":
        (folder / "MANIFEST.json").unlink()
    elif kind == "broken manifest":
        (folder / "MANIFEST.json").write_text("{")
    else:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        manifest["config_sha256"] = "0" * 64
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def test_a_damaged_or_foreign_checkpoint_is_refused(
    train: Callable[..., DARTrainer], trained: Path, tmp_path: Path
) -> None:
    expected = {
        "altered": "model.safetensors was altered",
        "cut": "model.safetensors was altered",
        "missing": "resume/state.json is missing",
        "foreign": "rng_state.pth does not belong",
        "no manifest": "is no checkpoint",
        "broken manifest": "cannot be read",
        "other config": "other hyperparameters, data or base weights",
    }
    for kind, message in expected.items():
        copy = tmp_path / kind
        shutil.copytree(trained / "step-4", copy)
        damage(copy, kind)
        with pytest.raises(CheckpointError, match=message):
            train(copy, settings=SAVING)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beta": 0.4}, "beta was 0.3 and is 0.4"),
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"learning_rate": 1e-4}, "learning_rate was 0.003 and is 0.0001"),
        ({"dar_k": 2}, "dar_k was 4 and is 2"),
        ({"max_steps": 5}, "max_steps was 6 and is 5"),
        ({"max_steps": 7, "seed": 1}, "seed was 42 and is 1"),
        ({"gradient_accumulation_steps": 4}, r"prompts_per_step was 3 and is 12 \(per_device_"),
    ],
)
def test_a_resume_under_another_configuration_names_the_arguments(
    train: Callable[..., DARTrainer], trained: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        train(trained / "step-2", settings={**SAVING, **change})


def test_a_resumed_run_may_be_longer_and_ends_as_one_that_was_long_from_the_start(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink], tmp_path: Path
) -> None:
    short, longer, whole = new_sink(), new_sink(), new_sink()
    settings = {**SAVING, "lr_scheduler_type": "constant", "max_steps": 2, "save_steps": 2}
    train(sink=short, settings=settings)
    longest = {**settings, "max_steps": 4}
    train(short.published[0][1], sink=longer, settings=longest)
    (event,) = longer.events
    assert "goes on to step 4; the checkpoint's was to end at step 2" in event[1]
    train(sink=whole, settings={**longest, "output_dir": str(tmp_path / "whole")})
    one, two = (load_file(s.published[-1][1] / "model.safetensors") for s in (longer, whole))
    assert [s.published[-1][0] for s in (longer, whole)] == [4, 4]
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_longer_run_follows_its_own_schedule_at_once(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink]
) -> None:
    short, longer = new_sink(), new_sink()
    settings = {**SAVING, "lr_scheduler_type": "linear", "logging_steps": 1, "save_steps": 1}
    train(sink=short, settings={**settings, "max_steps": 2})  # its learning rate ends at 0
    trainer = train(True, sink=longer, settings={**settings, "max_steps": 8})
    assert trainer.state.global_step == 8
    before = load_file(short.published[-1][1] / "model.safetensors")
    after = load_file(longer.published[0][1] / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert [longer.reports[step]["train/learning_rate"] for step in (3, 8)] == pytest.approx(
        [3e-3 * 6 / 8, 3e-3 / 8]
    )


def test_a_resume_under_other_data_or_weights_is_refused(
    train: Callable[..., DARTrainer],
    trained: Path,
    make_model: Callable[..., LlamaForCausalLM],
    prompts: list[dict[str, Any]],
) -> None:
    with pytest.raises(CheckpointError, match="arguments: the training data have other rows;"):
        train(trained / "step-2", settings=SAVING, train_dataset=prompts[:4])
    with pytest.raises(CheckpointError, match="arguments: the base model has other weights;"):
        train(trained / "step-2", settings=SAVING, model=make_model(1))


def test_a_refused_resume_names_the_reasons_alone(
    train: Callable[..., DARTrainer], trained: Path, prompts: list[dict[str, Any]]
) -> None:
    longer = {**SAVING, "max_steps": 8}
    with pytest.raises(CheckpointError, match="arguments: the training data have other rows;"):
        train(trained / "step-2", settings=longer, train_dataset=prompts[:4])
    with pytest.raises(CheckpointError, match="arguments: an adapter was not trained; resume"):
        train(trained / "step-2", settings=longer, peft_config=lora())
    same: dict[str, Any] = {"adapter": None, "rows": "", "base": "", "rewards": []}
    budget = {"kl_budget": 1.0, "temperature": 1.0, "seed": 0}
    chosen = {"alpha": 0.1, "beta": 0.3, "temperature": 0.5, "seed": 0}
    there, here = ({**same, "config": config} for config in (budget, chosen))
    assert differences(there, here) == {"temperature": "temperature was 1.0 and is 0.5"}
    given = {**same, "config": {**chosen, "temperature": 1.0}}
    assert differences(there, given).keys() == {"kl_budget", "alpha", "beta"}


def test_a_resume_with_another_tokenizer_or_other_frozen_weights_is_refused(
    train: Callable[..., DARTrainer], trained: Path, make_model: Callable[..., LlamaForCausalLM]
) -> None:
    templated, larger = tiny_models.tokenizer(), tiny_models.tokenizer()
    templated.chat_template = "{{ messages[0]['content'] }}"
    larger.add_tokens(["w63w63"])
    frozen = make_model()
    frozen.model.requires_grad_(requires_grad=False)
    for change, said in (
        ({"processing_class": templated}, "the tokenizer has another chat template"),
        ({"processing_class": larger}, "the tokenizer has another vocabulary"),
        ({"model": frozen}, "other weights of the model are trained, and others frozen"),
    ):
        with pytest.raises(CheckpointError, match=f"with other arguments: {said}"):
            train(trained / "step-2", settings=SAVING, **change)


def test_a_resume_under_other_reward_terms_is_refused(
    train: Callable[..., DARTrainer], trained: Path
) -> None:
    def renamed(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(CheckpointError, match=r"weight of the reward \w+ was 1.0 and is 2.0"):
        train(trained / "step-2", settings=SAVING, reward_weights=[2.0])
    with pytest.raises(CheckpointError, match=r"the rewards were \w+ and are renamed"):
        train(trained / "step-2", settings=SAVING, reward_funcs=renamed)


def test_reward_terms_leave_out_where_rewards_are_computed() -> None:
    component = {"name": "a", "url": "https://one.example/r", "clip": [0, 1]}
    there = Rewards.model_validate({"components": [component]})
    moved = Rewards.model_validate({"components": [component | {"url": "https://two.example/r"}]})
    assert reward_terms(there, None) == reward_terms(moved, None)
    clipped = Rewards.model_validate({"components": [component | {"clip": [0, 2]}]})
    assert reward_terms(there, None) != reward_terms(clipped, None)
    urls = ["https://one.example/r", "https://two.example/r"]
    assert reward_terms(urls[0], None) == reward_terms(urls[1], [1])


def test_empty_steps_are_counted_on_across_a_resume(
    train: Callable[..., DARTrainer], sink: RecordingSink, new_sink: type[RecordingSink]
) -> None:
    def skip(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    settings = {**SAVING, "save_steps": 1, "logging_steps": 1}
    with pytest.raises(TrainingError, match="no usable rewards"):
        train(sink=sink, reward_funcs=skip, settings=settings)
    resumed = new_sink()
    with pytest.raises(TrainingError, match="no usable rewards"):
        train(sink.published[1][1], sink=resumed, reward_funcs=skip, settings=settings)
    assert [data["step"] for _, _, data in resumed.events if data["kind"] == "empty_step"] == [3]


def test_a_resume_on_another_machine_says_so(
    train: Callable[..., DARTrainer],
    trained: Path,
    sink: RecordingSink,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = environment(torch.device("cpu")) | {"threads": "64"}
    monkeypatch.setattr("dar.training.checkpoint.resume.environment", lambda _: elsewhere)
    train(trained / "step-4", sink=sink, settings=SAVING)
    assert [data["changed"] for _, _, data in sink.events] == [["threads was 1 and is 64"]]


def test_resuming_from_true_takes_the_newest_checkpoint_as_in_transformers(
    train: Callable[..., DARTrainer], trained: Path, new_sink: type[RecordingSink]
) -> None:
    resumed = new_sink()
    trainer = train(True, sink=resumed, settings={**SAVING, "max_steps": 7})
    assert trainer.state.global_step == 7
    assert set(resumed.reports) == {7}
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        train(True, settings={**SAVING, "output_dir": str(trained / "elsewhere")})


def test_the_checkpoint_to_resume_from_may_be_named_from_the_users_folder(
    train: Callable[..., DARTrainer], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(trained))
    for given in ("~/step-6", Path("~/step-6")):
        assert train(given, settings=SAVING).state.global_step == 6
    with pytest.raises(CheckpointError, match="~nobody-here is no folder of a user"):
        train("~nobody-here/step-6", settings=SAVING)


def test_only_the_newest_checkpoints_are_kept_when_asked_for(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    train(sink=sink, settings={**SAVING, "save_total_limit": 2})
    folder = sink.published[0][1].parent
    assert sorted(path.name for path in folder.iterdir()) == ["step-4", "step-6"]


def test_checkpoints_of_another_run_in_the_same_folder_are_left_alone(
    train: Callable[..., DARTrainer], sink: RecordingSink, new_sink: type[RecordingSink]
) -> None:
    train(settings={**SAVING, "max_steps": 4})
    shorter = {**SAVING, "max_steps": 2, "save_steps": 1, "save_total_limit": 1}
    train(sink=sink, settings=shorter)
    folder = sink.published[0][1].parent
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4"]
    assert verify(folder / "step-2") == sink.published[-1][2]
    again = new_sink()
    train(folder / "step-2", sink=again, settings=shorter)
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4"]


def test_a_failed_write_leaves_no_checkpoint_and_leftovers_are_swept(
    train: Callable[..., DARTrainer], tmp_path: Path
) -> None:
    root = tmp_path / "out" / "checkpoints"

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        publish(root, 1, write=write, manifest=lambda _: pytest.fail("never reached"))
    assert list(root.iterdir()) == []
    (root / ".tmp-step-9-1").mkdir()
    train()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("when", "step"), [("sampling", 2), ("waiting_for_reward", 2), ("training", 3), ("edge", 3)]
)
def test_draining_ends_at_a_step_edge_with_a_checkpoint(
    train: Callable[..., DARTrainer],
    new_control: Callable[..., Any],
    sink: RecordingSink,
    when: str,
    step: int,
) -> None:
    async def score(completions: list[str], **columns: Any) -> list[float]:
        is_hanging = when == "waiting_for_reward" and sink.phases[-1][1] == 2
        await asyncio.sleep(60 * is_hanging)
        return [float(len(text)) for text in completions]

    def is_time() -> bool:
        return 3 in sink.reports if when == "edge" else (when, 2, None) in sink.phases

    control = new_control("drain", is_time)
    trainer = train(sink=sink, control=control, settings={"max_steps": 6}, reward_funcs=score)
    assert trainer.stopped_by == "drain"
    assert [published[0] for published in sink.published] == [step]
    assert verify(sink.published[0][1]).step == step
    assert max(sink.reports) == step


def test_cancelling_leaves_at_once_and_writes_nothing(
    train: Callable[..., DARTrainer], new_control: Callable[..., Any], sink: RecordingSink
) -> None:
    control = new_control("cancel", lambda: 2 in sink.reports)
    trainer = train(sink=sink, control=control, settings={**SAVING, "logging_steps": 1})
    assert trainer.stopped_by == "cancel"
    assert [step for step, *_ in sink.published] == [2]
    assert max(sink.reports) == 2
