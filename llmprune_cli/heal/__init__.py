"""Healing what was pruned: it is trained to predict what the unpruned model predicts."""

LOSSES = ("kl", "ce", "kl+ce")  # of what is learned: the teacher's distribution, the text itself, or both
TRAINED = ("all", "mlp", "attention", "norms")  # which weights are
TEACHER_MODES = ("auto", "resident", "streamed")  # how the teacher runs
