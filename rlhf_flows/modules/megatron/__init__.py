"""A model that ranks share, on megatron-core: its topology, layers, weights and training state.

Nothing is imported here, and Megatron itself only by files that cannot do without: a topology is
checked, and a run described, where it is not installed.
"""
