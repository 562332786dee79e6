"""The run that a recipe describes: its schema and YAML, what it is made of, the run itself, and the folder it writes."""
