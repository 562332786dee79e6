"""A tree written down: as the lines that a model writes and reads (``lines``), and as views for people and systems (``views``).

``views`` gives every view by its name; ``page`` is HTML, ``svg`` the drawing, ``mermaid`` a chart's source, ``fhir`` a
PlanDefinition; ``words`` has what they say in English and Chinese.
"""
