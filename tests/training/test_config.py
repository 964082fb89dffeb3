from pathlib import Path
from typing import Any, get_args

import pytest

from dar.errors import InvalidRequestError
from dar.protocol.spec import Hyperparameters, Sampling
from dar.training import DARConfig
from dar.training.loss import Normalization

SAME_MEANING = {"batch_size": "per_device_train_batch_size"}
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
    assert set(get_args(Normalization)) == set(
        get_args(Hyperparameters.model_fields["adv_norm"].annotation)
    )


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
        ("dar_k", 2.5),
        ("dar_k", True),
        ("max_new_tokens", 2.0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("adam_beta2", 2.0),
        ("per_device_train_batch_size", 0),
        ("num_train_epochs", float("inf")),
        ("seed", -1),
        ("seed", 99_999_999_999),
        ("report_to", "nonsense"),
        ("report_to", ["tensorboard", "nonsense"]),
    ],
)
def test_values_out_of_range_and_options_without_effect_are_refused(
    tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        DARConfig(output_dir=str(tmp_path), **{name: value})
    assert caught.value.param == name


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
