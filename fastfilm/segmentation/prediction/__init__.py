"""Trained models on new cases: windows, whole volumes, folders of images, swapped metadata."""
