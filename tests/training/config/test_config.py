from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from dar.errors import InvalidRequestError
from dar.protocol.spec import DARSpec, Hyperparameters, JobSpec, Sampling
from dar.training import DARConfig, JobInputs
from dar.training.config.fields import HelpText
from dar.training.config.ignored import OF_EVALUATION, WITHOUT_EFFECT
from dar.training.from_spec import job_config

SAME_MEANING = {"batch_size": "per_device_train_batch_size"}
WITH_EFFECT = {
    "activation_checkpointing", "activation_checkpointing_kwargs", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16",
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph",
    "ddp_timeout", "debug", "deepspeed", "disable_tqdm", "eval_on_start", "eval_strategy", "fp16", "fsdp", "fsdp_config",
    "full_determinism", "gradient_accumulation_steps", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token", "learning_rate",
    "liger_kernel_config", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step", "logging_steps",
    "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm", "max_steps", "num_train_epochs", "optim", "optim_args",
    "optim_target_modules", "output_dir", "per_device_train_batch_size", "project", "push_to_hub", "report_to", "run_name",
    "save_steps", "save_total_limit", "seed", "skip_memory_metrics", "tf32", "trackio_bucket_id", "trackio_space_id",
    "trackio_static_space_id", "use_cpu", "use_liger_kernel", "warmup_steps", "weight_decay",
}  # fmt: skip
"""Options of transformers that do here what they say."""
NOT_OURS = {"max_steps", "n_epochs", "optim", "lr_scheduler_type"}


def test_defaults_are_those_of_a_job_spec(tmp_path: Path) -> None:
    config = DARConfig(output_dir=str(tmp_path))
    for part in (Hyperparameters(), Sampling()):
        for name, value in part.model_dump().items():
            if name not in NOT_OURS:
                assert getattr(config, SAME_MEANING.get(name, name)) == value, name
    assert config.max_steps == -1
    assert config.num_train_epochs == 1
    assert config.lr_scheduler_type == Hyperparameters().lr_scheduler_type
    assert str(config.optim.value).startswith(Hyperparameters().optim)


def test_names_of_optimizers_and_schedules_are_those_of_a_job_spec(tmp_path: Path) -> None:
    """A job spec takes fewer, and each means the same in both."""
    for name, known in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        names = get_args(Hyperparameters.model_fields[name].annotation)
        used = set()
        for one in names:
            values = {"warmup_steps": 3, "max_steps": 9, name: one}
            spec = {"hyperparameters": values}
            given = DARConfig(output_dir=str(tmp_path), **values)
            inputs = job_inputs_of(DARSpec.model_validate(spec), tmp_path)
            assert getattr(job_config(inputs), name) == getattr(given, name), one
            used.add(getattr(given, name).value)
        assert used <= {one.value for one in known}
        # transformers' own names of these are names of a job spec too
        assert used <= set(names), used
    steady = DARConfig(output_dir=str(tmp_path), lr_scheduler_type="constant", warmup_steps=3)
    assert steady.lr_scheduler_type == "constant_with_warmup"  # else the warm-up had no effect


def job_inputs_of(dar: DARSpec, folder: Path) -> JobInputs:
    method = {"type": "dar", "dar": dar.model_dump()}
    spec = {"model": "tiny", "training_file": "file-1", "method": method}
    return JobInputs(
        job_id="ftjob-1", spec=JobSpec.model_validate(spec), seed=1, total_steps=9, model="tiny",
        adapters=(), training_file=None, work_dir=folder, resume_from=None, reward_secret=None,
        threads=1, offline=True,
    )  # fmt: skip


def out_of_range() -> Iterator[tuple[str, float]]:
    """The nearest values that the schema of a job spec refuses, without its largest counts."""
    names = {one.name for one in fields(DARConfig)}
    for part in (Hyperparameters, Sampling):
        for name, schema in part.model_json_schema()["properties"].items():
            kind = {**schema, **schema.get("anyOf", [{}])[0]}
            for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
                is_count = key == "maximum" and kind["type"] == "integer"
                if key in kind and not is_count and name in names - NOT_OURS:
                    yield name, kind[key] + {"minimum": -1, "maximum": 1}.get(key, 0)


@pytest.mark.parametrize(("name", "value"), list(out_of_range()))
def test_bounds_are_those_of_a_job_spec(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name} is {value}, but must be") as caught:
        DARConfig(output_dir=str(tmp_path), **{name: value})
    assert caught.value.param == name


def test_help_is_that_of_a_job_spec() -> None:
    help_of = {one.name: one.metadata.get("help") for one in fields(DARConfig)}
    for part in (Hyperparameters, Sampling):
        for name, spec in part.model_fields.items():
            if isinstance(help_of.get(name), HelpText) and name not in NOT_OURS:
                assert help_of[name] == " ".join(str(spec.description).split())
    assert (help_of["max_new_tokens"].unit, help_of["alpha"].unit) == ("tokens", "reward")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("beta", 0.0),
        ("beta", float("inf")),
        ("dar_k", 0),
        ("dar_wclip", 0.0),
        ("adv_norm", "zscore"),
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("stop", [""]),
        ("max_length", 1),
        ("eval_delay", 1),
        ("stop", "."),
        ("label_smoothing_factor", 0.1),
        ("dataloader_num_workers", 2),
        ("torch_compile", True),
        ("do_eval", True),
        ("eval_steps", 5),
        ("per_device_eval_batch_size", 4),
        ("batch_eval_metrics", True),
        ("metric_for_best_model", "loss"),
        ("resume_from_checkpoint", "step-2"),
        ("restore_callback_states_from_checkpoint", True),
        ("length_column_name", "tokens"),
        ("remove_unused_columns", False),
        ("ignore_data_skip", True),
        ("average_tokens_across_devices", False),
        ("accelerator_config", {"split_batches": True}),
        ("accelerator_config", {"gradient_accumulation_kwargs": {"num_steps": 4}}),
        ("local_rank", 3),
        ("dar_k", 2.5),
        ("dar_k", True),
        ("max_new_tokens", 2.0),
        ("learning_rate", -1.0),
        ("learning_rate", 0.0),
        ("chat_template_kwargs", "enable_thinking"),
        ("chat_template_kwargs", [1]),
        ("chat_template_kwargs", "[" * 100_000),
        ("chat_template_kwargs", {"tokenize": True}),
        ("chat_template_kwargs", {"x": float("nan")}),
        ("learning_rate", float("nan")),
        ("adam_beta2", 2.0),
        ("per_device_train_batch_size", 0),
        ("num_train_epochs", float("inf")),
        ("seed", -1),
        ("seed", 99_999_999_999),
        ("max_steps", 2.5),
        ("max_steps", 0),
        ("optim_args", "foo=1"),
        ("save_steps", -1),
        ("report_to", "nonsense"),
        ("report_to", "codecarbon"),  # a tracker whose library is not installed
        ("report_to", ["tensorboard", "nonsense"]),
    ],
)
def test_values_out_of_range_and_options_without_effect_are_refused(
    tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        DARConfig(output_dir=str(tmp_path), **{name: value})
    assert caught.value.param == name


def test_every_option_of_transformers_is_refused_or_known_to_work() -> None:
    inherited = {f.name for f in fields(TrainingArguments) if f.init}
    refused = WITHOUT_EFFECT.keys() | OF_EVALUATION["no"].keys()
    assert inherited - refused == WITH_EFFECT
    assert refused <= inherited


def test_what_transformers_and_launchers_set_themselves_is_no_mistake(tmp_path: Path) -> None:
    config = DARConfig(output_dir=str(tmp_path), use_cpu=True, local_rank=0)
    assert not config.dataloader_pin_memory
    DARConfig(output_dir=str(tmp_path), accelerator_config={"use_configured_state": True})


def test_memory_that_is_pinned_for_no_data_loader_is_refused_where_it_could_be(
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidRequestError, match="dataloader_pin_memory"):
        DARConfig(output_dir=str(tmp_path), dataloader_pin_memory=False)


@pytest.mark.parametrize(
    "change", [{"use_liger_kernel": True}, {"optim": "galore_adamw", "optim_target_modules": "q"}]
)
def test_options_that_change_the_result_are_decisive(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    plain = DARConfig(output_dir=str(tmp_path)).decisive_values()
    changed = DARConfig(output_dir=str(tmp_path), **change).decisive_values()
    assert {name for name in plain if plain[name] != changed[name]} == change.keys()


def test_a_single_completion_without_anything_to_compare_it_with_is_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidRequestError, match="nothing to be compared with"):
        DARConfig(output_dir=str(tmp_path), dar_k=1, per_device_train_batch_size=1)
