"""The figures of a reference trainer, reached through `DARTrainer.train` on the same token ids."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutput

from dar.training import DARConfig, DARTrainer
from dar.training.model import probes
from dar.training.step.records import ScoredStep
from fakes.recording_sink import RecordingSink

if TYPE_CHECKING:
    from dar.training.step.loop import StepShare

LOGGED = {
    f"dar/{name}": f"dar/{name}"
    for name in (
        "rewards_mean", "rewards_std", "advantages_mean", "advantages_std", "weights_mean", "weights_max",
        "weights_clip_fraction", "logps_policy", "logps_ref", "logps_behavior", "loss",
    )
}  # fmt: skip
LOGGED_ON_POLICY = LOGGED | {"dar/kl_from_ref": "dar/kl_ref"}
"""The golden figure is that of the policy, ours that of what sampled."""
SINGLE, EXTREMES = "k1_per_prompt", "reward_scale_extremes"
BY_TRAINING = [
    "defaults_k2_onpolicy", "batch_norm_k4", "none_norm_k4", "alpha0", "beta_large", "clip_tight", "k8", "paper_alpha05_k4",
    "ties_per_prompt", "preference_rewards", EXTREMES, "metrics_k3", "k4_small_beta", "reference_free",
]  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
AT_CLAMP = {"rtol": 1e-3, "atol": 1e-6}
"""For rewards whose deviation is that of float32's last digit."""


class Recorder(DARTrainer):
    """Keeps the step and the gradients as they are before they are clipped."""

    seen: ScoredStep
    gradients: dict[str, Tensor]

    def training_step(self, model: nn.Module, inputs: "StepShare", *rest: Any) -> Tensor:
        loss = super().training_step(model, inputs, *rest)
        self.seen = inputs.step
        self.gradients = {
            name: parameter.grad.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        return loss


class TableConfig(PreTrainedConfig):
    model_type = "table"

    def __init__(self, vocab_size: int = 2, **values: Any) -> None:
        self.vocab_size = vocab_size
        self.use_cache = False
        self.eos_token_id = self.bos_token_id = self.pad_token_id = None
        super().__init__(**values)


class Table(PreTrainedModel, GenerationMixin):
    """A language model whose next token depends on the last one: any log-probability can be set."""

    config_class = TableConfig

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.logits_VV = nn.Parameter(torch.zeros(config.vocab_size, config.vocab_size))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_to_keep: int,
        use_cache: bool,
    ) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits_VV[input_ids[:, -logits_to_keep:]])


class Foreseeing(Table):
    """Gives probability 1 to whatever comes next, as no language model can: a reference whose
    log-probabilities are all 0.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_to_keep: int,
        use_cache: bool,
    ) -> CausalLMOutput:
        following = input_ids.roll(-1, dims=1)[:, -logits_to_keep:]
        one_hot = nn.functional.one_hot(following, self.config.vocab_size)
        return CausalLMOutput(logits=1e4 * one_hot.to(self.logits_VV.dtype))


def reference(inputs: dict[str, Any]) -> Table | None:
    if inputs["reference_free"]:
        return Foreseeing(TableConfig(vocab_size=1 + inputs["B"] + inputs["K"]))
    return table(inputs["ref_logps"]) if inputs["alpha"] else None


def table(logps: list[list[float]]) -> Table:
    """Token p + 1 is the prompt p, token P + k + 1 its completion k, and token 0 takes what mass is
    left.
    """
    prompts, completions = len(logps), len(logps[0])
    model = Table(TableConfig(vocab_size=1 + prompts + completions))
    with torch.no_grad():
        for prompt, row in enumerate(logps, start=1):
            rest = math.log1p(-sum(map(math.exp, row)))
            entries = [rest] + [-1e4] * prompts + row
            model.logits_VV[prompt] = torch.tensor(entries)
    return model


def table_rows(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    completion_ids = [[1 + inputs["B"] + k] for k in range(inputs["K"])]
    stored = inputs["behavior_logps"] or [None] * inputs["B"]
    return [
        {"prompt_ids": [1 + p], "completion_ids": completion_ids, "rewards": rewards}
        | ({} if logps is None else {"behavior_logps": logps})
        for p, (rewards, logps) in enumerate(zip(inputs["rewards"], stored, strict=True))
    ]


def settings_of(inputs: dict[str, Any]) -> dict[str, Any]:
    names = ("alpha", "beta", "dar_wclip", "adv_norm")
    return {name: inputs[name] for name in names} | {
        "preset": "reference",
        "dar_k": inputs["K"],
        "per_device_train_batch_size": inputs["B"],
        "max_steps": 1,
    }


def named(weight_cases: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (case,) = [case for case in weight_cases if case["name"] == name]
    return case


def test_every_golden_case_of_the_weights_is_tried(weight_cases: list[dict[str, Any]]) -> None:
    assert {case["name"] for case in weight_cases} == {*BY_TRAINING, SINGLE}


@pytest.mark.parametrize("name", BY_TRAINING)
def test_training_gives_the_golden_weights_loss_gradient_and_metrics(
    weight_cases: list[dict[str, Any]],
    config: Callable[..., DARConfig],
    tokenizer: PreTrainedTokenizerBase,
    sink: RecordingSink,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = named(weight_cases, name)
    inputs, expected = case["inputs"], case["expected"]
    if inputs["reference_free"]:  # only a reference that is not causal has probability 1 everywhere
        monkeypatch.setattr(probes, "check_causal", lambda *_, **__: None)
    policy = table(inputs["policy_logps"])
    trainer = Recorder(
        policy,
        config(**settings_of(inputs)),
        table_rows(inputs),
        processing_class=tokenizer,
        ref_model=reference(inputs),
        sink=sink,
    )
    probabilities_VV = policy.logits_VV.detach().softmax(dim=-1)

    trainer.train()

    step, gradient_VV = trainer.seen, trainer.gradients["logits_VV"]
    for place, prompt in enumerate(step.prompts):
        row = prompt.ids[0] - 1
        tolerance = AT_CLAMP if name == EXTREMES and row == 1 else CLOSE
        own = slice(place * inputs["K"], (place + 1) * inputs["K"])
        policy_logps = step.policy_logps_B[own]
        for ours, golden in (
            (step.advantages_B[own], expected["advantages"]),
            (step.weights_B[own], expected["weights"]),
            (-step.weights_B[own] * policy_logps, expected["per_sequence_losses"]),
            (policy_logps, inputs["policy_logps"]),
        ):
            torch.testing.assert_close(ours, torch.tensor(golden[row]), **tolerance)
        # d log softmax = one-hot - probabilities
        slopes_K = torch.tensor(expected["dloss_dpolicy_logps"][row])
        expected_V = -slopes_K.sum() * probabilities_VV[row + 1]
        expected_V[1 + inputs["B"] :] += slopes_K
        torch.testing.assert_close(gradient_VV[row + 1], expected_V, **tolerance)
    report = sink.reports[1]
    loss_tolerance = 1e-3 if name == EXTREMES else 1e-5
    assert report["dar/loss"] == pytest.approx(expected["loss"], rel=loss_tolerance, abs=1e-6)
    without = {"dar/logps_ref"} if inputs["alpha"] == 0 else set()
    known = LOGGED if inputs["behavior_logps"] else LOGGED_ON_POLICY
    for golden_name, ours_name in known.items():
        if ours_name not in without:
            golden_value = pytest.approx(
                expected["metrics"][golden_name], rel=loss_tolerance, abs=1e-6
            )
            assert report[ours_name] == golden_value, ours_name


def test_a_single_completion_per_prompt_is_weighted_by_its_reward(
    weight_cases: list[dict[str, Any]],
    config: Callable[..., DARConfig],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    inputs = named(weight_cases, SINGLE)["inputs"]
    trainer = Recorder(
        table(inputs["policy_logps"]),
        config(**settings_of(inputs)),
        table_rows(inputs),
        processing_class=tokenizer,
        ref_model=table(inputs["ref_logps"]),
    )
    trainer.train()
    step = trainer.seen
    rewards_B = torch.tensor([reward.reward for reward in step.rewards])
    deviation = rewards_B.std(unbiased=False)
    torch.testing.assert_close(
        step.advantages_B, (rewards_B - rewards_B.mean()) / deviation, **CLOSE
    )
    assert deviation > 0.1


def replayed_rows(case: dict[str, Any], k: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": case["prompt_ids"][row],
            "completion_ids": case["completion_ids"][row : row + k],
            "rewards": case["rewards"][row : row + k],
        }
        for row in range(0, len(case["rewards"]), k)
    ]


def order_of(case: dict[str, Any], step: ScoredStep) -> list[int]:
    """Numbers of a step's completions in a golden case."""
    pairs = zip(case["prompt_ids"], case["completion_ids"], strict=True)
    place = {
        (tuple(prompt), tuple(completion)): row for row, (prompt, completion) in enumerate(pairs)
    }
    order = [place[tuple(pair.prompt_ids), tuple(pair.completion_ids)] for pair in step.pairs]
    assert sorted(order) == list(range(len(case["rewards"])))
    return order


@pytest.mark.parametrize("index", range(3))
def test_golden_cases_give_the_golden_log_probabilities_loss_and_gradients(
    end_to_end: dict[str, Any],
    golden_model: Callable[[str], LlamaForCausalLM],
    config: Callable[..., DARConfig],
    tokenizer: PreTrainedTokenizerBase,
    sink: RecordingSink,
    index: int,
) -> None:
    case = end_to_end["cases"][index]
    names = ("alpha", "beta", "dar_k", "dar_wclip", "adv_norm")
    settings = {name: case["config"][name] for name in names} | {"preset": "reference"}
    rows = replayed_rows(case, settings["dar_k"])
    trainer = Recorder(
        golden_model("policy"),
        config(per_device_train_batch_size=len(rows), max_steps=1, **settings),
        rows,
        processing_class=tokenizer,
        ref_model=golden_model("ref"),
        sink=sink,
    )
    trainer.train()

    report, step = sink.reports[1], trainer.seen
    names_here = LOGGED_ON_POLICY | {"dar/completion_length_mean": "completions/mean_length"}
    for golden_name, name in names_here.items():
        assert report[name] == pytest.approx(case["metrics"][golden_name], rel=1e-4, abs=1e-4), name
    assert report["dar/loss"] == pytest.approx(case["loss"], rel=1e-4)
    assert report["train/grad_norm"] == pytest.approx(case["total_grad_norm"], rel=1e-4)
    norms = {name: gradient.norm().item() for name, gradient in trainer.gradients.items()}
    assert norms == pytest.approx(case["grad_norms"], rel=1e-4)
    order = order_of(case, step)
    for name, values_B in (
        ("policy_logps", step.policy_logps_B),
        ("ref_logps", step.ref_logps_B),
        ("behavior_logps", step.behavior_logps_B),
    ):
        torch.testing.assert_close(values_B, torch.tensor(case[name])[order], rtol=0, atol=1e-4)
    for name, values_B in (
        ("rewards", torch.tensor([reward.reward for reward in step.rewards])),
        ("advantages", step.advantages_B),
        ("weights", step.weights_B),
        ("losses", -step.weights_B * step.policy_logps_B),
    ):
        torch.testing.assert_close(values_B, torch.tensor(case[name])[order], rtol=1e-4, atol=1e-5)
