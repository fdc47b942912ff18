"""Parts of learned-mask attribution: grids, areas, blends with a baseline, objectives, regularizers and the loop."""
