"""The training of a pruned model: transformers' Trainer, and the checkpoints that it goes on from."""
