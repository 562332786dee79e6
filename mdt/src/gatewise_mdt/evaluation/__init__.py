"""Trees against trees: how well one set matches another (``metrics``), how far that can be trusted (``intervals``), what is wrong
where it does not (``mistakes``), and whether two people agree (``agreement``)."""
