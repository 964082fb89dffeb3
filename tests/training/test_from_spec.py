import json
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dar.errors import (
    InvalidRequestError,
    RewardMisconfiguredError,
    RewardUnavailableError,
    TrainingError,
)
from dar.protocol.spec import total_steps
from dar.rewards.server import reward_server
from dar.training import DARTrainer, JobInputs, NullControl, train_job
from dar.training.checkpoint.checkpoint import verify
from dar.training.from_spec import build_trainer, job_config
from dar.training.parallel import deepspeed_config
from fakes import loopback
from fakes.recording_sink import RecordingSink, ScriptedControl

SECRET = "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVoxMjM0NTY="


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """DeepSpeed tries a linker when it is imported, and hushes it where ``sys.stderr`` is: under
    pytest, that is elsewhere.
    """
    if deepspeed_config.is_installed():
        deepspeed_config.load()


@pytest.fixture(scope="module")
def reward_url() -> Iterator[str]:
    """A real reward service on loopback that checks signatures: how much of a completion is w40."""

    @reward_server(secret=SECRET)
    def app(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        return [text.split().count("w40") / 8 for text in completions]

    with loopback.serving(app) as url:
        yield f"{url}/score"


@pytest.fixture
def job(job_inputs: Callable[..., JobInputs], reward_url: str) -> Callable[..., JobInputs]:
    def make(
        *, url: str = reward_url, dar: dict[str, Any] | None = None, **fields: Any
    ) -> JobInputs:
        method = {
            "rewards": {"components": [{"name": "words", "url": url}]},
            "checkpointing": {"every_steps": 2},
        } | (dar or {})
        return job_inputs(method, **{"reward_secret": SECRET} | fields)

    return make


def test_a_stop_while_rewards_are_awaited_finishes_the_step(
    job: Callable[..., JobInputs], sink: RecordingSink
) -> None:
    control = ScriptedControl("stop", lambda: ("waiting_for_reward", 2, None) in sink.phases)
    assert train_job(job(), sink, control) == "drained"
    assert [step for step, *_ in sink.published] == [2, 3]
    assert sorted(sink.reports) == [1, 2, 3]


def test_a_job_trains_against_a_reward_service_to_its_last_checkpoint(
    job: Callable[..., JobInputs], sink: RecordingSink, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_job(job(), sink, NullControl()) == "finished"
    assert [step for step, *_ in sink.published] == [2, 4]
    assert sorted(sink.reports) == sorted(sink.shown) == [1, 2, 3, 4]
    assert {"rewards/words/mean", "time/reward_seconds"} <= sink.reports[1].keys()
    assert sink.phases[0] == ("starting", 0, "loading the model")
    assert [phase for phase, done, _ in sink.phases if done == 2] == [
        "checkpointing",
        "sampling",
        "waiting_for_reward",
        "training",
    ]
    assert sink.phases[-1][:2] == ("checkpointing", 4)
    AutoModelForCausalLM.from_pretrained(sink.published[-1][1])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_script_may_name_a_reward_service_by_its_url(
    train: Callable[..., DARTrainer], reward_url: str, sink: RecordingSink
) -> None:
    train(reward_funcs=reward_url, reward_secret=SECRET, sink=sink, settings={"max_steps": 1})
    assert "rewards/remote/mean" in sink.reports[1]
    with pytest.raises(RewardMisconfiguredError):
        train(reward_funcs=reward_url, sink=sink)  # unsigned


@pytest.mark.parametrize(("seconds", "steps"), [(300.0, [4]), (0.0, [1, 2, 3, 4])])
def test_a_job_gets_a_checkpoint_every_five_minutes_and_at_its_end(
    job: Callable[..., JobInputs],
    sink: RecordingSink,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    steps: list[int],
) -> None:
    inputs = job(dar={"checkpointing": {}})
    assert job_config(inputs).checkpoint_seconds == 300
    monkeypatch.setattr("dar.training.from_spec.CHECKPOINT_SECONDS", seconds)
    assert train_job(inputs, sink, NullControl()) == "finished"
    assert [step for step, *_ in sink.published] == steps


def test_a_job_makes_no_more_passes_than_its_spec_says_although_its_batch_is_larger(
    job_inputs: Callable[..., JobInputs], sink: RecordingSink
) -> None:
    rewards = {"components": [{"name": "length", "kind": "builtin", "fn": "length_penalty",
                               "params": {"target": 3, "unit": "characters"}}]}  # fmt: skip
    hyper = {"n_epochs": 1, "batch_size": 500}
    dar = {"rewards": rewards, "hyperparameters": hyper, "sampling": {"max_new_tokens": 8}}
    inputs = job_inputs(dar)
    steps = total_steps(inputs.spec.dar.hyperparameters, 5)
    train_job(replace(inputs, total_steps=steps), sink, NullControl())
    assert sorted(sink.reports) == [1]
    assert sink.reports[1]["train/epoch"] == 1
    places = {(row.group, row.index) for row in sink.shown[1]}
    per_prompt = len(places) // 5
    every = {(group, index) for group in range(5) for index in range(per_prompt)}
    assert places == every, "all completions are reported"


def test_a_job_without_any_usable_reward_fails_and_shows_its_last_step(
    job_inputs: Callable[..., JobInputs], prompts: list[dict[str, Any]], sink: RecordingSink
) -> None:
    component = {"name": "truth", "kind": "builtin", "fn": "exact_match"}
    rows = [{**row, "ground_truth": None} for row in prompts]
    with pytest.raises(TrainingError, match="none of the 2 steps changed the model") as raised:
        train_job(
            job_inputs({"rewards": {"components": [component]}}, rows=rows, steps=2),
            sink,
            NullControl(),
        )
    assert (raised.value.error_code, raised.value.retryable) == ("no_rewards", False)
    assert sorted(sink.reports) == sorted(sink.shown) == [1, 2]
    (data,) = [data for _, _, data in sink.events if data and data["kind"] == "skipped_steps"]
    assert data["components"] == ["truth"]


def test_a_job_goes_on_from_its_checkpoint_to_the_same_weights(
    job: Callable[..., JobInputs],
    sink: RecordingSink,
    new_sink: type[RecordingSink],
    tmp_path: Path,
) -> None:
    train_job(job(), sink, NullControl())
    again = new_sink()
    resumed = job(work_dir=tmp_path / "again", resume_from=sink.published[0][1])
    assert train_job(resumed, again, NullControl()) == "finished"
    one, two = (load_file(s.published[-1][1] / "model.safetensors") for s in (sink, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(again.reports) == [3, 4]


def test_a_job_whose_last_step_was_done_before_publishes_it_again(
    job: Callable[..., JobInputs],
    sink: RecordingSink,
    new_sink: type[RecordingSink],
    tmp_path: Path,
) -> None:
    train_job(job(), sink, NullControl())
    again = new_sink()
    resumed = job(work_dir=tmp_path / "again", resume_from=sink.published[-1][1])
    assert train_job(resumed, again, NullControl()) == "finished"
    assert again.reports == {}
    step, folder, manifest, _ = again.published[0]
    assert (step, manifest.last_seq) == (4, 0)
    assert verify(folder).files == sink.published[-1][2].files


def test_an_adapter_job_names_its_base_as_a_folder(
    job: Callable[..., JobInputs], sink: RecordingSink
) -> None:
    peft = {"type": "lora", "r": 4}
    assert train_job(job(dar={"peft": peft}), sink, NullControl()) == "finished"
    folder, manifest = sink.published[-1][1:3]
    assert manifest.kind == "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./tiny"


def test_adapters_are_merged_before_training(
    job: Callable[..., JobInputs],
    base: Path,
    sink: RecordingSink,
    new_sink: type[RecordingSink],
    tmp_path: Path,
) -> None:
    train_job(job(dar={"peft": {"type": "lora", "r": 4}}), sink, NullControl())
    adapter = sink.published[-1][1]
    merged = new_sink()
    job_on_it = job(adapters=(adapter,), work_dir=tmp_path / "merged", total_steps=1)
    assert train_job(job_on_it, merged, NullControl()) == "finished"
    trained = load_file(merged.published[-1][1] / "model.safetensors")
    plain = load_file(base / "model.safetensors")
    delta = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.up_proj."
    update = delta[f"{prefix}lora_B.weight"] @ delta[f"{prefix}lora_A.weight"] * (32 / 4)
    name = "model.layers.0.mlp.up_proj.weight"
    assert update.norm() > 0.01
    # one step of AdamW moves no weight by more than the learning rate
    assert (trained[name] - plain[name] - update).abs().max() < 3.1e-3


def test_an_adapter_without_safetensors_is_refused(
    job: Callable[..., JobInputs], sink: RecordingSink, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"has no adapter_model\.safetensors"):
        train_job(job(adapters=(tmp_path,)), sink, NullControl())


@pytest.mark.parametrize(
    "extra",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"_attn_implementation_internal": "evil/kernels"},
        {"text_config": {"trust_remote_code": True}},
    ],
)
def test_a_model_that_brings_code_is_refused(
    job: Callable[..., JobInputs], base: Path, sink: RecordingSink, extra: dict[str, Any]
) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    with pytest.raises(TrainingError, match="run its own code") as caught:
        train_job(job(), sink, NullControl())
    assert caught.value.param == "model"


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_a_model_whose_config_is_no_object_is_refused(
    job: Callable[..., JobInputs], base: Path, sink: RecordingSink, content: str
) -> None:
    (base / "config.json").write_text(content)
    with pytest.raises(TrainingError, match=r"config\.json of the model .* not a JSON object"):
        train_job(job(), sink, NullControl())


def test_a_pickled_or_absent_model_is_refused(
    job: Callable[..., JobInputs], base: Path, sink: RecordingSink, tmp_path: Path
) -> None:
    weights = base / "model.safetensors"
    weights.rename(base / "pytorch_model.bin")
    with pytest.raises(TrainingError, match="cannot be loaded"):
        train_job(job(), sink, NullControl())
    with pytest.raises(TrainingError, match="cannot be loaded"):
        train_job(job(model=tmp_path / "nowhere"), sink, NullControl())


def test_damaged_weights_are_refused(
    job: Callable[..., JobInputs], base: Path, sink: RecordingSink
) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="cannot be loaded"):
        train_job(job(), sink, NullControl())


def test_a_generation_config_that_could_not_be_saved_is_mended_at_the_start(
    job: Callable[..., JobInputs], base: Path, sink: RecordingSink
) -> None:
    path = base / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 3, "temperature": 0.6, "do_sample": False}))
    assert train_job(job(total_steps=1), sink, NullControl()) == "finished"
    saved = json.loads((sink.published[-1][1] / "generation_config.json").read_text())
    assert (saved["temperature"], saved["pad_token_id"]) == (0.6, 1)


def test_a_model_without_tokenizer_is_refused(
    job: Callable[..., JobInputs], base: Path, sink: RecordingSink
) -> None:
    for path in base.glob("token*"):
        path.unlink()
    with pytest.raises(TrainingError, match="no tokenizer"):
        train_job(job(), sink, NullControl())


def test_a_bad_row_is_named(
    job: Callable[..., JobInputs], sink: RecordingSink, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "w10"}\n{"text": "w10"}\n')
    with pytest.raises(InvalidRequestError, match="row 2"):
        train_job(job(training_file=path), sink, NullControl())


def test_an_unreachable_reward_service_is_waited_for_visibly_and_then_reported(
    job: Callable[..., JobInputs], sink: RecordingSink
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/score"
        retry = {"attempts": 2, "base": 0.01}
        component = {"name": "words", "url": url, "retry": retry}
        with pytest.raises(RewardUnavailableError):
            train_job(job(dar={"rewards": {"components": [component]}}), sink, NullControl())
    messages = [message for phase, _, message in sink.phases if phase == "waiting_for_reward"]
    assert any(message and url.removesuffix("/score") in message for message in messages)


@pytest.mark.parametrize("request_", ["cancel", "drain"])
def test_a_stop_before_the_first_step_writes_nothing(
    job: Callable[..., JobInputs],
    new_control: Callable[..., Any],
    sink: RecordingSink,
    request_: Any,
) -> None:
    endings = {"cancel": "cancelled", "drain": "drained"}
    control = new_control(request_, lambda: True)
    assert train_job(job(), sink, control) == endings[request_]
    assert (sink.published, sink.reports) == ([], {})


def test_a_spec_becomes_arguments_of_the_trainer(job: Callable[..., JobInputs]) -> None:
    hyper = {
        "alpha": 0.2, "beta": 0.4, "dar_k": 3, "dar_wclip": 9, "adv_norm": "batch", "learning_rate": 1e-4,
        "batch_size": 5, "max_steps": 100, "warmup_steps": 6, "lr_scheduler_type": "constant",
        "weight_decay": 0.01, "max_grad_norm": 0, "optim": "adafactor", "adam_beta1": 0.8, "adam_beta2": 0.9,
    }  # fmt: skip
    sampling = {"temperature": 0.9, "top_p": 0.8, "top_k": 7, "min_p": 0.1, "stop": ["."]}
    overlap = {"overlap": "one_step", "order": "completion"}
    dar = {"hyperparameters": hyper, "sampling": sampling, "checkpointing": {}, **overlap}
    config = job_config(job(dar=dar, total_steps=100))
    for name, value in (hyper | sampling | overlap).items():
        if name not in ("batch_size", "lr_scheduler_type"):
            assert getattr(config, name) == value, name
    assert config.per_device_train_batch_size == 5
    assert config.lr_scheduler_type == "constant_with_warmup"
    assert (config.save_steps, config.seed, config.bf16) == (100, 7, torch.cuda.is_available())


@pytest.mark.parametrize("optim", ["adamw", "adafactor"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_optimizer_and_precision_resumes_exactly(
    job: Callable[..., JobInputs],
    new_sink: type[RecordingSink],
    tmp_path: Path,
    optim: str,
    precision: str,
) -> None:
    hyper = {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "optim": optim}
    dar = {
        "hyperparameters": hyper,
        "precision": precision,
        "checkpointing": {"every_steps": 1},
    }
    whole, rest = new_sink(), new_sink()
    train_job(job(dar=dar, total_steps=2), whole, NullControl())
    first = whole.published[0][1]
    train_job(
        job(dar=dar, total_steps=2, resume_from=first, work_dir=tmp_path / "rest"),
        rest,
        NullControl(),
    )
    one, two = (load_file(s.published[-1][1] / "model.safetensors") for s in (whole, rest))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}


def test_a_job_is_evaluated_on_its_validation_file_and_at_its_last_step(
    job: Callable[..., JobInputs], sink: RecordingSink, tmp_path: Path
) -> None:
    path = tmp_path / "validation.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in (11, 12, 13)))
    evaluation = {"every_steps": 3, "max_prompts": 2}
    dar = {"evaluation": evaluation, "checkpointing": {"every_steps": 9, "keep_best": True}}
    inputs = job(dar=dar, validation_file=path)
    assert train_job(inputs, sink, NullControl()) == "finished"
    found = [step for step, values in sink.reports.items() if "eval_dar/rewards_mean" in values]
    assert found == [3, 4]
    # With keep_best, each evaluated step gets a checkpoint, after its evaluation.
    assert [step for step, *_ in sink.published] == [3, 4]
    phases = [phase for phase, step, _ in sink.phases if step == 3]
    assert phases.index("evaluating") < phases.index("checkpointing")
    assert build_trainer(inputs, sink, NullControl()).eval_dataset == [
        {"prompt": "w11"},
        {"prompt": "w12"},
    ]
    assert "eval_rewards/words/mean" in sink.reports[4]
    path.write_text('{"prompt": "w10"}\n{"text": "w10"}\n')
    with pytest.raises(InvalidRequestError, match="row 2") as caught:
        train_job(inputs, sink, NullControl())
    assert caught.value.param == "validation_file"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU, so float16 is allowed")
def test_float16_is_refused_where_the_worker_has_no_gpu(
    job: Callable[..., JobInputs], sink: RecordingSink
) -> None:
    with pytest.raises(TrainingError, match="needs a GPU") as caught:
        train_job(job(dar={"precision": "fp16"}), sink, NullControl())
    assert caught.value.param == "method.dar.precision"
