"""Summaries and checks of networks on the meta device (shapes without data)."""
