"""The part of the demo that needs torch, and two small tasks.

base: the base model of the reviews.
languages: the reviews, and the symbols, prompts and reward of the brackets, without torch.
brackets: a task whose optimum is known exactly.
trial: the brackets task trained, correctly and with mistakes.
"""
