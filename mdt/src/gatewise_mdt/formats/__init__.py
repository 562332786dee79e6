"""A tree written down: as the lines that a model writes and reads (``lines``), and as views for people and systems (``views``).

``views`` gives every view by its name; ``page`` is HTML, ``svg`` the drawing, ``mermaid`` a chart's source. Systems run ``cpg``,
FHIR with CQL, and ``tables``, DMN and workbooks; ``orders`` says what a decision asks them to do, ``origin`` where a tree comes
from. ``words`` has what the views say in English and Chinese.
"""
