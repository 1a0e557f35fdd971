"""Healing what was pruned: it is trained to predict what the unpruned model predicts."""

LOSSES = ("auto", "kl", "ce", "kl+ce")  # what is learned: the teacher's distribution, the text itself, or both
TRAINED = ("all", "mlp", "attention", "norms")  # which weights are
MODES = ("end-to-end", "blocks")  # what is trained at a time: the whole model, or one layer after the other
TEACHER_MODES = ("auto", "resident", "streamed")  # how the teacher runs
