"""Reviewing decision trees in the browser: read each against its text, correct, approve, save as training data.

| module          | what it knows                                                            |
|-----------------|--------------------------------------------------------------------------|
| ``edits``       | how a tree is corrected, edit by edit, on plain nodes                    |
| ``passage``     | one text with its tree: versions, undo, state                            |
| ``sources``     | documents and files of trees that come in                                |
| ``merging``     | what earlier reviews left of them                                        |
| ``files``       | the corrections (JSONL in the published format) and the draft            |
| ``session``     | the whole review; no HTTP, no model                                      |
| ``extracting``  | a thread that asks the model, tells how far it is, and can be stopped    |
| ``shown``       | what the page shows, as JSON                                             |
| ``server``      | the page on 127.0.0.1                                                    |
"""

from gatewise.mdt.review.extracting import Extract, Extracting, model_extract
from gatewise.mdt.review.server import ReviewServer
from gatewise.mdt.review.session import Session

__all__ = ["Extract", "Extracting", "ReviewServer", "Session", "model_extract"]
