"""What is checked and settled before a training run: arguments, data, accelerate's strategy."""

import copy
import logging
import math
from collections.abc import Mapping

from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers.utils.import_utils import is_liger_kernel_available

from dar.errors import InvalidRequestError
from dar.protocol.budget_checks import component_conflict, temperature_conflict
from dar.protocol.reward_spec import Rewards
from dar.protocol.rows import is_conversation
from dar.protocol.spec import StepPlan
from dar.protocol.spec_checks import ONE_STEP
from dar.training.config.config import DARConfig, preset_values
from dar.training.config.ignored import online_only
from dar.training.config.learning_rates import settle_learning_rate
from dar.training.data.rows import NO_COLUMNS, ColumnUse, Rows, check_rows
from dar.training.evaluation import check_evaluation_rows
from dar.training.model.loading import LanguageModel, weights_bytes
from dar.training.model.logprobs import idle_weights
from dar.training.model.policy import Policy
from dar.training.parallel import deepspeed_config
from dar.training.parallel.launch import refuse_if_left_alone
from dar.training.report.sink import Sink
from dar.training.reward_sources import GivenRewards
from dar.training.run_context import HostTrainer

logger = logging.getLogger(__name__)

WITHOUT_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Learning-rate schedules of transformers that ignore ``warmup_steps``."""


def settled_config(config: DARConfig, row_count: int, rewards: GivenRewards) -> DARConfig:
    """A copy of ``config`` with a length in steps, and the tie tolerance of a job spec's rewards.

    Raises:
        InvalidRequestError: The launcher or the number of processes does not fit the arguments, the
            only step would have learning rate 0, ``kl_budget`` cannot be used, or a library is
            missing.
    """
    refuse_if_left_alone()
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise InvalidRequestError(
            "use_liger_kernel needs the library liger-kernel, 0.3.0 or newer, which is not installed "
            "here; install it, or leave use_liger_kernel out",
            param="use_liger_kernel",
        )
    for name, is_set in (("fsdp", config.fsdp), ("deepspeed", config.deepspeed_plugin)):
        if is_set and config.world_size == 1:
            raise InvalidRequestError(
                f"{name} shards a model over processes, but there is only one; start several (torchrun "
                f"--nproc-per-node N …), or leave {name} out",
                param=name,
            )
    config = copy.copy(config)
    if config.max_steps <= 0:
        config.counted_epochs = config.num_train_epochs
        config.max_steps = config.step_plan(row_count, is_replay=False).steps
    schedule = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    if config.max_steps == 1 and config.warmup_steps and schedule not in WITHOUT_WARM_UP:
        raise InvalidRequestError(
            ONE_STEP.format(config.warmup_steps, "the run"), param="warmup_steps"
        )
    if config.kl_budget is not None:
        _settle_budget(config, rewards)
    if isinstance(rewards.functions, Rewards):
        config.tie_tolerance = max(config.tie_tolerance, rewards.functions.combine.tie_eps)
    config.ignore_data_skip = True  # the position in the data is a function of the step
    return config


def _settle_budget(config: DARConfig, rewards: GivenRewards) -> None:
    """Check ``kl_budget`` against temperature and rewards; the default gives way to them.

    Completions that are read from the data may be far from the base model, so there is no default
    for them.

    Raises:
        InvalidRequestError: A budget that was given cannot be used with them.
    """
    components = rewards.functions.components if isinstance(rewards.functions, Rewards) else []
    found = [component_conflict(one.name, one.normalize) for one in components]
    if rewards.is_online:
        found.append(temperature_conflict(config.temperature))
    why = next((one for one in found if one), None)
    if config.has_default_budget and (why or not rewards.is_online):
        config.kl_budget, config.has_default_budget = None, False
    elif why:
        raise InvalidRequestError(why, param="kl_budget")


def check_data(
    rows: Rows,
    evaluated: Rows | Mapping[str, Rows] | None,
    config: DARConfig,
    *,
    is_replay: bool,
    columns: ColumnUse = NO_COLUMNS,
) -> None:
    """Reject data that cannot be trained or evaluated on.

    Args:
        rows: The training data.
        evaluated: One or several data sets for evaluation.
        config: Of the run.
        is_replay: Whether rows hold their completions and rewards, as in offline training.
        columns: What rewards read.

    Raises:
        InvalidRequestError: A row or an option cannot be used.
    """
    check_rows(rows, is_replay=is_replay, columns=columns)
    if config.template_variables and not any(
        is_conversation(rows[index]) for index in range(len(rows))
    ):
        raise InvalidRequestError(
            "chat_template_kwargs has no effect, as no row holds a conversation; leave it out, or "
            "send prompts as lists of messages",
            param="chat_template_kwargs",
        )
    if is_replay and (names := online_only(config, preset_values(config.preset))):
        # Not rejected, as a config is often shared by online and offline runs of one script.
        logger.warning(
            "%s: without effect, as there is no reward source and completions are read from the "
            "data set",
            ", ".join(names),
        )
    if config.overlap == "one_step" and is_replay:
        raise InvalidRequestError(
            "overlap='one_step' samples one step ahead, but the data hold their completions; leave "
            "it out",
            param="overlap",
        )
    check_evaluation_rows(
        evaluated, is_replay=is_replay, is_needed=config.is_evaluating, columns=columns
    )


def choose_learning_rate(
    config: DARConfig, policy: LanguageModel, row_count: int, rewards: GivenRewards
) -> None:
    """Settle the learning rate of ``config`` by the policy that it will train, in place.

    Raises:
        InvalidRequestError: None is given, and none can be chosen for the optimizer.
    """
    is_adapter = isinstance(policy, PeftModel)
    trained = sum(one.numel() for one in policy.parameters() if one.requires_grad)
    frozen = sum(one.numel() for one in policy.parameters() if not one.requires_grad)
    settle_learning_rate(
        config,
        weights=(frozen or trained) if is_adapter else frozen + trained,
        trained_weights=trained,
        is_adapter=is_adapter,
        completions=config.dar_k
        * config.step_plan(row_count, is_replay=not rewards.is_online).per_step,
    )


def report_plan(config: DARConfig, row_count: int, sink: Sink, *, is_replay: bool) -> None:
    """Report the learning rate that was chosen, and which prompts the steps take.

    Also report a temperature at which training does not converge. A resumed run reports nothing of
    this again.
    """
    if config.chosen_rate is not None:
        sink.event("info", config.chosen_rate.message, config.chosen_rate.facts)
    if not is_replay and (why := config.convergence_problem):
        sink.event("warn", why, {"kind": "no_point_of_rest", "coldest": config.coldest})
    _report_prompts(config.step_plan(row_count, is_replay=is_replay), config, sink)


def _report_prompts(plan: StepPlan, config: DARConfig, sink: Sink) -> None:
    """Report what becomes of a batch that the rows do not fill, and of prompts that are left."""
    batch, rows = config.prompts_per_step, f"{plan.rows} row{'s' if plan.rows > 1 else ''}"
    facts = {"batch_size": batch, "rows": plan.rows}
    if batch > plan.rows and plan.is_distinct:
        sink.event(
            "warn",
            f"the batch size is {batch}, but the data set has {rows}: each step takes every row "
            "once, because a row is never compared with its own copies; for more completions in a "
            "step, raise dar_k or add rows",
            {"kind": "batch_exceeds_rows", **facts},
        )
    elif batch > plan.rows:
        sink.event(
            "warn",
            f"the batch size is {batch}, but the data set has {rows}: each step takes each of them "
            f"about {batch / plan.rows:.3g} times, and max_steps {config.max_steps} makes "
            f"{plan.end(config.max_steps) / plan.rows:.4g} passes; lower the batch size, or give "
            "the length in passes",
            {"kind": "batch_exceeds_rows", **facts},
        )
    wanted = math.floor((config.counted_epochs or 0) * plan.rows + 1e-9)
    if plan.total is not None and wanted > plan.total:
        sink.event(
            "info",
            f"{wanted - plan.total} of {wanted} prompts are left out, because the processes cannot "
            "share them evenly",
            {"kind": "left_out", "prompts": wanted - plan.total, **facts},
        )
    rest = len(plan.positions(config.max_steps))
    if rest < plan.per_step:
        sink.event(
            "info",
            f"{plan.total} prompts in steps of {plan.per_step}: the last step takes the {rest} "
            "that are left",
            {"kind": "last_step", "prompts": rest, **facts},
        )


def settle_accelerator(trainer: HostTrainer) -> bool:
    """Change what accelerate has set up. It offers no FSDP on CPUs, where torch's is used instead.

    Returns:
        Whether weights are sharded by FSDP.

    Raises:
        InvalidRequestError: The launcher requested what this trainer does not support.
    """
    args, state = trainer.args, trainer.accelerator.state
    is_fsdp = trainer.is_fsdp_enabled
    if trainer.is_deepspeed_enabled:
        deepspeed_config.leave_loading_alone()
        if args.deepspeed:
            deepspeed_config.forget_launch()
        deepspeed_config.settle(state.deepspeed_plugin.deepspeed_config, args)
        deepspeed_config.check_weights(trainer.model)
    if args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        is_fsdp = True
    if is_fsdp and state.fsdp_plugin.fsdp_version != 2:
        raise InvalidRequestError(
            "this trainer supports version 2 of FSDP only; set fsdp_config={'version': 2} "
            "(accelerate launch --fsdp_version 2)",
            param="fsdp_config",
        )
    return is_fsdp


def limit_search_for_unused(trainer: HostTrainer) -> None:
    """Have DDP search for weights without a gradient only if there are any.

    The search takes time in every step, and torch warns if it finds none.
    """
    args = trainer.args
    is_ddp = args.world_size > 1 and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if is_ddp and args.ddp_find_unused_parameters is None and not idle_weights(trainer.model):
        trainer.accelerator.ddp_handler.find_unused_parameters = False


def held_bytes(trainer: HostTrainer, policy: Policy, rewards: int) -> dict[str, int]:
    """Bytes that stay in the memory of the main process, by content; without activations.

    Args:
        trainer: The trainer.
        policy: Its policy with the reference.
        rewards: Bytes of its reward models.
    """
    trained = sum(
        p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad
    )
    held = {
        "model": weights_bytes(trainer.model),
        "reference": weights_bytes(policy.reference),
        "reward models": rewards,
        "gradients": trained,
        "AdamW's moments": 2 * trained if "adamw" in str(trainer.args.optim).lower() else 0,
    }
    return {name: size for name, size in held.items() if size}
