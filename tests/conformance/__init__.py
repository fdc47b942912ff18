"""What every Attribution class keeps of Captum's contract; a new class needs one entry in subjects.py."""
