"""Calibration: statistics of a model's attention, the cost of errors, and codecs trained on them."""
