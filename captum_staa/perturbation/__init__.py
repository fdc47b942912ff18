"""Perturbing clips: which voxels, with what, and what the model's score does. Small orthogonal parts for ``attr/``."""
