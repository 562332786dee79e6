"""Records for training and for measuring, by document: what a model learned of one must not help it on the other side.

Passages of one guideline share drugs, phrases and their writer's habits. Split passage by passage, they make dev scores that no
other guideline will reach.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from gatewise.errors import GatewiseError
from gatewise_mdt.records import TreeRecord


def by_document(records: Iterable[TreeRecord]) -> list[list[TreeRecord]]:
    """The records of each document, in the order in which the documents come.

    A document goes by the name of its file, wherever that lies: versions of one share most of their text. The same bytes ("sha256")
    under another name are the same document. Records with neither are of one document if they have the same text.
    """
    documents: dict[str, list[TreeRecord]] = defaultdict(list)
    names: dict[str, str] = {}  # sha256 -> the name that it came under first
    for record in records:
        source = record.more.get("source")
        name = re.split(r"[/\\]", source.strip())[-1].lower() if isinstance(source, str) else ""
        sha256 = record.sha256.strip().lower()
        documents[names.setdefault(sha256, name or sha256) if sha256 else name or record.text].append(record)
    return list(documents.values())


def split(records: Sequence[TreeRecord], share: float, *, seed: int = 0) -> tuple[list[TreeRecord], list[TreeRecord]]:
    """Records to train on and dev records, whole documents each, in their order.

    Documents are drawn one after another, and each that brings the number of dev records nearer to the share goes there. Each side
    gets one document at least: few large documents cannot give a small share.

    Args:
        share: of the records, for dev; in (0, 1).

    Raises:
        GatewiseError: the share is none, or there are fewer than two documents.
    """
    if not 0 < share < 1:
        raise GatewiseError(f"the share of dev is {share:g}: expected a number between 0 and 1, such as 0.2")
    documents = by_document(records)
    if len(documents) < 2:
        raise GatewiseError(
            f"all {len(records)} records are of one document, expected two or more to split them: leave --dev out, or add trees of"
            " other documents"
        )
    random.Random(f"{seed}/split").shuffle(documents)
    target, count = share * len(records), 0
    dev: list[list[TreeRecord]] = []
    for document in documents[:]:
        if len(dev) < len(documents) - 1 and abs(target - count - len(document)) < abs(target - count):
            dev.append(document)
            count += len(document)
    held = {id(record) for document in dev or [min(documents, key=len)] for record in document}
    return [one for one in records if id(one) not in held], [one for one in records if id(one) in held]
