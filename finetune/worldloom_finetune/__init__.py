"""Fine-tune and train world models: one Lightning stack, plain, DDP or DeepSpeed, full or LoRA."""
