"""What benchmarks/comparison_table.py is made of: how its results are kept, and the page written from them."""
