"""The part of the demo that needs torch, and two small tasks.

base: makes the base model of the reviews.
reviews: the language of the reviews.
brackets: a task whose optimum is known exactly.
bracket_reward: its symbols, prompts and reward, without torch.
trial: the brackets task trained, correctly and with deliberate mistakes.
"""
