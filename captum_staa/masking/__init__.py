"""Remove regions of inputs in batches: what occlusion, ablation and metrics share."""
