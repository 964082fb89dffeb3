"""Which of peft's adapters are trained, and that each of them is trained, published and merged."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.training import DARConfig, DARTrainer
from dar.training.checkpoint.checkpoint import load_weights
from dar.training.data.rows import TokenPair
from dar.training.model.adapters import ALLOWED, COMMON
from dar.training.model.loading import add_adapter, load_model, merge_adapters
from fakes import tiny_models
from fakes.recording_sink import RecordingSink

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:::peft"),  # its advice on options
]
KINDS = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
ATTENTION = ["q_proj", "v_proj"]
TOKENS = list(range(4, 60))


def lora(**options: Any) -> LoraConfig:
    given = {"r": 4, "lora_alpha": 16, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    return LoraConfig(**given | options)


def other(kind: str, **options: Any) -> PeftConfig:
    given = {"target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    return KINDS[kind](**given | options)


CASES: dict[str, Callable[[], PeftConfig]] = {
    "LORA": lambda: lora(lora_dropout=0.3),
    "LORA all-linear": lambda: lora(target_modules="all-linear", task_type=None),
    "LORA patterns": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
    "LORA layers": lambda: lora(
        layers_to_transform=[1], layers_pattern="layers", exclude_modules=["v_proj"]
    ),
    "LORA rsLoRA": lambda: lora(use_rslora=True),
    "LORA DoRA": lambda: lora(use_dora=True, lora_dropout=0.3),
    "LORA gaussian": lambda: lora(init_lora_weights="gaussian"),
    "LORA random": lambda: lora(init_lora_weights=False),
    "LORA orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "LORA MiCA": lambda: lora(init_lora_weights="mica"),
    "LORA output": lambda: lora(target_modules=["lm_head", "embed_tokens"]),
    "LORA whole modules": lambda: lora(modules_to_save=["lm_head", "norm"]),
    "LORA tokens": lambda: lora(trainable_token_indices=TOKENS),
    "LORA parameters": lambda: lora(
        target_modules=[], target_parameters=["self_attn.q_proj.weight"]
    ),
    "LORA tied": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "LORA fan in": lambda: lora(fan_in_fan_out=True),  # peft corrects it
    "BOFT": lambda: other("BOFT", boft_block_size=8, boft_n_butterfly_factor=2),
    "BOFT number": lambda: other("BOFT", boft_block_size=0, boft_block_num=4),
    "C3A": lambda: other("C3A", block_size=8),
    "DEFT": lambda: other("DEFT", r=4),
    "DELORA": lambda: other("DELORA", r=4, delora_lambda=10),
    "FOURIERFT": lambda: other("FOURIERFT", n_frequency=100, scaling=100.0),
    "FROD": lambda: other("FROD", progressbar=True),
    "GLORA": lambda: other("GLORA", r=4),
    "GRALORA": lambda: other("GRALORA", r=8, alpha=16, gralora_k=4),
    "HIRA": lambda: other("HIRA", r=4),
    "HRA": lambda: other("HRA", r=4),
    "IA3": lambda: other(
        "IA3", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LN_TUNING": lambda: other("LN_TUNING", target_modules=["input_layernorm"]),
    "LOHA": lambda: other("LOHA", r=4, alpha=16),
    "LOKR": lambda: other("LOKR", r=4, alpha=16),
    "MISS": lambda: other("MISS", r=4),
    "OFT": lambda: other("OFT", oft_block_size=8),
    "OFT number": lambda: other("OFT", r=4, oft_block_size=0),
    "OSF": lambda: other("OSF"),
    "PEANUT": lambda: other("PEANUT", r=4, scaling=2.0),
    "PSOFT": lambda: other("PSOFT", r=4, psoft_alpha=4),
    "RANDLORA": lambda: other("RANDLORA", r=4, randlora_alpha=100),
    "ROAD": lambda: other("ROAD", group_size=8),
    "SHIRA": lambda: other("SHIRA", r=4),
    "SUPERTUNING": lambda: other("SUPERTUNING", sparsity=0.9),
    "TINYLORA": lambda: other("TINYLORA", r=4, u=32),
    "TRAINABLE_TOKENS": lambda: other(
        "TRAINABLE_TOKENS", target_modules=["embed_tokens"], token_indices=TOKENS
    ),
    "UNILORA": lambda: other("UNILORA", r=2, theta_d_length=128),
    "VBLORA": lambda: other("VBLORA", r=2, num_vectors=16, vector_length=8, topk=3),
    "VERA": lambda: other("VERA", r=16),
    "WAVEFT": lambda: other("WAVEFT", n_frequency=100, scaling=10.0),
}
FAST = {name for name in CASES if name.startswith("LORA")} | {"LOHA", "IA3", "OFT"}
SLOW = pytest.mark.slow  # a run for each kind takes half a minute together


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose log-probabilities differ much between tokens."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    return tiny_models.save(tiny_models.policy(scale=0.3), folder)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(4, 60).unsqueeze(0)).logits


@torch.no_grad()
def logp(model: nn.Module, pair: TokenPair) -> float:
    """Of one completion: the whole sequence, without padding or cache."""
    ids = torch.tensor([[*pair.prompt_ids, *pair.completion_ids]])
    logps_CV = model.eval()(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
    first = len(pair.prompt_ids) - 1
    return sum(float(logps_CV[first + i, token]) for i, token in enumerate(pair.completion_ids))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else SLOW) for name in CASES]
)
def test_an_allowed_adapter_is_trained_published_resumed_and_merged(
    name: str, train: Callable[..., DARTrainer], plain: Path, sink: RecordingSink
) -> None:
    config = CASES[name]()
    settings = {
        "max_steps": 2,
        "learning_rate": 2e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "behavior": "policy",
    }
    base = load_model(plain)
    before = logits(base)
    trainer = train(model=base, peft_config=config, settings=settings, sink=sink)
    trained = logits(trainer.model)
    assert (trained - before).abs().max() > 1e-3, "nothing was trained"

    with trainer.model.disable_adapter():
        assert (logits(trainer.model) - before).abs().max() < 1e-3

    step = trainer.preview()
    recorded, sampled = step.policy_logps_B.tolist(), step.behavior_logps_B.tolist()
    assert recorded == pytest.approx(sampled, abs=1e-4)
    assert recorded == pytest.approx([logp(trainer.model, p) for p in step.pairs], abs=1e-4)

    published = trainer.checkpoints / "step-2"
    loaded = PeftModel.from_pretrained(load_model(plain), str(published))
    assert (logits(loaded) - trained).abs().max() < 1e-4

    torch.manual_seed(1)
    resumed = add_adapter(load_model(plain), config)
    load_weights(resumed, published)
    assert (logits(resumed) - trained).abs().max() < 1e-4

    merged = merge_adapters(load_model(plain), [published])
    assert (logits(merged) - trained).abs().max() < 1e-3


def test_each_allowed_option_is_tried_in_a_case() -> None:
    tried: dict[str, dict[str, list[object]]] = {kind: {} for kind in ALLOWED}
    for make in CASES.values():
        config = make()
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if value != default:
                tried[str(config.peft_type.value)].setdefault(field.name, []).append(value)
    for kind, options in ALLOWED.items():
        assert options.keys() <= tried[kind].keys()
    allowed = set(ALLOWED["LORA"]["init_lora_weights"]) - {True}
    assert allowed == set(tried["LORA"]["init_lora_weights"])


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {name.split()[0] for name in CASES}))
def test_every_other_kind_of_peft_is_refused_by_name(
    kind: str,
    config: Callable[..., DARConfig],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
) -> None:
    adapter = PeftConfig(peft_type=kind, task_type="CAUSAL_LM")
    with pytest.raises(InvalidRequestError, match=f"of the kind {kind} are not") as caught:
        DARTrainer(
            make_model(), config(), prompts, reward, processing_class=tokenizer, peft_config=adapter
        )
    assert caught.value.param == "peft_config"


@pytest.mark.parametrize("kind", sorted(ALLOWED))
def test_every_other_option_of_an_allowed_kind_is_refused_by_name(
    kind: str,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
    config: Callable[..., DARConfig],
) -> None:
    adapter = next(make() for name, make in CASES.items() if name.split()[0] == kind)
    model = make_model()
    fields = {field.name for field in dataclasses.fields(adapter)}
    for option in sorted(fields - COMMON.keys() - ALLOWED[kind].keys()):
        changed = dataclasses.replace(adapter)
        setattr(changed, option, "something else")
        with pytest.raises(InvalidRequestError, match=f"sets {option}='something else'"):
            DARTrainer(
                model, config(), prompts, reward, processing_class=tokenizer, peft_config=changed
            )


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "eva"},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"alora_invocation_tokens": [5]},
        {"bias": "all"},
        {"task_type": "FEATURE_EXTRACTION"},
        {"r": 8.0},
        {"r": True},
        {"r": "8"},
        {"rank_pattern": {"q_proj": 2.0}},
        {"lora_alpha": True},
        {"lora_alpha": "16"},
        {"lora_dropout": "0.1"},
        {"lora_dropout": None},
    ],
    ids=str,
)
def test_options_of_lora_that_would_train_something_else_or_are_of_another_kind_are_refused(
    options: dict[str, Any],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
    config: Callable[..., DARConfig],
) -> None:
    (option,) = options
    with pytest.raises(InvalidRequestError, match=rf"peft_config sets {option}(\['q_proj'\])?="):
        DARTrainer(
            make_model(),
            config(),
            prompts,
            reward,
            processing_class=tokenizer,
            peft_config=lora(**options),
        )


def several(model: LlamaForCausalLM) -> nn.Module:
    adapted = peft.get_peft_model(model, lora())
    adapted.add_adapter("second", lora())
    return adapted


def merged(model: LlamaForCausalLM) -> nn.Module:
    adapted = peft.get_peft_model(model, lora())
    adapted.merge_adapter()
    return adapted


def by_transformers(model: LlamaForCausalLM) -> nn.Module:
    model.add_adapter(lora())
    return model


@pytest.mark.parametrize(
    ("adapt", "why"),
    [
        (several, r"2 adapters \('default', 'second'\)"),
        (merged, "call unmerge_adapter"),
        (by_transformers, "transformers has added"),
        (lambda model: peft.get_peft_model(model, lora(), mixed=True), "PeftMixedModel"),
        (lambda model: peft.get_peft_model(model, lora(bias="all")), "sets bias='all'"),
    ],
    ids=["several", "merged", "by transformers", "mixed", "option"],
)
def test_a_model_with_an_adapter_that_cannot_be_trained_is_refused(
    adapt: Callable[[Any], Any],
    why: str,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
    config: Callable[..., DARConfig],
) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        DARTrainer(adapt(make_model()), config(), prompts, reward, processing_class=tokenizer)


def test_an_adapter_with_a_name_of_its_own_is_published_and_resumed_like_any_other(
    train: Callable[..., DARTrainer], plain: Path, tmp_path: Path
) -> None:
    def run(resume: Path | None = None, **more: Any) -> DARTrainer:
        torch.manual_seed(0)
        named = peft.get_peft_model(load_model(plain), lora(), adapter_name="mine")
        settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1} | more
        return train(resume, model=named, settings=settings)

    trainer = run()
    trained = logits(trainer.model)
    published = trainer.checkpoints / "step-2"
    assert not (published / "mine").exists()
    loaded = PeftModel.from_pretrained(load_model(plain), str(published))
    assert torch.equal(logits(loaded), trained)
    resumed = run(trainer.checkpoints / "step-1", output_dir=str(tmp_path / "again"))
    assert torch.equal(logits(resumed.model), trained)
