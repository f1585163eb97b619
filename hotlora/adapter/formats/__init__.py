"""An adapter in the formats of PEFT and of the servers."""
