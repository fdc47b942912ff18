"""Capture of attention during a forward pass, composition over layers, and focusing of the resulting map."""
