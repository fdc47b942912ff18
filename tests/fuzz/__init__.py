"""Calls that no one would write, drawn at random: each must end in a right result or in an error that says why."""
