"""Reviewing decision trees in the browser: read each against its text, correct, approve, save as training data.

| module          | what it knows                                                            |
|-----------------|--------------------------------------------------------------------------|
| ``edits``       | how a tree is corrected, edit by edit, on plain nodes                    |
| ``passage``     | one text with its tree: versions, undo, state                            |
| ``sources``     | documents and files of trees that come in                                |
| ``merging``     | what earlier reviews left of them                                        |
| ``carrying``    | what a review of an older version of the guideline is worth for this one |
| ``adjudication``| a third person decides where two reviewers differ                        |
| ``files``       | the corrections (JSONL in the published format) and the history          |
| ``session``     | the whole review: every change, checked, kept and made; no HTTP, no model |
| ``extracting``  | a thread that asks the model, says how far it is, and can be stopped     |
| ``shown``       | what the page shows of a review, as JSON                                 |
| ``actions``     | what the page can ask for, by name, without HTTP                         |
| ``users``       | who may come in: names and tokens                                        |
| ``server``      | the page over HTTP (Starlette, uvicorn), and whom it answers             |
"""

from gatewise_mdt.review.actions import Review
from gatewise_mdt.review.extracting import Extract, Extracting
from gatewise_mdt.review.session import Session

__all__ = ["Extract", "Extracting", "Review", "Session"]
