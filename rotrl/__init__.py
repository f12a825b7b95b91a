"""rotrl: are RL updates of language models rotations? Measure them, align by them, merge by them."""

__version__ = "0.1.0"
