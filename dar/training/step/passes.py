"""`ForwardPasses`: log-probabilities under policy and reference, shared among the processes."""

from collections.abc import Sequence

import torch
from accelerate.utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor, nn

from dar.training.data.rows import TokenPair
from dar.training.model.logprobs import all_logps
from dar.training.model.policy import Policy
from dar.training.parallel import deepspeed
from dar.training.parallel.sharding import is_sharded, whole
from dar.training.run_context import RunContext


class ForwardPasses:
    """Measures completions without gradients.

    Each process passes over its share of the completions, and all processes get all values. All of
    them must call a method together. A stop is noticed between two passes.
    """

    def __init__(self, run: RunContext, policy: Policy) -> None:
        self._run = run
        self._policy = policy

    def policy_logps(self, pairs: Sequence[TokenPair]) -> Tensor:
        """Log-probabilities ``[B]`` under the current policy, in nats."""
        return self._shared(self._run.trainer.model, pairs)

    def policy_logps_and_entropies(self, pairs: Sequence[TokenPair]) -> Tensor:
        """Log-probabilities and summed entropies ``[2, B]`` under the current policy, in nats."""
        return self._shared(self._run.trainer.model, pairs, with_entropies=True)

    def reference_logps(self, pairs: Sequence[TokenPair]) -> Tensor:
        """Log-probabilities ``[B]`` under the reference, in nats."""
        reference = self._policy.reference
        if reference is not None:
            if not is_sharded(reference):
                self._shard(reference)
            return self._shared(reference, pairs)
        model = self._run.trainer.model
        assert isinstance(model, PeftModel)
        with model.disable_adapter():
            return self._shared(model, pairs)

    def _shared(
        self, model: nn.Module, pairs: Sequence[TokenPair], *, with_entropies: bool = False
    ) -> Tensor:
        run = self._run
        with whole(model):
            own = all_logps(
                model,
                [pairs[i] for i in run.ranks.slice(len(pairs))],
                collate=run.trainer.data_collator,
                vocabulary=self._policy.vocabulary,
                half=run.trainer.args.half,
                before_each=run.poll,
                with_entropies=with_entropies,
            )
        return torch.cat(run.ranks.gather(own), dim=-1)

    def _shard(self, reference: nn.Module) -> None:
        """Shard the reference if the policy is sharded."""
        trainer = self._run.trainer
        if trainer.is_fsdp_enabled:
            fsdp2_prepare_model(trainer.accelerator, reference)
        elif deepspeed.is_cut(trainer.model):
            deepspeed.cut(reference)
