"""Predictions against measurements: published runs, and what their errors say."""
