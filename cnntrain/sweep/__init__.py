"""Sweeps: many trainings that end with an answer. Read `cnntrain.sweep.sweep_run` first.

A *trial* is one combination of values of the swept keys. A *run* is one training of a trial, with one seed and, in
cross-validation, one fold.
"""
