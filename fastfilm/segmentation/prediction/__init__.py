"""Prediction of new cases: sliding windows, whole volumes, folders of images, swapped metadata."""
