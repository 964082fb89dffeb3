"""DeepSpeed in two real processes, against one that trains without.

And what of its configuration is refused.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol.spec import Resources
from dar.training import DARConfig
from dar.training.parallel import deepspeed_config
from dar.training.parallel.launch import strategy_options
from fakes import ranked

# The processes of the fixture share the machine with all other tests.
pytestmark = pytest.mark.timeout(400)

ROUNDING = 2e-5
"""Of float32: one process that trains in eight shares differs by 2e-6 of a tensor's norm from one
that does not."""
HALF_ROUNDING = 2e-2
"""Of bfloat16, which rounds to 4e-3: where two runs differ in float32's last digits, some of its
roundings differ. In step 1 ZeRO-3 differs from DDP in a few gradients of layer 0 (3e-4 of a
tensor's norm). By step 3 the updates spread that to every tensor: up to 6.5e-3, on CPUs with AMX.
DDP from weights that differ by 1e-7 is 6e-3 from itself in step 1. A fault is larger in step 3: 0.1
with a weight decay of 0.01, 1 with a learning rate 1% higher, 2e3 without clipping."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each run: those of one process without DeepSpeed, then those of two."""
    folder = tmp_path_factory.mktemp("runs")
    single = {"dtype": torch.float32}
    ranked.train(folder, "whole", ranked.WHOLE, **single)
    ranked.train(folder, "whole lora", ranked.WHOLE, is_lora=True, **single)
    ranked.train(folder, "whole offline", ranked.WHOLE, is_offline=True, **single)
    ranked.refill(folder, "refilled", ranked.WHOLE | {"overlap": "one_step"}, **single)
    settings = ranked.WHOLE | ranked.CALIBRATED | {"max_steps": 3}
    ranked.train(folder, "calibrated", settings, **single)
    for output in ranked.start(folder, "zero"):
        assert "DeepSpeed" not in output
    return folder


def files(runs: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights, the optimizer's state, and its hyperparameters and the schedule's state."""
    folder = runs / name / "checkpoints" / "step-3"
    tensors = load_file(next(folder.glob("*model.safetensors")))
    tensors |= load_file(folder / "resume" / "optimizer.safetensors")
    state = json.loads((folder / "resume" / "state.json").read_text())
    return (
        {key: tensor for key, tensor in tensors.items() if not key.startswith("random/")},
        {key: state[key] for key in ("optimizer", "scheduler")},
    )


def assert_same(runs: Path, one: str, other: str, within: float = ROUNDING) -> None:
    (ours, our_state), (theirs, their_state) = files(runs, one), files(runs, other)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor - theirs[key]).norm() <= within * max(1e-12, tensor.norm()), key
    assert our_state == their_state
    told = [json.loads((runs / name / "told.json").read_text()) for name in (one, other)]
    for step, completions in told[1]["completions"].items():
        assert completions == told[0]["completions"][step]
    for step, values in told[1]["metrics"].items():
        assert values == pytest.approx(told[0]["metrics"][step], rel=within, abs=1e-6)
    assert "3" in told[1]["metrics"]


def heard(runs: Path) -> list[dict[str, Any]]:
    return [json.loads((runs / f"heard-{index}.json").read_text()) for index in range(2)]


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("whole", "zero2"),
        ("whole", "zero3"),
        ("whole lora", "zero2 lora"),
        ("whole lora", "zero3 lora"),
        ("whole offline", "zero3 offline"),
        ("refilled", "zero2 refilled"),
        ("calibrated", "zero3 calibrated"),
    ],
)
def test_shards_change_nothing_but_rounding(runs: Path, one: str, other: str) -> None:
    assert_same(runs, one, other)


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
def test_shards_choose_the_same_alpha(runs: Path) -> None:
    chosen = [
        [text for text in told["events"] if "alpha is" in text]
        for name in ("calibrated", "zero3 calibrated")
        for told in [json.loads((runs / name / "told.json").read_text())]
    ]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 1


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
def test_what_is_sampled_again_is_asked_for_one_step_ahead(runs: Path) -> None:
    told = json.loads((runs / "zero2 refilled" / "told.json").read_text())["metrics"]
    assert all(values["rewards/refilled_groups"] > 0 for values in told.values())
    assert [values["dar/staleness"] for values in told.values()] == [0, 1, 1]


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
def test_bfloat16_is_that_of_training_without_deepspeed(runs: Path) -> None:
    assert_same(runs, "ddp bf16", "zero3 bf16", HALF_ROUNDING)


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_shards_go_on_from_the_checkpoint_of_one_process_and_from_their_own(
    runs: Path, zero: str
) -> None:
    assert_same(runs, "whole", f"{zero} resumed")
    assert_same(runs, f"{zero} lora", f"{zero} lora resumed", within=0)


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
def test_a_drain_leaves_a_checkpoint(runs: Path) -> None:
    assert [values["drained"] for values in heard(runs)] == [["drain", 1, 1]] * 2
    assert [path.name for path in (runs / "zero3 drained" / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
def test_zero3_cuts_weights_and_zero2_does_not(runs: Path) -> None:
    weights = load_file(runs / "whole" / "checkpoints" / "step-3" / "model.safetensors")
    size = sum(tensor.numel() for tensor in weights.values())
    for values in heard(runs):
        assert [values["zero2 is sharded"], values["zero2 held"]] == [False, size]
        assert [values["zero3 is sharded"], values["zero3 held"]] == [True, 0]


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_the_saved_model_is_that_of_the_last_checkpoint(runs: Path, zero: str) -> None:
    saved = (runs / zero / "model" / "model.safetensors").read_bytes()
    assert saved == (runs / zero / "checkpoints" / "step-3" / "model.safetensors").read_bytes()
    assert {path.suffix for path in (runs / zero).rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".jinja",
        ".md",
    }


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
def test_a_gradient_that_is_no_number_ends_training(runs: Path) -> None:
    for values in heard(runs):
        assert "gradient of step 2 is not a finite number" in values["fast"]


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
def test_a_step_without_rewards_changes_nothing(runs: Path) -> None:
    told = json.loads((runs / "zero2 empty" / "told.json").read_text())
    assert [told["metrics"][step]["train/grad_norm"] for step in ("1", "2")] == [0.0, 0.0]
    first, last = (
        load_file(runs / "zero2 empty" / "checkpoints" / f"step-{step}" / "model.safetensors")
        for step in (1, 2)
    )
    assert all(torch.equal(first[name], last[name]) for name in first)


@pytest.mark.slow  # two processes import torch and DeepSpeed, and train 17 times
def test_deepspeed_leaves_later_trainers_alone_and_takes_no_model_twice(runs: Path) -> None:
    for values in heard(runs):
        assert values["afterwards"] is False
        assert "make another trainer" in values["again"]


# --- what is refused ------------------------------------------------------------------------------


def settled(zero: dict[str, Any], *, arguments: dict[str, Any] | None = None, **rest: Any) -> Any:
    args = DARConfig(use_cpu=True, report_to="none", **(arguments or {}))
    config = {"zero_optimization": zero, **rest}
    deepspeed_config.settle(config, args)
    return config


@pytest.mark.parametrize(
    ("zero", "rest", "named"),
    [
        ({"stage": 1}, {}, "stage is 1"),
        ({}, {}, "stage is None"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, {}, "offload_param"),
        ({"stage": 3, "zero_quantized_weights": True}, {}, "zero_quantized_weights"),
        ({"stage": 2}, {"optimizer": {"type": "AdamW"}}, "optimizer"),
        ({"stage": 2}, {"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"stage": 2}, {"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"stage": 2}, {"train_batch_size": 7}, "train_batch_size"),
        ({"stage": 2}, {"gradient_clipping": 0.5}, "gradient_clipping"),
    ],
)
def test_a_configuration_that_would_train_otherwise_is_refused(
    zero: dict[str, Any], rest: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequestError, match=named) as refused:
        settled(zero, **rest)
    assert refused.value.param == "deepspeed"


def test_an_optimizer_that_needs_whole_weights_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="adafactor"):
        settled({"stage": 2}, arguments={"optim": "adafactor"})


def test_a_usual_configuration_is_taken() -> None:
    config = settled(
        {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "none"}},
        arguments={
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "bf16": True,
        },
        bf16={"enabled": "auto"},
        train_micro_batch_size_per_gpu="auto",
        gradient_accumulation_steps=2,
    )
    assert config["train_batch_size"] == config["train_micro_batch_size_per_gpu"] == 6
    assert config["zero_optimization"]["overlap_comm"] is True
    assert "offload_optimizer" not in config["zero_optimization"]
    assert config["torch_autocast"]["dtype"] == "bfloat16"
    assert "bf16" not in config


def test_weights_in_another_format_are_refused() -> None:
    model = ranked.make_model(torch.bfloat16)
    with pytest.raises(InvalidRequestError, match="float32"):
        deepspeed_config.check_weights(model)


def test_deepspeed_needs_several_processes(train: Callable[..., Any]) -> None:
    with pytest.raises(InvalidRequestError, match="there is only one") as refused:
        train(settings={"deepspeed": deepspeed_config.config_of("zero2")})
    assert refused.value.param == "deepspeed"


def test_the_error_without_deepspeed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deepspeed_config, "is_installed", lambda: False)
    deepspeed_config.load.cache_clear()
    with pytest.raises(InvalidRequestError, match=r"pip install .*\[deepspeed\]"):
        DARConfig(use_cpu=True, report_to="none", deepspeed=deepspeed_config.config_of("zero3"))
    with pytest.raises(TrainingError, match=r"pip install .*\[deepspeed\]") as refused:
        strategy_options(Resources(processes=2, strategy="zero3"))
    assert refused.value.param == "method.dar.resources.strategy"


def test_a_job_names_the_stage() -> None:
    for strategy, stage in (("zero2", 2), ("zero3", 3)):
        options = strategy_options(Resources(processes=2, strategy=strategy))  # type: ignore[arg-type]  # a loop over literals
        assert options == {"deepspeed": {"zero_optimization": {"stage": stage}}}
