"""Everything that decides the result of a run, and its digest; a resume needs the same."""

import hashlib
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dar.protocol.budget_checks import CHOSEN, DEFAULT_BUDGET, NEUTRAL
from dar.protocol.reward_spec import Rewards
from dar.rewards.functions import FunctionReward, RewardFunction
from dar.training.config.config import DARConfig
from dar.training.data.rows import Rows
from dar.training.model.loading import LanguageModel

LONGEST_VALUE = 80
"""Characters of a value that a message shows."""
COUNTED = {
    "prompts_per_step": " (per_device_train_batch_size times gradient_accumulation_steps times the "
    "number of processes)",
    "is_one_step_ahead": " (overlap one_step)",
}
"""What makes a derived fact."""
DIGESTED = {
    "rows": "the training data have other rows",
    "base": "the base model has other weights",
}
"""Facts of which only a digest is known, and how a difference reads."""
GIVES_WAY_TO = {"temperature", *NEUTRAL}
"""What the default of ``kl_budget`` gives way to: then alpha and beta are in its place."""
PARTS = {
    "vocabulary": "the tokenizer has another vocabulary or other special tokens",
    "chat_template": "the tokenizer has another chat template",
    "trained": "other weights of the model are trained, and others frozen",
}
"""The same for `part_digests`."""


def rows_sha256(rows: Rows) -> str:
    """SHA-256 of all rows of a data set, in order."""
    content = hashlib.sha256()
    for index in range(len(rows)):
        line = json.dumps(dict(rows[index]), sort_keys=True, default=str)
        content.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return content.hexdigest()


def reward_terms(
    rewards: RewardFunction | str | Sequence[RewardFunction | str] | Rewards | None,
    weights: Sequence[float] | None,
) -> list[dict[str, object]]:
    """Everything that decides the sum of the rewards, but not where they are computed.

    Args:
        rewards: The reward sources; None if the data hold the rewards.
        weights: Factor of each function; default 1.
    """
    if isinstance(rewards, Rewards):
        return _terms_of_spec(rewards)
    if rewards is None:
        return []
    given = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    names = ["remote" if isinstance(one, str) else FunctionReward(one).name for one in given]
    factors = [1.0] * len(given) if weights is None else [float(weight) for weight in weights]
    return [{"name": n, "weight": w} for n, w in itertools.zip_longest(names, factors)]


def _terms_of_spec(rewards: Rewards) -> list[dict[str, object]]:
    """Without fields at their default, so that new fields do not change the digest."""
    further: dict[str, object] = {
        "combine": rewards.combine.model_dump(mode="json", exclude_defaults=True),
        "failure": rewards.failure.model_dump(
            mode="json", include={"on_error", "min_valid", "refill"}, exclude_defaults=True
        ),
    }
    shared = {name: value for name, value in further.items() if value}
    return [
        component.model_dump(mode="json", include={"name", "weight", "clip"})
        | component.model_dump(
            mode="json",
            include={"role", "normalize", "required", "fn", "params", "strip_thinking"},
            exclude_defaults=True,
        )
        | shared
        for component in rewards.components
    ]


def decisive_facts(
    config: DARConfig,
    policy: LanguageModel,
    rows: Rows,
    base: str,
    rewards: Sequence[Mapping[str, object]],
) -> dict[str, Any]:
    """Everything that decides the result, except the answers of reward services, as JSON values.

    Args:
        config: Its `DARConfig.decisive_values`.
        policy: The model that is trained; only an adapter's configuration counts.
        rows: The data set.
        base: Sketch of the weights that training and reference start from.
        rewards: The result of `reward_terms`.
    """
    adapter: object = None
    if isinstance(policy, PeftModel):
        left_out = {"base_model_name_or_path", "inference_mode", "peft_version"}
        values = policy.active_peft_config.to_dict()
        adapter = {key: value for key, value in values.items() if key not in left_out}
    facts: dict[str, Any] = json.loads(
        json.dumps(
            {
                "config": config.decisive_values(),
                "adapter": adapter,
                "rows": rows_sha256(rows),
                "base": base,
                "rewards": [dict(term) for term in rewards],
            },
            default=_as_list,
        )
    )
    return facts


def part_digests(policy: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Digests of what `decisive_facts` leaves out, as checkpoints of earlier versions lack it.

    Args:
        policy: The model before it is split between processes; only what of it is trained counts.
        tokenizer: Its tokenizer.
    """
    trained = sorted(name for name, one in policy.named_parameters() if one.requires_grad)
    parts = {
        "vocabulary": [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map],
        "chat_template": tokenizer.chat_template,
        "trained": trained,
    }
    return {
        name: hashlib.sha256(json.dumps(part, default=str, sort_keys=True).encode()).hexdigest()
        for name, part in parts.items()
    }


def differences_of_parts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """In what two results of `part_digests` differ, in words."""
    return [text for name, text in PARTS.items() if before.get(name, now[name]) != now[name]]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """In what two results of `decisive_facts` differ: a name and a sentence for each difference."""
    found = {}
    for part, title in (("config", ""), ("adapter", "the adapter's ")):
        old, new = before[part] or {}, now[part] or {}
        if not (old and new) and old != new:
            found[part] = f"an adapter was {'' if old else 'not '}trained"
            continue
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                found[name] = (
                    f"{title}{name} was {_shown(old.get(name))} and is {_shown(new.get(name))}"
                    + COUNTED.get(name, "")
                )
    found |= {part: text for part, text in DIGESTED.items() if before[part] != now[part]}
    for name in _consequences(before, now, found):
        del found[name]
    if sentence := _difference_of_rewards(before["rewards"], now["rewards"]):
        found["rewards"] = sentence
    return found


def _consequences(
    before: Mapping[str, Any], now: Mapping[str, Any], found: Mapping[str, str]
) -> set[str]:
    """Differences that follow from others: those are the reason."""
    names = set()
    if "adapter" in found:  # the sketch of the weights is that of the modules that are trained
        names.add("base")
    budgets = [facts["config"].get("kl_budget") for facts in (before, now)]
    if None in budgets and DEFAULT_BUDGET in budgets and found.keys() & GIVES_WAY_TO:
        names |= {"kl_budget", *CHOSEN}
    return names & found.keys()


def _difference_of_rewards(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> str | None:
    old, new = ([term["name"] for term in terms] for terms in (before, now))
    if old != new:
        names = (", ".join(map(str, some)) or "in the data" for some in (old, new))
        return "the rewards were {} and are {}".format(*names)
    for one, other in zip(before, now, strict=True):
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key) and key == "model":
                return f"the model of the reward {one['name']} has other weights"
            if one.get(key) != other.get(key):
                return (
                    f"{key} of the reward {one['name']} was {_shown(one.get(key))} and is "
                    f"{_shown(other.get(key))}"
                )
    return None


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _as_list(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def environment(device: torch.device) -> dict[str, str]:
    """What changes the last digits of a result, besides the configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
    }
