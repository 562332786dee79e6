"""Trees against trees: how well one set matches another (``metrics``), and what is wrong where it does not (``mistakes``)."""
