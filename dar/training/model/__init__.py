"""The models of a run.

loading: loads models and tokenizers without running their code; digest and size of weights.
adapters: which kinds of peft's adapters are trained, and checks of them.
probes: what a model must be before it is trained: finite weights, causal.
vocabulary: which tokens a model has embeddings for.
policy: the trained model, its reference and its tokenizer.
logprobs: log-probabilities of completions, in forward passes that fit the memory.
reward_model: a sequence classifier as a reward source.
"""
