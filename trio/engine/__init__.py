"""The ragged engine: requests in, results out as they finish."""
