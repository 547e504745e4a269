"""Sweeps: train many trials and rank them. Start reading at `cnntrain.sweep.sweep_run`.

A *trial* is one combination of values of the swept keys. A *run* is one training of a trial, with one seed
and, in cross-validation, one fold.
"""
