"""guardbench: benchmark suite and leaderboard harness for adversarially robust dataset distillation."""

__version__ = "0.1.0"
