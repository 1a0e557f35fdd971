"""`recover`: a pruned model learns to predict what the unpruned one predicts."""
