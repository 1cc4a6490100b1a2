"""Modules on top of ``ops``: adapted layers, their injection into a model, and the loading of bases."""
