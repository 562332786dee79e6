"""Trees become rows to train on (``rows``), and more of them than there are (``swapping``)."""
