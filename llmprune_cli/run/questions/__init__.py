"""Questions to a whole model: tasks of lm-evaluation-harness."""
