"""The decisions of a scheduler, each a short class."""
