"""Faults that the tests must see: tables of patches, and a script that plants them one after another."""
