"""The models of a run.

loading: loads models and tokenizers without running code that comes with them.
policy: the trained model, its reference and its tokenizer.
logprobs: log-probabilities of completions, in forward passes of bounded memory.
reward_model: a sequence classifier as a reward source.
sketch: digest and size of a model's weights.
"""
