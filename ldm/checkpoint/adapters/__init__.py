"""What changes a model without being one: LoRA files, merged into weights, and embeddings, added as words.

adapted(checkpoint, loras, embeddings) is the same checkpoint with other tensors: whatever is done with one, loading
or converting, is done with the changed weights, one tensor at a time.
"""

from ldm.checkpoint.adapters.embedding import Embedding, add_embeddings, read_embedding
from ldm.checkpoint.adapters.lora import Lora, LowRank, read_lora
from ldm.checkpoint.adapters.merging import adapted, adapter_lines, merge_lora

__all__ = [
    "Embedding",
    "Lora",
    "LowRank",
    "adapted",
    "adapter_lines",
    "add_embeddings",
    "merge_lora",
    "read_embedding",
    "read_lora",
]
