"""Of several trees that a model wrote for one text, the one that is most like the others.

The most probable tree is not the best one by a measure such as TER, but the one of the least expected distance to what the model
holds possible: minimum Bayes risk decoding (Kumar and Byrne, NAACL 2004), here with TER over trees that were drawn. How alike they
are says how sure the model is.
"""

from collections.abc import Sequence

from gatewise.mdt.metrics import tree_edit_ratio
from gatewise.mdt.tree import DecisionTree


def most_alike(trees: Sequence[DecisionTree], candidates: int) -> tuple[int, float]:
    """Which tree has the least mean TER to the others, the first of equal ones; and its agreement, 1 less that mean, in [0, 1].

    Args:
        trees: at least one.
        candidates: how many were written, at least two; those that are no tree are like none.
    """
    # Most draws of a sure model are the same few trees, of which each pair is measured once.
    distinct = list(dict.fromkeys(trees))
    number = {tree: i for i, tree in enumerate(distinct)}
    distance = [[0.0] * len(distinct) for _ in distinct]
    for i in range(len(distinct)):
        for j in range(i):
            distance[i][j] = distance[j][i] = tree_edit_ratio(distinct[i], distinct[j])
    sums = [sum(distance[number[one]][number[other]] for other in trees) for one in trees]
    best = min(range(len(trees)), key=lambda i: sums[i])
    return best, (len(trees) - 1 - sums[best]) / (candidates - 1)
