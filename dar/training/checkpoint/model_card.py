"""The model card: Markdown that describes trained weights, with metadata for the hub's index."""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import torch
import transformers
from huggingface_hub import ModelCardData

from dar.version import __version__

TAGS = ("dar", "alignment", "generated_from_trainer")
"""The hub lists models by these."""
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""Form of a name on the hub, which rejects a card with any other name of a base model."""
SHOWN_METRICS = (
    "dar/rewards_mean",
    "dar/kl_ref",
    "dar/weights_clip_fraction",
    "dar/effective_sample_size",
    "completions/mean_length",
)
PAPER = """\
```bibtex
@article{he2025direct,
  title = {Direct Advantage Regression: Aligning LLMs with Online AI Reward},
  author = {He, Li and Zhao, He and Wan, Stephen and Wang, Dadong and Yao, Lina and Liu, Tongliang},
  journal = {arXiv preprint arXiv:2504.14177},
  year = {2025},
  url = {https://arxiv.org/abs/2504.14177},
}
```"""


@dataclass(frozen=True, slots=True)
class CardNotes:
    """What a user may add to a card or replace in it."""

    model_name: str | None = None
    """Default: the last part of the repository's name."""
    dataset: str | Sequence[str] | None = None
    tags: str | Sequence[str] | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None


@dataclass(frozen=True, slots=True)
class CardFacts:
    """The contents of a card."""

    name: str
    """Name of the trained model."""
    base: str | None
    """Name of the model that training started from, as the user gave it."""
    adapter: str | None
    """Kind of the adapter, like ``LoRA``; None: full weights."""
    resized_to: int | None
    """Number of token embeddings, if an adapter's base has fewer or more."""
    steps: int
    values: Mapping[str, Any]
    """Hyperparameters."""
    metrics: Mapping[str, float]
    """Metrics of the last report."""
    rewards: Sequence[str]
    """Names of the reward components."""
    notes: CardNotes


def hub_name(name: str | None) -> str | None:
    """``name`` if it may be a name on the hub; None for a folder."""
    if not name or Path(name).exists() or not REPO_ID.fullmatch(name):
        return None
    return name


def card_text(facts: CardFacts) -> str:
    """The card, as Markdown with the hub's metadata on top."""
    notes = facts.notes
    language = notes.language
    data = ModelCardData(
        base_model=hub_name(facts.base),
        datasets=[dataset for dataset in _listed(notes.dataset) if hub_name(dataset)] or None,
        language=language if language is None or isinstance(language, str) else list(language),
        library_name="peft" if facts.adapter else "transformers",
        license=notes.license,
        model_name=facts.name,
        pipeline_tag="text-generation",
        tags=[*TAGS, *(["lora"] if facts.adapter == "LoRA" else []), *_listed(notes.tags)],
    )
    parts = [_introduction(facts), _use(facts), _training(facts), _versions(), _citation()]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _listed(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _introduction(facts: CardFacts) -> str:
    what = f"A {facts.adapter} adapter for" if facts.adapter else "A fine-tuned version of"
    known = hub_name(facts.base)
    if known and "/" in known:
        base = f"[{known}](https://huggingface.co/{known})"
    else:
        base = f"`{Path(facts.base).name}`" if facts.base else "a language model"
    return (
        f"# {facts.name}\n\n{what} {base}, trained by Direct Advantage Regression (DAR): for each "
        "prompt the model samples completions, each gets a reward, and the model is fine-tuned on "
        "its own samples, weighted by how much better they are than their siblings, and held near "
        "to the model it started from."
    )


def _use(facts: CardFacts) -> str:
    if facts.adapter is None:
        return _use_of_weights(facts)
    known = hub_name(facts.base)
    if known and "/" in known and facts.resized_to is None:
        return f"""## Use

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "{facts.name}"  # the folder of these files, or the repository's id
model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

`dar merge FOLDER -o merged` makes a model without an adapter."""
    base = known or f"./{Path(facts.base or 'base').name}"
    where = "" if known else "  # the folder of the base model"
    resize = f"\nbase.resize_token_embeddings({facts.resized_to})" if facts.resized_to else ""
    return f"""## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{facts.name}"  # the folder of these files, or the repository's id
base = AutoModelForCausalLM.from_pretrained("{base}"){where}{resize}
model = PeftModel.from_pretrained(base, folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

The base must be exactly the model that training started from. `dar merge FOLDER --base {base} -o
merged` makes a model without an adapter."""


def _use_of_weights(facts: CardFacts) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{facts.name}"  # the folder of these files, or the repository's id
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""


def _training(facts: CardFacts) -> str:
    lines = [f"## Training\n\n{facts.steps} optimizer steps."]
    if facts.rewards:
        lines[0] += f" Reward: {', '.join(f'`{name}`' for name in facts.rewards)}."
    rows = [(name, facts.metrics[name]) for name in SHOWN_METRICS if name in facts.metrics]
    if rows:
        lines.append("| last report | |\n|---|---|")
        lines[-1] += "".join(f"\n| `{name}` | {value:.4g} |" for name, value in rows)
    lines.append("### Hyperparameters\n\n| name | value |\n|---|---|")
    lines[-1] += "".join(f"\n| `{name}` | `{value}` |" for name, value in facts.values.items())
    return "\n\n".join(lines)


def _versions() -> str:
    versions = {
        "dar-service": __version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "torch": torch.__version__,
        "huggingface_hub": huggingface_hub.__version__,
        "Python": platform.python_version(),
    }
    return "### Framework versions\n\n" + "\n".join(f"- {k}: {v}" for k, v in versions.items())


def _citation() -> str:
    url = "https://arxiv.org/abs/2504.14177"
    return f"## Citation\n\nThe method: [arXiv 2504.14177]({url}).\n\n{PAPER}"
