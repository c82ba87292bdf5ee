"""Small programs on attention scores, drawn at random, run natively and by rows: ``python -m tests.fuzzing``."""
