"""Answers generated or scored, a result for each example, and the statistics over them."""
