"""Which tokens a model has embeddings for, and what is refused where others would be read.

A token beyond the embeddings ends a run in the middle of a step, with an error that names nothing.
"""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.training.model.adapters import LanguageModel


def embeddings_of(model: LanguageModel) -> int:
    """Number of tokens that ``model`` has embeddings for."""
    return int(model.config.get_text_config().vocab_size)  # shards have no shape to ask for


def check_reference(
    reference: PreTrainedModel, policy: LanguageModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Reject a reference that cannot read every token that the policy may write.

    Models of one family often differ in the size of their padding, which no tokenizer uses.

    Raises:
        InvalidRequestError: It cannot, or it shares weights with the policy that are trained.
    """
    own = {id(parameter) for parameter in reference.parameters()}
    if any(id(one) in own for one in policy.parameters() if one.requires_grad):
        raise InvalidRequestError(
            "ref_model shares weights with the model, so it would be trained too; leave it out to "
            "compare with the model as it is now, or give a copy (copy.deepcopy)",
            param="ref_model",
        )
    known, limit = embeddings_of(reference), embeddings_of(policy)
    unread = [one for one in tokenizer.get_vocab().values() if known <= one < limit]
    if unread:
        raise InvalidRequestError(
            f"ref_model has tokens 0 to {known - 1} only, but the policy may write token "
            f"{min(unread)}; use a reference with the tokenizer of the model",
            param="ref_model",
        )


def check_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """Reject a tokenizer of another model than the reward model.

    A tokenizer may have added tokens that the model lacks, as no text of a run need contain them.

    Returns:
        Number of tokens that the reward model has embeddings for.

    Raises:
        InvalidRequestError: The model lacks tokens of ordinary texts, or its padding token.
    """
    limit = embeddings_of(model)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    largest = max((one for one in tokenizer.get_vocab().values() if one not in added), default=0)
    if largest >= limit:
        raise InvalidRequestError(
            f"the reward model {name} has tokens 0 to {limit - 1} only, but its tokenizer has "
            f"token {largest}; use the tokenizer that the reward model was trained with",
            param="reward_model",
        )
    pad = model.config.get_text_config().pad_token_id
    if pad is not None and not 0 <= pad < limit:
        raise InvalidRequestError(
            f"the reward model {name} has tokens 0 to {limit - 1} only, but the pad_token_id of "
            f"its config is {pad}; correct its config.json",
            param="reward_model",
        )
    return limit
