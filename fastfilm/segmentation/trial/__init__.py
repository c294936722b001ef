"""``fastfilm trial``: whether metadata help a segmentation network, by a design that is fixed first."""
