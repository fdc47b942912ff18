"""Reading attention while a forward runs, composing it over layers, and focusing the result."""
