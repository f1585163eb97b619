"""The mathematics of a routed layer with updates on the rows of its hot experts; `function` is where to begin."""
