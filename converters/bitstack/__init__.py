"""BitStack: a matrix as entries that are dropped and taken back while a model runs."""
