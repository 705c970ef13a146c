"""Sweeps over settings (`mixgf tune`): which arms there are, how an arm is evaluated, and what the results say.

`search_space` turns `tune.space` into arms and picks the arms that go on after a rung. `evaluate` scores an encoder during and
after its training. `analysis` computes effects over seeds, interactions and scaling curves.

An arm is one config of the sweep; the base is the config as it is. A rung is a share of the training after which arms are
compared.
"""
