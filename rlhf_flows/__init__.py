"""RLHF and RL post-training of language models as Prefect flows on persistent Ray actor pools."""
