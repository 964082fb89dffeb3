"""``dar demo``: a small job through the real system.

brackets: the exact result of the brackets task, and its plot.
reward: the reward service of the demo.
run: the steps of the demo.
screen: progress bars and tables on stderr.
tasks: the two tasks: their job specs and base models.
"""
