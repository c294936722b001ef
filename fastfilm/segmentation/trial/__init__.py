"""``fastfilm trial``: a test of whether metadata help a segmentation network, with a design fixed in advance."""
