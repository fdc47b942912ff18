"""The parts of model_kinds_table.py: one model of each kind, and a check for each method and metric."""
