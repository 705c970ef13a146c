"""The encoder: a BERT over cell sentences (paper section 3.1), its weights on disk, and cell embeddings.

Packed token ids in; hidden states, cell vectors or masked-gene logits out. `bert.py` is the model.
"""
