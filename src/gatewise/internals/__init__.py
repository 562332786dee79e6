"""The only room that touches private names of PyTorch, PEFT and Transformers, each with the versions it was read in."""
