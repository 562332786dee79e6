"""``gatewise serve``: OpenAI's requests, answered by one base model and many adapters that come and go.

For both engines: reach.py and guard.py who may ask; catalogue.py which adapters there are.
The one that needs PEFT and gatewise alone is put together by running.py: bodies.py and app.py HTTP; engine.py the thread that owns
the model; lanes.py the model and the rows that it writes; text.py words; metrics.py numbers.
vLLM is started by with_vllm.py; vllm_server.py is what runs in its process.
"""
