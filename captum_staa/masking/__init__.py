"""Remove regions of inputs in batches. Occlusion, ablation and metrics share this code."""
