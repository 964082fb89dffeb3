from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dar.errors import InvalidRequestError
from dar.protocol.presets import PRESETS
from dar.protocol.spec import DARSpec, Hyperparameters, JobSpec, Sampling
from dar.training import DARConfig, JobInputs
from dar.training.from_spec import job_config

OFF = {
    "baseline": "mean", "log_ratio": "sum", "tie_tolerance": 0.0, "drop_ties": False, "allow_missing": False,
    "weight_norm": "none", "min_ess": 0.0, "behavior": "policy",
}  # fmt: skip
EXPECTED: dict[str, dict[str, Any]] = {
    "paper": OFF | {
        "dar_k": 4, "dar_wclip": 20.0, "adv_norm": "batch", "temperature": 0.9, "learning_rate": 1e-6,
        "per_device_train_batch_size": 128, "warmup_steps": 15, "lr_scheduler_type": "constant_with_warmup",
        "optim": "adafactor",
    },
    "reference": OFF | {
        "alpha": 0.1, "beta": 0.1, "dar_k": 2, "dar_wclip": 50.0, "adv_norm": "per_prompt", "max_new_tokens": 128,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "learning_rate": 1e-6,
        "per_device_train_batch_size": 8, "max_grad_norm": 1.0, "lr_scheduler_type": "linear", "max_length": 1024,
        "max_prompt_length": 512, "optim": "adamw_torch", "warmup_steps": 0,
    },
}  # fmt: skip


def plain(value: Any) -> Any:
    return getattr(value, "value", value)


@pytest.fixture
def from_spec(tmp_path: Path) -> Callable[[dict[str, Any]], DARConfig]:
    def make(dar: dict[str, Any]) -> DARConfig:
        spec = JobSpec.model_validate(
            {"model": "m", "training_file": "file-1", "method": {"type": "dar", "dar": dar}}
        )
        return job_config(
            JobInputs(
                job_id="ftjob-1",
                spec=spec,
                seed=42,
                total_steps=1,
                model="m",
                adapters=(),
                training_file=tmp_path / "rows",
                work_dir=tmp_path,
                resume_from=None,
                reward_secret=None,
                threads=1,
                offline=True,
            )
        )

    return make


@pytest.mark.parametrize("preset", EXPECTED)
def test_a_preset_gives_what_its_source_says(tmp_path: Path, preset: Any) -> None:
    config = DARConfig(output_dir=str(tmp_path), preset=preset)
    assert {name: plain(getattr(config, name)) for name in EXPECTED[preset]} == EXPECTED[preset]


def test_the_papers_strengths_have_their_sum_and_ratio(tmp_path: Path) -> None:
    config = DARConfig(output_dir=str(tmp_path), preset="paper")
    assert config.alpha + config.beta == pytest.approx(0.05)
    assert config.alpha / (config.alpha + config.beta) == pytest.approx(0.1)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_means_the_same_in_a_job_spec_and_in_a_script(
    tmp_path: Path, from_spec: Callable[[dict[str, Any]], DARConfig], preset: Any
) -> None:
    script = DARConfig(output_dir=str(tmp_path), preset=preset, max_steps=1)
    rewards = {"components": [{"name": "judge", "url": "https://rewards.example/score"}]}
    sent = {"preset": preset, "rewards": rewards}
    ours, spec = script.decisive_values(), from_spec(sent).decisive_values()
    del ours["seed"], spec["seed"]
    assert ours == spec


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_given_goes_before_the_preset(
    tmp_path: Path, from_spec: Callable[[dict[str, Any]], DARConfig], preset: Any
) -> None:
    dar = {
        "preset": preset,
        "hyperparameters": {"dar_wclip": 7.0, "batch_size": 3, "baseline": "leave_one_out"},
        "sampling": {"temperature": 1.3},
    }
    script = DARConfig(
        output_dir=str(tmp_path),
        preset=preset,
        dar_wclip=7.0,
        per_device_train_batch_size=3,
        baseline="leave_one_out",
        temperature=1.3,
        max_steps=1,
    )
    for config in (script, from_spec(dar)):
        assert (config.dar_wclip, config.prompts_per_step) == (7.0, 3)
        assert (config.baseline, config.temperature) == ("leave_one_out", 1.3)
        if preset != "default":
            assert config.adv_norm == EXPECTED[preset]["adv_norm"]


def test_a_preset_stands_behind_parts_that_are_objects_already() -> None:
    spec = DARSpec(
        preset="reference", hyperparameters=Hyperparameters(dar_k=3), sampling=Sampling()
    )
    assert (spec.hyperparameters.dar_k, spec.hyperparameters.dar_wclip) == (3, 50.0)
    assert spec.sampling.max_length == 1024


@pytest.mark.parametrize("preset", PRESETS)
def test_a_spec_that_has_been_stored_reads_the_same_again(preset: str) -> None:
    spec = DARSpec.model_validate({"preset": preset, "hyperparameters": {"alpha": 0.7}})
    assert DARSpec.model_validate_json(spec.model_dump_json()) == spec


def test_an_unknown_preset_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="'papers', but must be one of default") as caught:
        DARConfig(output_dir=str(tmp_path), preset="papers")  # type: ignore[arg-type]  # the point of the test
    assert caught.value.param == "preset"
    with pytest.raises(ValidationError, match=r"preset\n.*'default', 'paper' or 'reference'"):
        DARSpec.model_validate({"preset": "papers"})
