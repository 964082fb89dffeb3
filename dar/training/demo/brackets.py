"""A task whose optimum is known exactly: to balance brackets, by one of 32 (or 63) completions.

A policy over so few completions can be listed in full, and so can the optimum of DAR's objective.
The result of training is then measured without sampling noise, and mistakes that a rising reward
would hide become visible (`dar.training.demo.trial`).

Notation: pi, mu and pi_ref are distributions over the Y completions of a prompt; A = c r - (terms
that do not depend on the completion), where c = 1 with the leave-one-out baseline and 1 - 1/K where
the mean includes the completion itself.

What training converges to. The completions are drawn from mu, and the loss -E_mu[w log pi] is
minimal at pi ~ mu w. With log w = alpha/(alpha+beta) (log pi_ref - log mu) + A/(alpha+beta) this is

    pi  ~  mu^(beta/(alpha+beta))  pi_ref^(alpha/(alpha+beta))  exp(c r/(alpha+beta))           (*)

At temperature 1, mu is the policy itself, and pi = mu solves (*) by pi* ~ pi_ref exp(c r/alpha):
beta drops out, and pi* maximises J(pi) = c E_pi[r] - alpha KL(pi || pi_ref). At another temperature
T, mu is the distribution that draws each token with its probability to the power 1/T, renormalised
token by token; (*) has no closed form, but is iterated over all completions. Near its solution an
iteration multiplies an error by beta/(alpha+beta)/T. So there is a solution as long as that is
below 1: at or below T = beta/(alpha+beta) training does not converge, and entropy keeps falling.

Shapes: P prompts, Y completions, N nodes of the tree of completions (a node is a prefix).
Distributions are float64 log-probabilities.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dar.errors import InvalidRequestError
from dar.training.config.config import DARConfig
from dar.training.demo.languages import NEW_TOKENS, PROMPTS, SYMBOLS, balanced

START = ")"
EOS_ID = len(SYMBOLS)
MOST_ITERATIONS = 10_000
"""Most iterations of equation (*); it needs some 60 at T = 0.7 and alpha = beta."""


@dataclass(frozen=True)
class Brackets:
    """The task.

    Attributes:
        can_stop: Whether an end-of-sequence token is a third symbol. A completion then has any
            length up to 5, and earns its reward only if it is balanced and ends by that token: the
            policy also has to learn when to stop.
    """

    can_stop: bool = False

    @cached_property
    def completions(self) -> list[tuple[int, ...]]:
        """All Y completions as token ids: 32, or 63 where they can stop."""
        ids = range(len(SYMBOLS))
        full = list(itertools.product(ids, repeat=NEW_TOKENS))
        if not self.can_stop:
            return full
        ended = [
            (*text, EOS_ID) for n in range(NEW_TOKENS) for text in itertools.product(ids, repeat=n)
        ]
        return ended + full

    @cached_property
    def rewards(self) -> Tensor:
        """``[P, Y]``, of every completion of every prompt."""
        texts = ["".join(SYMBOLS[i] for i in ids if i < EOS_ID) for ids in self.completions]
        rows = [self.reward([prompt] * len(texts), texts, self.completions) for prompt in PROMPTS]
        return torch.tensor(rows, dtype=torch.float64)

    def reward(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: object,
    ) -> list[float]:
        """The reward function, with TRL's signature."""
        values = balanced(prompts, completions, **columns)
        if not self.can_stop:
            return values
        return [v * (ids[-1] == EOS_ID) for v, ids in zip(values, completion_ids, strict=True)]

    def model(self, seed: int) -> LlamaForCausalLM:
        """A Llama of 47 thousand parameters over the task's symbols, with random weights."""
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(SYMBOLS) + self.can_stop,
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=16,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=EOS_ID if self.can_stop else None,
            )
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per symbol, and no special token but the end.

        Every text starts with a closing bracket, which cannot start a balanced one, as an attention
        sink. Without it the policy is four times as far from its optimum after 300 steps (KL 0.10
        against 0.03).
        """
        vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SYMBOLS[0]))
        tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
        tokenizer.decoder = Fuse()
        tokenizer.post_processor = TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, vocabulary[START])]
        )
        special = {"eos_token": "<eos>"} if self.can_stop else {}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    # --- distributions ---------------------------------------------------------------------------

    @torch.no_grad()
    def distribution(self, model: nn.Module, *, temperature: float = 1.0) -> Tensor:
        """Log-probabilities ``[P, Y]`` of all completions under ``model``, by teacher forcing.

        It shares no code with the trainer, so that a mistake there cannot hide here. Prompts have
        one length, and attention is causal, so neither padding nor masks are needed.
        """
        width = 1 + len(PROMPTS[0])
        targets_YC = nn.utils.rnn.pad_sequence(
            [torch.tensor(ids) for ids in self.completions], batch_first=True, padding_value=-1
        )
        rows = [
            torch.tensor([[SYMBOLS.index(symbol) for symbol in START + prompt]]).expand(
                len(targets_YC), -1
            )
            for prompt in PROMPTS
        ]
        ids_BT = torch.cat(
            [torch.cat([prompt_YL, targets_YC.clamp(min=0)], dim=1) for prompt_YL in rows]
        )
        logits_BTV: Tensor = model(input_ids=ids_BT).logits
        logits_BCV = logits_BTV[:, width - 1 : -1].double() / temperature
        logps_BCV = logits_BCV.log_softmax(dim=-1)
        picked_BC = logps_BCV.gather(2, ids_BT[:, width:].unsqueeze(2)).squeeze(2)
        is_token_BC = (targets_YC >= 0).repeat(len(PROMPTS), 1)
        return picked_BC.masked_fill(~is_token_BC, 0.0).sum(dim=1).view(len(PROMPTS), -1)

    @cached_property
    def _tree(self) -> tuple[Tensor, Tensor]:
        """Membership ``[N, Y]`` (node n is a prefix of y), parents ``[N]``; node 0 is the root."""
        prefixes = sorted(
            {ids[:n] for ids in self.completions for n in range(len(ids) + 1)}, key=len
        )
        number = {ids: n for n, ids in enumerate(prefixes)}
        is_in_NY = torch.tensor(
            [[ids[: len(node)] == node for ids in self.completions] for node in prefixes]
        )
        return is_in_NY, torch.tensor([number[node[:-1]] for node in prefixes])

    def tempered(self, logps_PY: Tensor, temperature: float) -> Tensor:
        """The distribution that draws each token of ``logps_PY`` at ``temperature``: ``[P, Y]``."""
        is_in_NY, parent_N = self._tree
        mass_PN = logps_PY.unsqueeze(1).masked_fill(~is_in_NY, -torch.inf).logsumexp(dim=2)
        tokens_PN = (mass_PN - mass_PN[:, parent_N])[:, 1:] / temperature
        is_child_NN = parent_N[1:] == torch.arange(len(parent_N)).unsqueeze(1)
        total_PN = tokens_PN.unsqueeze(1).masked_fill(~is_child_NN, -torch.inf).logsumexp(dim=2)
        tempered_PN = tokens_PN - total_PN[:, parent_N[1:]]
        return torch.einsum("pn,ny->py", tempered_PN, is_in_NY[1:].double())

    def target(self, ref_PY: Tensor, config: DARConfig) -> Tensor:
        """The distribution that training under ``config`` converges to: (*) solved, ``[P, Y]``.

        Raises:
            InvalidRequestError: There is no solution: the temperature is too low, or alpha is 0.
        """
        total = config.alpha + config.beta
        if config.alpha == 0 or config.beta / total >= config.temperature:
            raise InvalidRequestError(
                f"with alpha={config.alpha}, beta={config.beta} and "
                f"temperature={config.temperature} training does not converge: "
                "beta / (alpha + beta) must be below the temperature",
                param="temperature",
            )
        pull_PY = (config.alpha * ref_PY + gain(config) * self.rewards) / total
        logps_PY = ref_PY
        for _ in range(MOST_ITERATIONS):
            mu_PY = self.tempered(logps_PY, config.temperature)
            following_PY = (config.beta / total * mu_PY + pull_PY).log_softmax(dim=1)
            if torch.allclose(following_PY, logps_PY, rtol=0, atol=1e-10):
                break
            logps_PY = following_PY
        return following_PY

    def evaluate(self, model: nn.Module, ref_PY: Tensor, config: DARConfig) -> "ExactMetrics":
        """Compare ``model`` with what training under ``config`` converges to."""
        logps_PY, target_PY = self.distribution(model), self.target(ref_PY, config)
        reward, kl_ref = self._value(logps_PY, ref_PY)
        best_reward, best_kl_ref = self._value(target_PY, ref_PY)
        c = gain(config)
        return ExactMetrics(
            reward=reward,
            best_reward=best_reward,
            kl_ref=kl_ref,
            best_kl_ref=best_kl_ref,
            kl_target=divergence(logps_PY, target_PY),
            objective=c * reward - config.alpha * kl_ref,
            best_objective=c * best_reward - config.alpha * best_kl_ref,
        )

    def _value(self, logps_PY: Tensor, ref_PY: Tensor) -> tuple[float, float]:
        reward = (logps_PY.exp() * self.rewards).sum(dim=1).mean().item()
        return reward, divergence(logps_PY, ref_PY)


def divergence(logps_PY: Tensor, other_PY: Tensor) -> float:
    """KL(logps || other), the mean over the prompts, in nats."""
    return (logps_PY.exp() * (logps_PY - other_PY)).sum(dim=1).mean().item()


def gain(config: DARConfig) -> float:
    """Growth of a completion's advantage with its reward: the c of the module's docstring."""
    return 1.0 if config.baseline == "leave_one_out" else 1 - 1 / config.dar_k


@dataclass(frozen=True, slots=True)
class ExactMetrics:
    """Exact figures of a policy, and those of the distribution that training converges to."""

    reward: float
    """E[r]."""
    best_reward: float
    kl_ref: float
    """KL(pi || pi_ref), in nats."""
    best_kl_ref: float
    kl_target: float
    """KL(pi || pi*), in nats."""
    objective: float
    """J = c E[r] - alpha KL(pi || pi_ref)."""
    best_objective: float

    @property
    def share(self) -> float:
        """J / J*: at most 1 where sampling is at temperature 1."""
        return self.objective / self.best_objective

    def as_dict(self) -> dict[str, float]:
        """All figures, ``share`` included."""
        return {**asdict(self), "share": self.share}
