"""What measures: quality beside full precision, retrieval, settings from a config alone; and the model of the demo."""
