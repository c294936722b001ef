"""Helpers for every other room: files, locks, messages, processes and devices."""
