"""What tests share: tiny checkpoints, ways to run the command line, and stock software to hold results against."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
TESTS = ROOT / "tests"
