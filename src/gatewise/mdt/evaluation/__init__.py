"""Trees against trees: how well one set matches another (``metrics``), how far that can be trusted (``intervals``), and what is
wrong where it does not (``mistakes``)."""
