"""Healing what was pruned: it is trained to predict what the unpruned model predicts."""

TRAINED = ("all", "mlp", "attention", "norms")  # which weights are
MODES = ("end-to-end", "blocks")  # what is trained at a time: the whole model, or one layer after the other
TEACHER_MODES = ("auto", "resident", "streamed")  # how the teacher runs
