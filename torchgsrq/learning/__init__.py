"""What calibration learns: statistics of a model's attention, codecs trained on them, and what errors cost."""
