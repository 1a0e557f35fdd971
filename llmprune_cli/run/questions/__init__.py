"""Questions to a whole model: tasks of lm-evaluation-harness, and prompts to those that chat."""
