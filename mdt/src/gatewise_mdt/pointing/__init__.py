"""Trees by pointing at the text: an encoder with heads for phrases, subjects, nodes and the tree, in place of a generator.

``units`` parts a text, ``targets`` says a tree by places in it. ``heads`` scores phrases, nodes and who is whose child;
``chart`` and ``assembling`` find the best of what fits together; ``decoding`` goes from the one to the other.
"""
