"""Healing one layer after the other, each of which learns to turn the pruned model's stream into the teacher's."""
