"""The models of a run.

loading: loads models, tokenizers and adapters without running code that comes with them.
policy: the trained model, its reference and its tokenizer.
logprobs: log-probabilities of completions, in forward passes that fit the memory.
reward_model: a sequence classifier as a reward source.
sketch: digest and size of a model's weights.
"""
