"""Readers and prepared samples of the data that the recipes train on."""
