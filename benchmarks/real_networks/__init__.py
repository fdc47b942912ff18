"""Methods on trained networks from other packages, where the truth is known: shots of real films."""
