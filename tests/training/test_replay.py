from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.training import DARConfig, DARTrainer

if TYPE_CHECKING:
    from dar.training.steps import ScoredStep

SAME_NAMES = {
    "dar/rewards_mean", "dar/rewards_std", "dar/advantages_mean", "dar/advantages_std", "dar/weights_mean",
    "dar/weights_max", "dar/logps_policy", "dar/logps_ref", "dar/logps_behavior", "dar/loss",
    "dar/weights_clip_fraction",
}  # fmt: skip
OTHER_NAMES = {
    "dar/kl_from_ref": "dar/kl_ref",
    "dar/completion_length_mean": "completions/mean_length",
}


def replayed_rows(case: dict[str, Any], k: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": case["prompt_ids"][row],
            "completion_ids": case["completion_ids"][row : row + k],
            "rewards": case["rewards"][row : row + k],
        }
        for row in range(0, len(case["rewards"]), k)
    ]


def pairs_of(case: dict[str, Any]) -> list[list[tuple[int, ...]]]:
    return [[tuple(ids) for ids in case[name]] for name in ("prompt_ids", "completion_ids")]


@pytest.mark.parametrize("index", range(3))
def test_golden_cases_give_the_golden_loss_and_gradients(
    end_to_end: dict[str, Any],
    golden_model: Callable[[str], LlamaForCausalLM],
    config: Callable[..., DARConfig],
    tokenizer: PreTrainedTokenizerBase,
    sink: Any,
    index: int,
) -> None:
    case = end_to_end["cases"][index]
    names = ("alpha", "beta", "dar_k", "dar_wclip", "adv_norm")
    settings = {name: case["config"][name] for name in names}
    norms: dict[str, float] = {}
    steps: list[ScoredStep] = []

    class Trainer(DARTrainer):
        def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> torch.Tensor:
            loss = super().training_step(model, inputs, *rest)
            steps.append(inputs.step)
            norms.update({n: p.grad.norm().item() for n, p in model.named_parameters()})
            return loss

    trainer = Trainer(
        golden_model("policy"),
        config(per_device_train_batch_size=4, max_steps=1, **settings),
        replayed_rows(case, settings["dar_k"]),
        processing_class=tokenizer,
        ref_model=golden_model("ref"),
        sink=sink,
    )
    trainer.train()

    report = sink.reports[1]
    for name in SAME_NAMES:
        assert report[name] == pytest.approx(case["metrics"][name], rel=1e-4, abs=1e-4), name
    for name, other in OTHER_NAMES.items():
        assert report[other] == pytest.approx(case["metrics"][name], rel=1e-4, abs=1e-4), name
    assert report["dar/loss"] == pytest.approx(case["loss"], rel=1e-4)
    assert report["train/grad_norm"] == pytest.approx(case["total_grad_norm"], rel=1e-4)
    assert norms == pytest.approx(case["grad_norms"], rel=1e-4)
    (step,) = steps
    place = {ids: row for row, ids in enumerate(zip(*pairs_of(case), strict=True))}
    order = [place[tuple(pair.prompt_ids), tuple(pair.completion_ids)] for pair in step.pairs]
    assert sorted(order) == list(range(len(case["rewards"])))
    for name, values_B in (
        ("advantages", step.advantages_B),
        ("weights", step.weights_B),
        ("losses", -step.weights_B * step.policy_logps_B),
    ):
        expected_B = torch.tensor(case[name])[order]
        torch.testing.assert_close(values_B, expected_B, rtol=1e-4, atol=1e-4)


def test_offline_rows_with_another_number_of_completions_are_refused(
    train: Callable[..., DARTrainer],
) -> None:
    rows = [{"prompt": "w10", "completion_ids": [[4], [5]], "rewards": [1.0, 0.0]}]
    with pytest.raises(InvalidRequestError, match="row 1: needs 4 completion_ids"):
        train(train_dataset=rows, reward_funcs=None)


def test_stored_behavior_log_probabilities_are_used(
    train: Callable[..., DARTrainer], sink: Any
) -> None:
    row = {
        "prompt": "w10",
        "completion_ids": [[4], [5]],
        "rewards": [1.0, None],
        "behavior_logps": [-7.0, -9.0],
    }
    rows = [row, row | {"rewards": [1.0, 0.0]}]
    settings = {"dar_k": 2, "max_steps": 1, "per_device_train_batch_size": 2}
    train(train_dataset=rows, reward_funcs=None, sink=sink, settings=settings)
    assert sink.reports[1]["dar/logps_behavior"] == -8
    assert sink.reports[1]["rewards/missing_fraction"] == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": [2, 64]}, "integers from 0 to 63"),
        ({"prompt_ids": [-1]}, "integers from 0 to 63"),
        ({"completion_ids": [[4], [99]]}, "integers from 0 to 63"),
        ({"completion_ids": [[4], ["w5"]]}, "integers from 0 to 63"),
        ({"completion_ids": [[4], []]}, "0 tokens"),
        ({"completion_ids": [[4], [5] * 128]}, "128 tokens, but must have at least 1 and fewer"),
        ({"rewards": ["1.0", "0.0"]}, "rewards must be numbers or null"),
        ({"rewards": 1.0}, "needs 2 rewards"),
        ({"behavior_logps": [-1.0, None]}, "behavior_logps must be finite numbers"),
    ],
)
def test_rows_that_cannot_be_replayed_are_refused_by_number(
    train: Callable[..., DARTrainer], sink: Any, change: dict[str, Any], message: str
) -> None:
    row = {"prompt": "w10", "completion_ids": [[4], [5]], "rewards": [1.0, 0.0]}
    with pytest.raises(InvalidRequestError, match=f"row 2: .*{message}"):
        train(
            train_dataset=[row, row | change], reward_funcs=None, sink=sink, settings={"dar_k": 2}
        )
    assert sink.phases == []


def test_stored_completions_count_against_the_context_and_max_new_tokens_does_not(
    train: Callable[..., DARTrainer], sink: Any
) -> None:
    row = {"prompt": "w10 w20", "completion_ids": [[4] * 126, [5]], "rewards": [1.0, 0.0]}
    settings = {"dar_k": 2, "max_steps": 1, "max_new_tokens": 500, "max_length": 4096}
    train(train_dataset=[row], reward_funcs=None, sink=sink, settings=settings)
    (cut,) = [data for _, _, data in sink.events]
    assert cut["cut_tokens"] == 1
