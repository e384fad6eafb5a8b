"""Training of LoRA factors on a frozen base: steps, optimisers, checkpoints."""
