"""Models and adapters with which training would go wrong are refused before the first step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
)

from dar.errors import DARError, InvalidRequestError, TrainingError
from dar.training import DARTrainer
from fakes import tiny_models
from fakes.recording_sink import RecordingSink

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:::peft"),  # its advice on options
]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(**SIZES))


def gemma(*, is_bidirectional: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    own = {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES | own, use_bidirectional_attention=is_bidirectional)
    )


@pytest.mark.parametrize("role", ["model", "ref_model"])
def test_a_model_that_is_not_in_memory_is_refused(
    train: Callable[..., DARTrainer], make_model: Callable[..., LlamaForCausalLM], role: str
) -> None:
    model = make_model()
    model.lm_head.to("meta")
    with pytest.raises(InvalidRequestError, match=r"weights that are not in memory, such as") as no:
        train(**{role: model})
    assert no.value.param == role


@pytest.mark.parametrize("role", ["model", "ref_model"])
@pytest.mark.parametrize(
    "make", [bert, lambda: gemma(is_bidirectional=True)], ids=["BERT", "Gemma 3"]
)
def test_a_model_that_reads_later_tokens_is_refused(
    train: Callable[..., DARTrainer],
    sink: RecordingSink,
    role: str,
    make: Callable[[], PreTrainedModel],
) -> None:
    with pytest.raises(TrainingError, match="is not causal") as refused:
        train(sink=sink, **{role: make()})
    assert type(make()).__name__ in refused.value.message
    assert refused.value.param == role
    assert sink.phases == []


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3)
    )


def phimoe() -> PreTrainedModel:
    more = {"num_key_value_heads": 2, "num_local_experts": 4}
    jitter = {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3}
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, **more, **jitter))


def persimmon() -> PreTrainedModel:
    return PersimmonForCausalLM(PersimmonConfig(**SIZES, attention_dropout=0.4))


class NoisyEmbedding(torch.nn.Embedding):
    """Adds noise in training passes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        vectors = super().forward(input)
        return vectors + torch.randn_like(vectors) if self.training else vectors


def noisy() -> PreTrainedModel:
    model = tiny_models.policy()
    model.model.embed_tokens = NoisyEmbedding(64, 32)
    return model


@pytest.mark.parametrize("make", [mixtral, phimoe])
def test_the_jitter_of_a_router_is_off(
    train: Callable[..., DARTrainer], make: Callable[[], PreTrainedModel]
) -> None:
    torch.manual_seed(0)
    model = make()
    assert train(model=model, settings={"max_steps": 1}).state.global_step == 1
    model.train()
    ids_1T = torch.arange(8)[None]
    assert torch.equal(model(input_ids=ids_1T).logits, model(input_ids=ids_1T).logits)


@pytest.mark.parametrize("make", [persimmon, noisy], ids=["dropout", "noise"])
def test_a_model_with_noise_in_training_passes_is_refused(
    train: Callable[..., DARTrainer], sink: RecordingSink, make: Callable[[], PreTrainedModel]
) -> None:
    torch.manual_seed(0)
    with pytest.raises(
        TrainingError, match="returns other logits in each training pass"
    ) as refused:
        train(model=make(), sink=sink)
    assert refused.value.param == "model"
    assert sink.phases == []


def test_a_model_that_counts_positions_from_behind_its_padding_is_refused(
    train: Callable[..., DARTrainer],
) -> None:
    model = RobertaForCausalLM(RobertaConfig(**SIZES, is_decoder=True))
    with pytest.raises(TrainingError, match="counts positions from 2 up"):
        train(model=model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_causal_model_is_taken_in_any_number_format(
    train: Callable[..., DARTrainer], dtype: torch.dtype
) -> None:
    model = gemma(is_bidirectional=False).to(dtype)
    assert train(model=model, settings={"max_steps": 1}).state.global_step == 1


@pytest.mark.parametrize("role", ["model", "ref_model", "reward_model"])
def test_a_model_with_weights_that_are_not_finite_is_refused(
    train: Callable[..., DARTrainer], sink: RecordingSink, role: str
) -> None:
    broken: Any = tiny_models.judge() if role == "reward_model" else tiny_models.policy()
    broken.model.norm.weight.data[0] = float("inf")
    more: dict[str, Any] = {}
    if role == "reward_model":
        more = {"reward_funcs": None, "reward_processing_class": tiny_models.tokenizer()}
    with pytest.raises(TrainingError, match=r"NaN or infinite, in model\.norm\.weight") as refused:
        train(sink=sink, **{role: broken}, **more)
    assert refused.value.param == role
    assert sink.phases == []


def test_trained_weights_of_float16_are_refused_and_frozen_ones_are_not(
    train: Callable[..., DARTrainer], make_model: Callable[..., LlamaForCausalLM]
) -> None:
    with pytest.raises(InvalidRequestError, match="must not be float16"):
        train(model=make_model().half())
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    assert train(model=make_model().half(), peft_config=adapter).state.global_step == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["v_proj", "q_prjo"]}, "target_modules of the adapter names 'q_prjo'"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save of the adapter names 'lm_haed'"),
        ({"exclude_modules": ["v_prj"]}, "exclude_modules of the adapter names 'v_prj'"),
        ({"target_parameters": ["q_proj.wait"]}, "target_parameters of the adapter names"),
        ({"rank_pattern": {"q_prjo": 2}}, "rank_pattern of the adapter names 'q_prjo'"),
        (
            {"layers_to_transform": [1, 2]},
            "layers_to_transform of the adapter has 2, but the model",
        ),
        ({"trainable_token_indices": [4, -1]}, "trainable_token_indices of the adapter has -1"),
        ({"trainable_token_indices": {"embed_tokens": [64]}}, "has 64, but the model has tokens 0"),
        ({"lora_alpha": 0}, "lora_alpha=0, but must have a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan, but must have a finite number above 0"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\]=0, but must have"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0, but must have a probability"),
        ({"target_modules": ["lm_head"], "use_dora": True}, "lm_head has rows of zeros"),
    ],
    ids=str,
)
def test_an_adapter_that_would_train_nothing_or_something_else_is_refused(
    train: Callable[..., DARTrainer],
    sink: RecordingSink,
    make_model: Callable[..., LlamaForCausalLM],
    options: dict[str, Any],
    said: str,
) -> None:
    adapter = LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | options)
    model = make_model(tie_word_embeddings="use_dora" in options)
    with pytest.raises(DARError, match=said):
        train(model=model, peft_config=adapter, sink=sink)
    assert sink.phases == []


def test_trained_tokens_that_the_model_lacks_are_refused(train: Callable[..., DARTrainer]) -> None:
    adapter = TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[99999])
    with pytest.raises(InvalidRequestError, match="token_indices of the adapter has 99999"):
        train(peft_config=adapter)
