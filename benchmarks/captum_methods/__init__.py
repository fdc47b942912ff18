"""The parts of captum_table.py: models, formulas, and a check for each method."""
