"""The only reader of transformers' names and expert flags, and the only place that changes PEFT."""
