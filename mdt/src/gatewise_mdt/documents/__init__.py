"""A guideline becomes passages.

``reading`` takes a file by its suffix to ``plain_text``, ``markdown``, ``html``, ``docx`` or ``pdf``, each of which makes a
``document`` of blocks; ``headings`` tells headings from sentences, and populations; ``numbering`` counts Word's lists, and
``tables`` gives each cell its header; ``passages`` cuts the document; ``language`` says which of the two it is in.
"""
