"""The choice of alpha and beta for ``kl_budget``.

frontier: reward and KL at which training ends for each alpha, from samples of the reference.
calibration: samples and scores before the first step, chooses, and reports the forecast.
"""
