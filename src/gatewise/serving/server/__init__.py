"""``gatewise serve``: OpenAI's requests, answered by one base model and many adapters that come and go.

running.py puts it together, for the engine that needs PEFT and gatewise alone: catalogue.py which adapters there are; lanes.py the
model and the rows that it writes; engine.py the thread that owns both; text.py and vocabularies.py words; asked.py and app.py HTTP;
metrics.py numbers.
"""
