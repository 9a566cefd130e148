"""The ready-made trainers on Megatron: Hugging Face models, losses and steps that ranks share."""
