"""Trees become rows to train on (``rows``), some of them kept to measure with (``splitting``), and more of them than there are
(``swapping``)."""
