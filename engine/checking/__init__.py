"""Tools that find mistakes in schedulers, block managers and runners."""
