"""What a tree leaves out of its text or turns round: the marks of a passage, what of the tree covers them, and the rules.

:func:`gatewise_mdt.checking.items.items` is where to begin.
"""
