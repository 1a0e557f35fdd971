"""Healing what was pruned: it is trained to predict what the unpruned model predicts."""

TRAINED = ("all", "layers", "mlp", "attention", "norms")  # which weights are
ON_ANSWERS = "assistant"
LEARNED = ("all", ON_ANSWERS)  # tokens of conversations
MODES = ("end-to-end", "blocks")  # what is trained at a time: the whole model, or one layer after the other
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_bnb_8bit"}  # and how transformers calls them
# Whom losses are told, and packages of which one does.
REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}
TEACHER_MODES = ("auto", "resident", "streamed")  # how the teacher runs
