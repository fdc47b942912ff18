"""Tests that every Attribution class fulfills Captum's contract. A new class needs one entry in subjects.py."""
